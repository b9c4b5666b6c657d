"""Attention rollout: which inputs reach a token through all layers."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.registry import Entry
from attnx.nn.sown import sown


@struct.dataclass
class Rollout:
  """R = A_L .. A_2 A_1, A_l = rows((1 - r) mean_n W_ln + r I), rows(X)_ts = X_ts / sum_s X_ts.

  The weight of every path from an input to an output, where a block hands on what its mixer read
  and what it got alike: r = 1/2, the paper's choice. Rows of R sum to one. It knows neither how
  large values are nor what MLPs do, so it is no causal claim (arXiv:2005.00928).

  A query that sees nothing keeps what it had, also without residual. Negative weights, which the
  paper does not have, count as zero before heads are averaged (as in arXiv:2405.16504); rows that
  do not sum to one, as those of recurrences, weigh against the residual by their size.

  Args:
    seen: `<layer>/weights`, (B, N, T, T) each, of layers that follow on one another; of an encoder
      and a decoder give the paths of one.

  Returns:
    (B, T, T), float32 or wider: outputs by inputs.

  Raises:
    ValueError: layers do not have maps of one shape (T, T).
  """

  residual: float = struct.static(0.5)

  def __post_init__(self):
    if not 0 <= self.residual <= 1:
      raise ValueError(f"residual={self.residual} must be in [0, 1]")

  def __call__(self, seen: Mapping[str, jax.Array]) -> jax.Array:
    layers = sown(seen, "weights", 4)
    shapes = {(w.shape[0], *w.shape[2:]) for w in layers.values()}
    if len(shapes) > 1 or min(shapes)[1] != min(shapes)[2]:
      raise ValueError(f"maps (B, T, S) are {shapes}; expected one (B, T, T) in all layers")
    first, *others = (self.flow(w) for w in layers.values())
    for a in others:
      first = jnp.einsum("bts,bsu->btu", a, first)  # the upper layer on the left
    return first

  def flow(self, weights: jax.Array) -> jax.Array:
    """A_l of (B, N, T, T), (B, T, T)."""
    w = jax.nn.relu(weights.astype(jnp.promote_types(weights.dtype, jnp.float32))).mean(1)
    itself = jnp.eye(w.shape[-1], dtype=w.dtype)
    a = (1 - self.residual) * w + self.residual * itself
    total = a.sum(-1, keepdims=True)
    return jnp.where(total > 0, a / jnp.where(total > 0, total, 1.0), itself)


ENTRY = Entry(make=Rollout, paper="arXiv:2005.00928", facts={"by_example"})
