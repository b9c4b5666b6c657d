"""Length scaled softplus attention with re-weighting (Gao et al., 2025)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry

EPSILON = 1e-8  # the paper's: rows that are nearly uniform fade


@struct.dataclass
class LSSAR(Normaliser):
  """r_j / (sum_k r_k + 1e-8) with r_j = max(0, n a_j - offset)^power.

  a_j = f_j / sum_k f_k with f_j = softplus(log(n) s_j) are the weights of LSSA, and n is the number
  of keys that the row can see: keys below the average are cut, the others sharpened. Rows of at
  most three keys, the first three of a causal row, have offset 0, so that they are not empty. A
  row of more keys that are all alike is zero, by the formula. The paper's s_j is log(H) <q, k_j> of
  unit queries and keys: norm them before and set `AttentionSpec.scale` to log(H)
  (arXiv:2501.13428).

  Attributes:
    power: 15 in the paper.
    offset: 1 in the paper; 0 with power 1 is LSSA.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"row"})

  power: int = struct.static(15)
  offset: float = struct.static(1.0)

  def __post_init__(self):
    if self.power < 1:
      raise ValueError(f"power={self.power} must be at least 1")

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    visible = jnp.broadcast_to(visible, scores.shape)
    count = visible.sum(-1, keepdims=True, dtype=scores.dtype)
    soft = jax.nn.softplus(jnp.log(jnp.maximum(count, 1.0)) * scores)
    soft = jnp.where(visible, soft, 0.0)
    total = soft.sum(-1, keepdims=True)
    offset = jnp.where(count > 3, self.offset, 0.0)
    excess = count * soft / jnp.where(total > 0, total, 1.0) - offset
    excess = jnp.where(visible, jax.nn.relu(excess), 0.0)
    return self._sharpen(excess)

  def _sharpen(self, excess: jax.Array) -> jax.Array:
    """excess^power over its sum, in units of the largest: n^15 is no float32."""
    unit = jax.lax.stop_gradient(excess.max(-1, keepdims=True))
    unit = jnp.where(unit > 0, unit, 1.0)
    sharp = (excess / unit) ** self.power
    epsilon = jnp.exp(jnp.minimum(jnp.log(EPSILON) - self.power * jnp.log(unit), 80.0))
    return sharp / (sharp.sum(-1, keepdims=True) + epsilon)

  def finish(self, p: Partial) -> jax.Array:
    return p.out


ENTRY = Entry(make=LSSAR, paper="arXiv:2501.13428", facts={"nonnegative"}, tiny=dict(power=3))
