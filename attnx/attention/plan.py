"""Plans: which tiles of pairs a mask leaves empty, which full, before any of them is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention.masks import Mask, Range, Span
from attnx.core.tokens import Tokens


EMPTY, PARTIAL, FULL = range(3)  # kinds of a tile


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a mask says of every tile: NumPy arrays where tokens are known on the host, else traced.

  Attributes:
    empty: (nq, nk) bool, no pair of the tile may meet; (#B, nq, nk) in `rows`.
    full: likewise, every pair may meet, and no token of the tile is padding.
  """

  empty: Any
  full: Any

  def kinds(self) -> Any:
    """EMPTY, PARTIAL or FULL for every tile, int32 of the same shape."""
    return 1 - self.empty.astype(np.int32) + self.full.astype(np.int32)


def tiles(mask: Mask, q_tokens: Tokens, k_tokens: Tokens, q_chunk: int, k_chunk: int) -> Plan:
  """One plan for all rows of the batch: a tile is empty or full only if it is so in each."""
  plan = rows(mask, q_tokens, k_tokens, q_chunk, k_chunk)
  empty = plan.empty.all(0)
  return Plan(empty=empty, full=plan.full.all(0) & ~empty)


def rows(mask: Mask, q_tokens: Tokens, k_tokens: Tokens, q_chunk: int, k_chunk: int) -> Plan:
  """The verdict of `mask` over all pairs of a chunk of queries and a chunk of keys.

  Costs a few integers for every tile, never an array of pairs.

  Args:
    mask: also given positions at run time; then the plan is traced.
    q_tokens, k_tokens: leaves (#B, T) and (#B, S), of whole chunks; see `pad`.
    q_chunk, k_chunk: tokens on each side of a tile.
  """
  q, q_any, q_all = spans(q_tokens, q_chunk)
  k, k_any, k_all = spans(k_tokens, k_chunk)
  line, column = lambda x: x[:, :, None], lambda x: x[:, None, :]
  block = mask.block(jax.tree.map(line, q), jax.tree.map(column, k))
  empty = block.empty | ~(line(q_any) & column(k_any))
  full = block.full & line(q_all) & column(k_all)
  return Plan(empty=empty, full=full & ~empty)


def spans(tokens: Tokens, chunk: int) -> tuple[Span, Any, Any]:
  """The ranges of each chunk of tokens, padding left out.

  Returns:
    A `Span` of arrays (#B, n), and whether any and whether all tokens of a chunk exist, (#B, n).
  """
  split = lambda x: x.reshape(x.shape[0], -1, chunk)
  leaves = [split(x) for x in (tokens.index, tokens.position, tokens.segment)]
  exists = leaves[1] >= 0
  some = exists.any(-1)
  return Span(*(_range(x, exists, some) for x in leaves)), some, exists.all(-1)


def _range(x: Any, exists: Any, some: Any) -> Range:
  """Smallest and largest of the tokens that exist; 0 .. 0 where none does."""
  xp: Any = np if isinstance(x, np.ndarray) and isinstance(exists, np.ndarray) else jnp
  limit = np.iinfo(x.dtype)
  lo = xp.where(exists, x, limit.max).min(-1)
  hi = xp.where(exists, x, limit.min).max(-1)
  return Range(xp.where(some, lo, 0), xp.where(some, hi, 0))


def pad(tokens: Tokens, length: int) -> Tokens:
  """`length` tokens, of which those after the given ones do not exist; NumPy stays NumPy."""
  missing = length - tokens.position.shape[1]
  if missing == 0:
    return tokens

  def extend(x, **how):
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    return xp.pad(x, ((0, 0), (0, missing)), **how)

  return dataclasses.replace(
    tokens,
    index=extend(tokens.index, mode="edge"),
    position=extend(tokens.position, constant_values=-1),
    segment=extend(tokens.segment, mode="edge"),
  )


@dataclasses.dataclass(frozen=True)
class Summary:
  """How much of the score matrix is visited.

  Attributes:
    q_chunk, k_chunk: size of a tile.
    empty, partial, full: number of tiles, or None while tokens are traced.
    pairs: pairs of tokens in the tiles that are visited; all of them while tokens are traced.
    pieces: how a kernel cuts a tile further; None where it does not.
  """

  q_chunk: int
  k_chunk: int
  empty: int | None
  partial: int | None
  full: int | None
  pairs: int
  pieces: str | None = None

  def __str__(self) -> str:
    size = f"tiles of {self.q_chunk} x {self.k_chunk}"
    size += f" in pieces of {self.pieces}" if self.pieces else ""
    if self.empty is None:
      return f"{size}: planned at run time"
    return f"{size}: {self.empty} empty, {self.partial} partial, {self.full} full"


def summary(spec, q, k, v, q_tokens: Tokens, k_tokens: Tokens) -> Summary:
  """The plan that the chunked path follows for a call; arrays may be shapes only."""
  bq, bk = chunks(spec, q, k, v, q_tokens, k_tokens)
  return outcome(spec.mask, q_tokens, k_tokens, bq, bk)


def outcome(mask: Mask, q_tokens: Tokens, k_tokens: Tokens, q_chunk: int, k_chunk: int) -> Summary:
  """What is left to visit with tiles of a size."""
  T, S = q_tokens.position.shape[1], k_tokens.position.shape[1]
  host = lambda tree: jax.tree.map(lambda x: x if _traced(x) else np.asarray(x), tree)
  sides = [(host(q_tokens), T, q_chunk), (host(k_tokens), S, k_chunk)]
  q, k = (pad(tokens, -(-length // chunk) * chunk) for tokens, length, chunk in sides)
  plan = tiles(host(mask), q, k, q_chunk, k_chunk)
  if _traced(plan.empty) or _traced(plan.full):
    return Summary(q_chunk, k_chunk, None, None, None, T * S)
  empty, full = np.asarray(plan.empty), np.asarray(plan.full)
  sizes = (np.minimum(n - np.arange(0, n, chunk), chunk) for _, n, chunk in sides)
  pairs = int((~empty * np.multiply.outer(*sizes)).sum())
  e, f = int(empty.sum()), int(full.sum())
  return Summary(q_chunk, k_chunk, e, empty.size - e - f, f, pairs)


def _traced(x: Any) -> bool:
  return isinstance(x, jax.core.Tracer)


def chunks(spec, q, k, v, q_tokens: Tokens, k_tokens: Tokens) -> tuple[int, int]:
  """Queries and keys of a tile, from the shapes of a call and what its mask leaves to visit.

  A tile holds about `SCORES` scores over all heads and rows of the batch, so that it stays in
  cache, but 128 to 1024 queries, so that its products are worth a call; half as many queries where
  that spares more pairs than the smaller products cost. A part of the spec that is an array of
  pairs itself lets tiles grow to its size. A normaliser that wants whole rows gets all keys at
  once, and fewer queries.
  """
  (B, T, N, _), S = q.shape, k.shape[1]
  scores = max(SCORES, *(np.size(x) for x in jax.tree.leaves((spec, 0))))
  if "row" in spec.needs:
    return even(T, max(1, scores // (B * N * S))), S
  k_chunk = even(S, KEYS)
  large = even(T, min(max(128, scores // (B * N * k_chunk)), 1024))
  small = even(T, max(128, large // 2))
  coarse, fine = (outcome(spec.mask, q_tokens, k_tokens, x, k_chunk).pairs for x in (large, small))
  return small if coarse > 1.1 * fine else large, k_chunk


SCORES, KEYS = 2**20, 256


def even(length: int, limit: int) -> int:
  """The size of the fewest equal chunks of at most `limit` that cover `length`, in steps of 8."""
  count = -(-length // limit)
  chunk = -(-length // count)
  return chunk if chunk <= 8 or count == 1 else min(-(-chunk // 8) * 8, limit)
