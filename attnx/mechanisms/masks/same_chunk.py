"""Disjoint chunks that see nothing but themselves (Mega-chunk)."""

from __future__ import annotations

import jax

from attnx.attention.masks import Block, Mask, Span
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class SameChunk(Mask):
  """floor(position_q / size) = floor(position_k / size): O(T size) pairs (arXiv:2209.10655).

  Attributes:
    size: positions of a chunk, the first of which begins at position 0.
  """

  size: int = struct.static()

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f"size={self.size} must be at least 1: a query sees itself")

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return q.position // self.size == k.position // self.size

  def block(self, q: Span, k: Span) -> Block:
    (q_lo, q_hi), (k_lo, k_hi) = ((r.lo // self.size, r.hi // self.size)
                                  for r in (q.position, k.position))  # fmt: skip
    return Block(
      empty=(q_hi < k_lo) | (k_hi < q_lo),
      full=(q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo),
    )


ENTRY = Entry(make=SameChunk, paper="arXiv:2209.10655", tiny=dict(size=4))
