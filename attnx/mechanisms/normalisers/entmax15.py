"""1.5-entmax: half way from softmax to sparsemax (Peters et al., 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Projection
from attnx.core import struct
from attnx.core.registry import Entry


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


@struct.dataclass
class Entmax15(Projection):
  """max(0, s_j / 2 - tau)^2, with tau such that the weights of the row sum to one.

  Keys more than 2 below the best get exactly zero. The threshold comes from one sort of the whole
  row, and derivatives of any order from the closed form (arXiv:1905.05702).
  """

  slope = 0.5
  project = staticmethod(project)


ENTRY = Entry(
  make=Entmax15,
  paper="arXiv:1905.05702",
  facts={"nonnegative", "sums_to_one", "shift_invariant"},
)
