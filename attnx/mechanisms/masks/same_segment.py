"""Packed documents do not see each other."""

from __future__ import annotations

import jax

from attnx.attention.masks import Block, Mask, Span
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class SameSegment(Mask):
  """segment_q = segment_k: tokens of one document, where a row packs several (arXiv:2107.02027).

  A tile is skipped where the ranges of segments do not meet, so that packing costs what the
  documents cost when segments are numbered in the order in which they lie.
  """

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return q.segment == k.segment

  def block(self, q: Span, k: Span) -> Block:
    at, of = q.segment, k.segment
    return Block(
      empty=(at.hi < of.lo) | (of.hi < at.lo),
      full=(at.lo == at.hi) & (of.lo == of.hi) & (at.lo == of.lo),
    )


ENTRY = Entry(make=SameSegment, paper="arXiv:2107.02027")
