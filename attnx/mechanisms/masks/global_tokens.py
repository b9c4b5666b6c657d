"""A few tokens that see all and are seen by all (Longformer, BigBird)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.masks import Block, Mask, Span
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class GlobalTokens(Mask):
  """position_q < first or position_k < first.

  Meant for `Window(w, w) | GlobalTokens(g)`, the pattern of arXiv:2004.05150 and 2007.14062. The
  second set of projections that Longformer has for the rows of global tokens is not a mask.

  Attributes:
    first: the tokens at the beginning of each text that are global.
  """

  first: int = struct.static(1)

  def __post_init__(self):
    if self.first < 0:
      raise ValueError(f"first={self.first} must not be negative")

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return (q.position < self.first) | (k.position < self.first)

  def block(self, q: Span, k: Span) -> Block:
    at, of = q.position, k.position
    return Block(
      empty=(at.lo >= self.first) & (of.lo >= self.first),
      full=(at.hi < self.first) | (of.hi < self.first),
    )


@struct.dataclass
class ChosenTokens(Mask):
  """chosen[b, position_q] or chosen[b, position_k]: global tokens that differ between rows.

  Attributes:
    chosen: bool (#B, L); positions from L on are not global.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"index"})

  chosen: jax.Array

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return self._of(q.position, q.batch) | self._of(k.position, q.batch)

  def _of(self, position: jax.Array, batch: jax.Array | None) -> jax.Array:
    rows, length = self.chosen.shape
    inside = (position >= 0) & (position < length)
    place = jnp.clip(position, 0, length - 1)
    return inside & jnp.asarray(self.chosen)[0 if rows == 1 else batch, place]


def global_tokens(
  first: int | None = None, chosen: jax.Array | None = None
) -> GlobalTokens | ChosenTokens:
  """The `first` tokens of each text (default 1), or those `chosen` (#B, L)."""
  if first is not None and chosen is not None:
    raise ValueError(f"first={first} and chosen exclude each other; give one of them")
  return GlobalTokens(1 if first is None else first) if chosen is None else ChosenTokens(chosen)


ENTRY = Entry(make=global_tokens, paper="arXiv:2004.05150", tiny=dict(first=2))
