"""Collinear constrained attention: keys that point where the query points."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.position import working_dtype
from attnx.nn.rotary import Rotary, angles, frequencies


class CoCA(Rotary):
  """q k^T = sum_j |q_j|^2 tau_j cos((n - m) w_j), tau_j = relu((k_j + k_{j + H/2}) / 2).

  Here |q_j|^2 = q_j^2 + q_{j + H/2}^2 is the squared length of pair j. The key of the paper is
  collinear with the query in every plane and so belongs to a pair of tokens; the product above is
  the same number from vectors of one token each, both of width H:

    query: |q_j|^2 (cos n w_j, sin n w_j)      key: tau_j (cos m w_j, sin m w_j)

  so that no (T, S, H) product is formed and the cache holds keys as usual. All H channels turn.
  arXiv:2309.08646.

  Args:
    base: see `Rotary`.

  Raises:
    ValueError: the head width is odd.
  """

  def __init__(self, *, base: float = 10_000.0):
    super().__init__(base=base)

  def frequencies(self, width):
    return frequencies(width, self.base)

  def query(self, x, position):
    a, b = jnp.split(x.astype(working_dtype(x)), 2, axis=-1)
    return self._point(a**2 + b**2, position).astype(x.dtype)

  def key(self, x, position):
    a, b = jnp.split(x.astype(working_dtype(x)), 2, axis=-1)
    return self._point(jax.nn.relu((a + b) / 2), position).astype(x.dtype)

  def _point(self, length: jax.Array, position: jax.Array) -> jax.Array:
    """Vectors of these lengths (B, T, N, H/2) in the planes, at the angles of `position`."""
    frequency = self.frequencies(2 * length.shape[-1])
    angle = angles(position, frequency, length.dtype)[..., None, :]
    return jnp.concatenate([length * jnp.cos(angle), length * jnp.sin(angle)], axis=-1)


ENTRY = Entry(make=CoCA, paper="arXiv:2309.08646", facts={"relative"})
