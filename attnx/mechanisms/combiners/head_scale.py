"""Head scale: one learned factor a head."""

from __future__ import annotations

from flax import nnx
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.combiner import Combiner, fits


class HeadScale(Combiner):
  """heads_n * scale_n, with one scale a head that begins at 1.

  (B, T, N, V) to the same shape and dtype; the product is float32. `x` is not looked at.
  arXiv:2110.09456.

  Args:
    num_heads: N.

  Raises:
    ValueError: another number of heads arrives.
  """

  def __init__(self, num_heads: int):
    self.scale = nnx.Param(jnp.ones(num_heads, jnp.float32))

  def __call__(self, heads, x):
    fits(heads, x, self.scale.shape[0])
    return (heads * self.scale[...][:, None]).astype(heads.dtype)


ENTRY = Entry(make=HeadScale, paper="arXiv:2110.09456", facts={"identity"})
