"""Cog attention: softmax of magnitudes that keeps signs (Lv et al., 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Softmax
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class Cog(Softmax):
  """sign(s_j) exp(|s_j|) / sum_k exp(|s_k|), with sign(0) = 0.

  Magnitudes of a row sum to one, weights to anything from -1 to 1. Constant in the sign, which
  jumps at a score of zero. A bias that is meant to weaken a key must not come before: the more
  negative, the heavier. The paper keeps softmax in the first and last layer (arXiv:2411.07176).
  """

  def height(self, scores: jax.Array) -> jax.Array:
    return jnp.abs(scores)

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    return jnp.sign(scores) * super().weigh(jnp.abs(scores), visible, peak)


ENTRY = Entry(make=Cog, paper="arXiv:2411.07176")
