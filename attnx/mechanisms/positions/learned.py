"""Learned absolute positions."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.core.registry import Entry
from attnx.nn.position import Position, working_dtype


class Learned(Position):
  """x_t + table[n_t], a learned row of D for each of `length` positions.

  Where position is negative nothing is added. Positions beyond the table are refused where they are
  known; where they are traced, as in a compiled decoder, their rows come out as NaN rather than as
  some other position's. arXiv:1705.03122.

  Args:
    dim: D.
    length: number of positions.

  Raises:
    ValueError: a position that is known is not below `length`.
  """

  def __init__(self, dim: int, *, length: int, rngs: nnx.Rngs):
    table = jax.random.normal(rngs.params(), (length, dim), jnp.float32)
    self.table = nnx.Param(0.02 * table)

  def embed(self, x, position):
    length = self.table.shape[0]
    if not isinstance(position, jax.core.Tracer) and np.size(position):
      if (last := np.max(position)) >= length:
        raise ValueError(f"position {last} is beyond the table; expected less than length={length}")
    known = jnp.maximum(position, 0)  # a negative index would count from the end
    rows = self.table[...].at[known].get(mode="fill", fill_value=jnp.nan)
    rows = jnp.where(jnp.asarray(position)[..., None] >= 0, rows, 0.0)
    return (x.astype(working_dtype(x)) + rows).astype(x.dtype)


ENTRY = Entry(make=Learned, paper="arXiv:1705.03122", facts={"additive"}, tiny=dict(length=256))
