"""Masks: relations between a query token and a key token, closed under `&`, `|` and `~`."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.lookup import Tile
from attnx.core.tokens import Tokens

Bool = Any  # a bool, or a NumPy or JAX array of them: whatever comparing the ends of spans gives


class Block(NamedTuple):
  """What a mask says about a whole tile of pairs: EMPTY, PARTIAL (neither) or FULL.

  The two answers are made of comparisons and combined by `|` and `&` alone, so that one piece of
  code plans one tile with Python numbers, all tiles with NumPy before compilation, and all tiles
  with traced arrays when positions are only known at run time.

  Attributes:
    empty: no pair may meet: skip the tile.
    full: every pair may meet: skip the mask.
  """

  empty: Bool
  full: Bool


EMPTY = Block(empty=True, full=False)
PARTIAL = Block(empty=False, full=False)  # unknown: evaluate the mask on the tile
FULL = Block(empty=False, full=True)


class Range(NamedTuple):
  """lo .. hi, both ends included."""

  lo: Any
  hi: Any


@struct.dataclass
class Span:
  """The ranges that the tokens on one side of a tile stay within; padding is left out of them."""

  index: Range
  position: Range
  segment: Range


class Mask:
  """Decides which pairs may meet.

  `__call__` answers for tokens, `block` answers for tiles. `block` may always answer PARTIAL; when
  it answers EMPTY or FULL it must agree with `__call__` on every pair of the tile.
  """

  needs: ClassVar[frozenset[str]] = frozenset()

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    raise NotImplementedError

  def block(self, q: Span, k: Span) -> Block:
    del q, k
    return PARTIAL

  def beside(self, q: Tokens) -> Mask:
    """The same mask for these queries, with its arrays laid out along them as a `Table`.

    Kernels ask for it, since their tiles cannot gather; see `attnx.core.lookup`.
    """
    return self

  def __and__(self, other: Mask) -> Mask:
    return And(self, other)

  def __or__(self, other: Mask) -> Mask:
    return Or(self, other)

  def __invert__(self) -> Mask:
    return Not(self)


@struct.dataclass
class Everything(Mask):
  """Every pair."""

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return jnp.ones((), bool)

  def block(self, q: Span, k: Span) -> Block:
    return FULL


@struct.dataclass
class Causal(Mask):
  """position_k <= position_q: keys that are not later than the query."""

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return k.position <= q.position

  def block(self, q: Span, k: Span) -> Block:
    at, of = q.position, k.position
    return Block(empty=of.lo > at.hi, full=of.hi <= at.lo)


@struct.dataclass
class Window(Mask):
  """-after <= position_q - position_k <= before: keys near the query.

  Attributes:
    before: how far back a query sees; 0 is itself alone.
    after: how far ahead; 0 makes the window causal.
  """

  before: int = struct.static()
  after: int = struct.static(0)

  def __post_init__(self):
    if self.before < 0 or self.after < 0:
      raise ValueError(f"before={self.before} and after={self.after} must not be negative")

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    first, last = q.position - self.before, q.position + self.after  # a pair costs no difference
    return (first <= k.position) & (k.position <= last)

  def block(self, q: Span, k: Span) -> Block:
    nearest = q.position.lo - k.position.hi  # the smallest and the largest q - k of the tile
    farthest = q.position.hi - k.position.lo
    return Block(
      empty=(nearest > self.before) | (farthest < -self.after),
      full=(farthest <= self.before) & (nearest >= -self.after),
    )


@struct.dataclass
class Dense(Mask):
  """visible[b, n, t, s], an array indexed by place that broadcasts to (B, N, T, S)."""

  needs: ClassVar[frozenset[str]] = frozenset({"index"})

  visible: jax.Array

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return pick(self.visible, q, k)

  @property
  def by_place(self) -> tuple[str, jax.Array]:
    """The array that is indexed by place, for `attend` to check."""
    return "mask", self.visible


def pick(array: jax.Array | Tile, q: Tokens, k: Tokens) -> jax.Array:
  """The entries of a dense (#B, #N, #T, #S) array that belong to a tile of tokens."""
  if isinstance(array, Tile):  # a kernel has them already
    return array.values
  ids = [q.batch, q.head, q.index, k.index]
  at = tuple(0 if size == 1 else i for size, i in zip(array.shape, ids, strict=True))
  return jnp.asarray(array)[at]


@struct.dataclass
class And(Mask):
  """Pairs that both masks let meet."""

  left: Mask
  right: Mask

  @property
  def needs(self) -> frozenset[str]:
    return self.left.needs | self.right.needs

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return self.left(q, k) & self.right(q, k)

  def block(self, q: Span, k: Span) -> Block:
    a, b = self.left.block(q, k), self.right.block(q, k)
    return Block(empty=a.empty | b.empty, full=a.full & b.full)


@struct.dataclass
class Or(Mask):
  """Pairs that either mask lets meet."""

  left: Mask
  right: Mask

  @property
  def needs(self) -> frozenset[str]:
    return self.left.needs | self.right.needs

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return self.left(q, k) | self.right(q, k)

  def block(self, q: Span, k: Span) -> Block:
    a, b = self.left.block(q, k), self.right.block(q, k)
    return Block(empty=a.empty & b.empty, full=a.full | b.full)


@struct.dataclass
class Not(Mask):
  """Pairs that a mask keeps apart."""

  inner: Mask

  @property
  def needs(self) -> frozenset[str]:
    return self.inner.needs

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return ~self.inner(q, k)

  def block(self, q: Span, k: Span) -> Block:
    inner = self.inner.block(q, k)
    return Block(empty=inner.full, full=inner.empty)
