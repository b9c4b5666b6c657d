"""What a kernel is told of a plan: the tiles it visits, in order, and what lies beside them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = range(3)  # kinds of a tile, the two lowest bits of a visit
FIRST, LAST = 4, 8  # bits: the visit begins or ends the sums of a block


class Visits(NamedTuple):
  """The tiles of a plan in the order in which a kernel visits them, int32 (n,) each.

  Attributes:
    batch: what to add to the first grid index; zero where one list serves all rows of the batch.
    line: the block whose sums are made.
    at: the block that is added to them.
    flags: kind of the tile, with FIRST and LAST.
    count: how many there are, at most n; known only at run time where the plan is.
    shared: whether one list serves all rows of the batch.
  """

  batch: Any
  line: Any
  at: Any
  flags: Any
  count: Any
  shared: bool


def visits(kinds: Any, *, by_key: bool = False) -> Visits:
  """The tiles that are not EMPTY, line by line; a line that has none is visited once, to be zero.

  Args:
    kinds: EMPTY, PARTIAL or FULL, (#B, nq, nk) int32: a NumPy array where it is known, else traced.
    by_key: lines are blocks of keys and not of queries.
  """
  xp: Any = np if isinstance(kinds, np.ndarray) else jnp
  kinds = xp.swapaxes(kinds, 1, 2) if by_key else kinds
  B, lines, length = kinds.shape
  nothing = ~(kinds > EMPTY).any(-1, keepdims=True)
  wanted = ((kinds > EMPTY) | (nothing & (xp.arange(length) == 0))).reshape(-1)
  count = wanted.sum()
  order = xp.argsort(~wanted, stable=True)
  if xp is np:
    count = int(count)
    order = order[:count]
  line = order // length
  changes = line[1:] != line[:-1]
  edge = xp.ones((1,), bool)
  first = xp.concatenate([edge, changes])
  last = xp.concatenate([changes, edge]) | (xp.arange(order.size) == count - 1)
  flags = kinds.reshape(-1)[order] + FIRST * first + LAST * last
  lists = (line // lines, line % lines, order % length, flags)
  batch, line, at, flags = (x.astype(np.int32) for x in lists)
  return Visits(batch, line, at, flags, count, B == 1)


@dataclasses.dataclass(frozen=True)
class Operand:
  """An array beside queries, keys and values: (#B, #N, #T, X), float32 or int32.

  Attributes:
    pairs: whether the last axis runs along the keys, X = #S; otherwise a row is handed over whole.
  """

  pairs: bool = False


def occurring(kinds) -> tuple[bool, bool]:
  """Whether a plan may hold FULL and PARTIAL tiles."""
  if not isinstance(kinds, np.ndarray):
    return True, True
  return bool((kinds == FULL).any()), bool((kinds == PARTIAL).any())
