"""Sliding windows with gaps (Longformer)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnx.attention.masks import Block, Mask, Span
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class Dilated(Mask):
  """position_q - position_k = j d with -after <= j <= before: every d-th key near the query.

  A query sees itself, `before` keys behind and `after` ahead, at most d `before` positions away
  (arXiv:2004.05150). The window w of the paper is before = after = w, and (w, 0) where it is
  autoregressive.

  Attributes:
    before, after: keys seen on either side, not counting the query itself.
    dilation: d, or a tuple with one d for each of the N query heads.

  Raises:
    ValueError: a side is negative, or a dilation is not positive.
  """

  before: int = struct.static()
  after: int = struct.static(0)
  dilation: int | tuple[int, ...] = struct.static(2)

  def __post_init__(self):
    if self.before < 0 or self.after < 0:
      raise ValueError(f"before={self.before} and after={self.after} must not be negative")
    if min(self.steps, default=0) < 1:
      raise ValueError(f"dilation={self.dilation} must be at least 1, in every head")

  @property
  def steps(self) -> tuple[int, ...]:
    """The dilation of every head, or of all of them."""
    return (self.dilation,) if isinstance(self.dilation, int) else self.dilation

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    step: Any = self.steps[0]
    for head, other in enumerate(self.steps[1:], 1):  # no array is captured: kernels forbid it
      step = jnp.where(q.head == head, other, step)
    distance = q.position - k.position
    near = (distance <= self.before * step) & (distance >= -self.after * step)
    return near & (distance % step == 0)

  def block(self, q: Span, k: Span) -> Block:
    nearest = q.position.lo - k.position.hi
    farthest = q.position.hi - k.position.lo
    widest = max(self.steps)
    return Block(
      empty=(nearest > self.before * widest) | (farthest < -self.after * widest),
      full=(widest == 1) & (farthest <= self.before) & (nearest >= -self.after),
    )


def dilated(
  window: int, dilation: int | tuple[int, ...] = 2, causal: bool = True
) -> Dilated:
  """Itself and the window - 1 keys before it, d apart; not `causal`: window on each side."""
  if window < 1:
    raise ValueError(f"window={window} must be at least 1: a query sees itself")
  dilation = dilation if isinstance(dilation, int) else tuple(dilation)
  return Dilated(window - 1, 0, dilation) if causal else Dilated(window, window, dilation)


ENTRY = Entry(
  make=dilated,
  paper="arXiv:2004.05150",
  facts={"causal"},
  tiny=dict(window=3, dilation=(1, 2, 2, 3)),
)
