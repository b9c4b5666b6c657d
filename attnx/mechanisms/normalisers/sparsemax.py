"""Sparsemax: the nearest point of the simplex (Martins and Astudillo, 2016)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Projection
from attnx.core import struct
from attnx.core.registry import Entry


@jax.custom_jvp
def project(z: jax.Array) -> jax.Array:
  """Sparsemax of the last axis, whose maximum is zero; -2 stands for everything below -1."""
  ordered = jnp.flip(jnp.sort(z, -1), -1)
  total = ordered.cumsum(-1)
  size = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
  support = (1 + size * ordered > total).sum(-1, keepdims=True)  # a beginning of the order
  threshold = (jnp.take_along_axis(total, support - 1, -1) - 1) / support.astype(z.dtype)
  return jnp.maximum(z - threshold, 0.0)


@project.defjvp
def _project_jvp(primals, tangents):
  """On the support, the tangent less its mean; zero elsewhere."""
  (z,), (dz,) = primals, tangents
  weights = project(z)
  g = (weights > 0).astype(z.dtype)
  mean = (g * dz).sum(-1, keepdims=True) / g.sum(-1, keepdims=True)
  return weights, g * (dz - mean)


@struct.dataclass
class Sparsemax(Projection):
  """max(0, s_j - tau), with tau such that the weights of the row sum to one.

  Keys more than 1 below the best get exactly zero. The threshold comes from one sort of the whole
  row, and derivatives of any order from the closed form (arXiv:1602.02068).
  """

  project = staticmethod(project)


ENTRY = Entry(
  make=Sparsemax,
  paper="arXiv:1602.02068",
  facts={"nonnegative", "sums_to_one", "shift_invariant"},
)
