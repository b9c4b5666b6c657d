"""Head importance: how much the loss feels a head."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.registry import Entry
from attnx.nn.sown import sown


@struct.dataclass
class HeadImportance:
  """I_n = E_b |d loss_b / d g_n| = mean_b |sum_t d loss_b / d g_btn|, at gates g = 1 (N,).

  The first-order estimate of what removing a head does to the loss of an example. Gradients come
  from `attnx.analysis.observe.gate_gradients`, so that this is a pure function of arrays; the mean
  over batches of one size is that over all their examples. `scaled` makes layers comparable.

  The paper's formula takes the magnitude of an example's gradient, as here; its code that of each
  token's, which does not let tokens cancel (arXiv:1905.10650).

  Args:
    seen: `<layer>/gate_gradients`, (B, N, T) each.

  Returns:
    Layer to (N,), at least 0, float32 or wider.
  """

  def __call__(self, seen: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    gradients = sown(seen, "gate_gradients", 3)
    wide = {k: g.astype(jnp.promote_types(g.dtype, jnp.float32)) for k, g in gradients.items()}
    return {layer: jnp.abs(g.sum(-1)).mean(0) for layer, g in wide.items()}


def scaled(importance: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """I_n / sqrt(sum_n I_n^2) of every layer, as the paper compares heads of different layers."""
  return {k: x / (jnp.linalg.norm(x) + 1e-20) for k, x in importance.items()}


ENTRY = Entry(make=HeadImportance, paper="arXiv:1905.10650", facts={"by_layer", "by_head"})
