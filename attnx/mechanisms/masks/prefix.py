"""Prefix language models: the prompt is seen by all, the rest is causal."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.masks import Block, Mask, Span, pick
from attnx.core import struct
from attnx.core.lookup import Tile
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class Prefix(Mask):
  """position_k <= position_q or position_k < length: the prefix of each text sees itself whole.

  Where a row packs several texts whose positions start over, each has the prefix (arXiv:1910.10683,
  section 3.2.1).

  Attributes:
    length: tokens of the prefix, the same for all rows.
  """

  length: int = struct.static()

  def __post_init__(self):
    if self.length < 0:
      raise ValueError(f"length={self.length} must not be negative; 0 is the causal mask")

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return (k.position <= q.position) | (k.position < self.length)

  def block(self, q: Span, k: Span) -> Block:
    return _block(q, k, self.length, self.length)


@struct.dataclass
class Prefixes(Mask):
  """`Prefix` with a length for each row of the batch.

  Attributes:
    lengths: int (B,).
  """

  needs: ClassVar[frozenset[str]] = frozenset({"index"})

  lengths: Any  # an array; a Tile in kernels

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return (k.position <= q.position) | (k.position < pick(self.by_place[1], q, k))

  @property
  def by_place(self) -> tuple[str, Any]:
    """The array that is indexed by place, for `attend` to check."""
    tiled = isinstance(self.lengths, Tile)
    return "prefix", self.lengths if tiled else jnp.reshape(self.lengths, (-1, 1, 1, 1))

  def block(self, q: Span, k: Span) -> Block:
    return _block(q, k, self.lengths.min(), self.lengths.max())


def _block(q: Span, k: Span, shortest, longest) -> Block:
  at, of = q.position, k.position
  return Block(
    empty=(of.lo > at.hi) & (of.lo >= longest), full=(of.hi <= at.lo) | (of.hi < shortest)
  )


def prefix(length: int | jax.Array) -> Prefix | Prefixes:
  """`Prefix` of a number, `Prefixes` of an array (B,)."""
  return Prefix(length) if isinstance(length, int) else Prefixes(length)


ENTRY = Entry(make=prefix, paper="arXiv:1910.10683", tiny=dict(length=4))
