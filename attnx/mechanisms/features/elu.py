"""The feature map of the first linear transformers."""

from __future__ import annotations

import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.feature import Feature
from attnx.nn.position import working_dtype


class Elu(Feature):
  """phi(x) = elu(x) + 1: x + 1 where x > 0, else exp(x).

  (B, T, N, H) to (B, T, N, H) in float32; positive, however small. arXiv:2006.16236.
  """

  def __init__(self):
    """Takes nothing: there is nothing to learn or to choose."""

  def query(self, x):
    return self._phi(x)

  def key(self, x):
    return self._phi(x)

  def width(self, head_dim):
    return head_dim

  def _phi(self, x):
    x = x.astype(working_dtype(x))
    # expm1(x) + 1 would round small features to zero, and a minimum would halve the slope at 0.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0.0, x)))


ENTRY = Entry(make=Elu, paper="arXiv:2006.16236", facts={"nonnegative"})
