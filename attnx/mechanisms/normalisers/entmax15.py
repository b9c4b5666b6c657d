"""1.5-entmax: half way from softmax to sparsemax (Peters et al., 2019)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class Entmax15(Normaliser):
  """max(0, s_j / 2 - tau)^2, with tau such that the weights of the row sum to one.

  Keys more than 2 below the best get exactly zero. The threshold comes from one sort of the whole
  row, and derivatives of any order from the closed form (arXiv:1905.05702).
  """

  needs: ClassVar[frozenset[str]] = frozenset({"row"})

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    best = jnp.where(visible, scores, -jnp.inf).max(-1, keepdims=True)
    best = jax.lax.stop_gradient(jnp.where(jnp.isneginf(best), 0.0, best))
    weights = project(jnp.where(visible, jnp.maximum((scores - best) / 2, -2.0), -2.0))
    return jnp.where(visible, weights, 0.0)

  def finish(self, p: Partial) -> jax.Array:
    return p.out


@jax.custom_jvp
def project(z: jax.Array) -> jax.Array:
  """max(0, z - tau)^2 of the last axis, whose maximum is zero; -2 stands for all below -1."""
  ordered = jnp.flip(jnp.sort(z, -1), -1)
  size = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
  mean = ordered.cumsum(-1) / size
  square = (ordered**2).cumsum(-1) / size
  spread = (1 - size * (square - mean**2)) / size
  thresholds = mean - jnp.sqrt(jnp.maximum(spread, 0.0))
  support = (thresholds <= ordered).sum(-1, keepdims=True)  # a beginning of the order
  threshold = jnp.take_along_axis(thresholds, support - 1, -1)
  return jnp.maximum(z - threshold, 0.0) ** 2


@project.defjvp
def _project_jvp(primals, tangents):
  """2 g (dz - <g, dz> / sum g) with g the square roots of the weights."""
  (z,), (dz,) = primals, tangents
  weights = project(z)
  g = jnp.where(weights > 0, jnp.sqrt(jnp.where(weights > 0, weights, 1.0)), 0.0)
  mean = (g * dz).sum(-1, keepdims=True) / g.sum(-1, keepdims=True)
  return weights, 2 * g * (dz - mean)


ENTRY = Entry(
  make=Entmax15,
  paper="arXiv:1905.05702",
  facts={"nonnegative", "sums_to_one", "shift_invariant"},
)
