"""The first keys and the last ones (StreamingLLM)."""

from __future__ import annotations

import jax

from attnx.attention.masks import Block, Mask, Span
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class SinkWindow(Mask):
  """0 <= position_q - position_k < recent, or position_k < start and position_k <= position_q.

  This is the mask alone, with true positions; the paper's cache moves positions besides
  (arXiv:2309.17453).

  Attributes:
    start: first keys of the text that are always kept.
    recent: keys of the window, with the query itself.
  """

  start: int = struct.static(4)
  recent: int = struct.static(512)

  def __post_init__(self):
    if self.start < 0 or self.recent < 1:
      raise ValueError(
        f"start={self.start} must not be negative and recent={self.recent} must be at least 1"
      )

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    distance = q.position - k.position
    return (distance >= 0) & ((distance < self.recent) | (k.position < self.start))

  def block(self, q: Span, k: Span) -> Block:
    at, of = q.position, k.position
    forgotten = (at.lo - of.hi >= self.recent) & (of.lo >= self.start)
    kept = (at.hi - of.lo < self.recent) | (of.hi < self.start)
    return Block(empty=(of.lo > at.hi) | forgotten, full=(of.hi <= at.lo) & kept)


ENTRY = Entry(
  make=SinkWindow, paper="arXiv:2309.17453", facts={"causal"}, tiny=dict(start=2, recent=3)
)
