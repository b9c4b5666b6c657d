"""Sparsemax: the nearest point of the simplex (Martins and Astudillo, 2016)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class Sparsemax(Normaliser):
  """max(0, s_j - tau), with tau such that the weights of the row sum to one.

  Keys more than 1 below the best get exactly zero. The threshold comes from one sort of the whole
  row, and derivatives of any order from the closed form (arXiv:1602.02068).
  """

  needs: ClassVar[frozenset[str]] = frozenset({"row"})

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    best = jnp.where(visible, scores, -jnp.inf).max(-1, keepdims=True)
    best = jax.lax.stop_gradient(jnp.where(jnp.isneginf(best), 0.0, best))
    weights = project(jnp.where(visible, jnp.maximum(scores - best, -2.0), -2.0))
    return jnp.where(visible, weights, 0.0)

  def finish(self, p: Partial) -> jax.Array:
    return p.out


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


ENTRY = Entry(
  make=Sparsemax,
  paper="arXiv:1602.02068",
  facts={"nonnegative", "sums_to_one", "shift_invariant"},
)
