"""What a part of a spec reads from arrays at a pair, so that kernels can read it too.

Gathers are what tiles in a kernel cannot do in general. A part that reads arrays reaches them by
one of two doors: a `Table` of numbers for each query, head or row, or a `Tile` of an array of
pairs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.core import struct


@struct.dataclass
class Table:
  """Rows of R numbers, one row for each query, head or row of the batch.

  Attributes:
    rows: (#B, #N, #T, R).
  """

  rows: jax.Array

  @property
  def size(self) -> int:
    """R."""
    return self.rows.shape[-1]

  def at(self, index: jax.Array) -> jax.Array:
    """rows[b, n, t, index[b, n, t, s]] for index (#B, #N, #T, #S), from 0 to R - 1."""
    lead = zip(self.rows.shape, (1, 2, 3), strict=False)
    ids = [0 if n == 1 else jnp.arange(n).reshape(-1, *[1] * (4 - at)) for n, at in lead]
    return jnp.asarray(self.rows)[(*ids, index)]


@struct.dataclass
class Tile:
  """The part of an array (#B, #N, #T, #S) that belongs to a tile of pairs, as kernels hold it."""

  values: jax.Array
