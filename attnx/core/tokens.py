"""Where tokens sit: the only thing a mask or a positional bias may look at."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core import struct


@struct.dataclass
class Tokens:
  """Coordinates of the tokens on one side of attention, each of shape (#B, L).

  `rows` and `columns` lay them out so that any expression of a query and a key side broadcasts to
  the scores, whether those are (B, N, T, S) or one tile inside a kernel.

  Attributes:
    index: place in the array that was passed in, 0 .. L-1.
    position: place in the text; negative means that no token is here (padding, empty cache slot).
      Such a token meets nobody: as a query its row is zero, as a key it is invisible.
    segment: document id, for rows that pack several documents.
    batch: row of the batch; set by `rows`.
    head: query head; set by `rows`.
    origin: a position near to these, broadcasting to them; set in kernels that cannot slice them.
    table: the `Table` of the transform that is called; set by `AttentionSpec.score`.
  """

  index: jax.Array
  position: jax.Array
  segment: jax.Array
  batch: jax.Array | None = None
  head: jax.Array | None = None
  origin: jax.Array | None = None
  table: Any = None

  @classmethod
  def of_length(cls, length: int, *, offset: jax.Array | int = 0) -> Tokens:
    """One document at positions offset .. offset + length - 1.

    The coordinates are NumPy arrays when `offset` is a number, so that implementations can plan
    which tiles to visit before anything is compiled; `offset` may also be (B, 1), one per row.
    """
    index: Any = np.arange(length, dtype=np.int32)[None]
    return cls(index=index, position=index + offset, segment=np.zeros_like(index))

  @classmethod
  def of_lengths(cls, lengths: jax.Array, length: int) -> Tokens:
    """Rows whose first `lengths` (B,) places of `length` hold one document; the rest is padding."""
    index: Any = np.arange(length, dtype=np.int32)[None]
    position = jnp.where(index < jnp.asarray(lengths)[:, None], index, -1)
    return cls(index=index, position=position, segment=np.zeros_like(index))

  def __getitem__(self, window: slice) -> Tokens:
    return jax.tree.map(lambda x: x[:, window], self)

  def rows(self, batch: int, num_heads: int) -> Tokens:
    """As queries: (#B, 1, T, 1), with batch (B, 1, 1, 1) and head (1, N, 1, 1)."""
    laid_out = jax.tree.map(lambda x: jnp.asarray(x)[:, None, :, None], self)
    return dataclasses.replace(
      laid_out,
      batch=jnp.arange(batch, dtype=jnp.int32)[:, None, None, None],
      head=jnp.arange(num_heads, dtype=jnp.int32)[None, :, None, None],
    )

  def columns(self) -> Tokens:
    """As keys: (#B, 1, 1, S)."""
    return jax.tree.map(lambda x: jnp.asarray(x)[:, None, None, :], self)
