"""Entropy of what a head looks at."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.registry import Entry
from attnx.nn.sown import sown


@struct.dataclass
class Entropy:
  """H_t = -sum_s p_ts log p_ts in nats, with p_ts = |w_ts| / sum_s |w_ts|.

  Zero where a query looks at one key, log n where it looks at n keys alike; exp(H) is the number of
  keys that it looks at. Softmax weights are p themselves; maps that do not sum to one, or that have
  signs, are measured by their magnitudes. A row that is all zero has no entropy, which is 0 here.
  Under a causal mask rows see different numbers of keys: compare rows of one t, or H over the log
  of that number, before averaging over t (arXiv:2412.16545).

  Args:
    seen: `<layer>/weights`, (B, N, T, S) each.

  Returns:
    Layer to (B, N, T), float32 or wider.
  """

  def __call__(self, seen: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {layer: entropy(w) for layer, w in sown(seen, "weights", 4).items()}


def entropy(weights: jax.Array) -> jax.Array:
  """Of each row of (.., T, S), (.., T); a weight of zero has gradient zero, not infinity."""
  w = jnp.abs(weights.astype(jnp.promote_types(weights.dtype, jnp.float32)))
  total = w.sum(-1, keepdims=True)
  p = w / jnp.where(total > 0, total, 1.0)
  return -(p * jnp.log(jnp.where(p > 0, p, 1.0))).sum(-1)


ENTRY = Entry(make=Entropy, paper="arXiv:2412.16545", facts={"by_layer", "by_example", "by_head"})
