"""Keys and values lie in pages of one pool, which rows take as they grow (vLLM)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.registry import Entry
from attnx.nn.kv_cache import Cache, View, in_every_row, placed, seen_after


@struct.dataclass
class PagedCache(Cache):
  """M pages of P slots; the token at position p of row b has slot p mod P of page table[b, p // P].

  The table is all the bookkeeping there is: a page that no row names is free, one that several rows
  name is shared, and is copied before one of them writes to it.

  Attributes:
    key: (M, P, K, H).
    value: (M, P, K, V).
    position: (M, P) int32; -1 marks an empty slot.
    segment: (M, P) int32.
    table: (B, L / P) int32, pages of each row; M stands for none.
    seen: (B,) int32.
    lost: (B,) bool, rows with tokens that found no page; what they attend to is NaN, since JAX
      cannot raise here, until they are released.
  """

  key: jax.Array
  value: jax.Array
  position: jax.Array
  segment: jax.Array
  table: jax.Array
  seen: jax.Array
  lost: jax.Array

  def kept(self):
    read = lambda pool, fill: pool.at[self.table].get(mode="fill", fill_value=fill)
    rows = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    where = placed(rows(read(self.position, -1)), rows(read(self.segment, 0)))
    # A page that is free may hold anything, and 0 times that is not 0.
    held = lambda x: jnp.where((where.position >= 0)[..., None, None], rows(read(x, 0)), 0)
    return View(held(self.key), held(self.value), where)

  def append(self, key, value, tokens):
    room, count = self.table.shape[1] * self.position.shape[1], key.shape[1]
    if count > room:
      raise ValueError(f"{count} tokens do not fit rows of at most {room}; make the cache longer")
    tokens = in_every_row(tokens, self.table.shape[0])
    ready, page, slot = self.prepared(tokens.position)
    put = lambda pool, x: pool.at[page, slot].set(x.astype(pool.dtype), mode="drop")
    after = dataclasses.replace(
      ready,
      key=put(ready.key, key),
      value=put(ready.value, value),
      position=put(ready.position, tokens.position),
      segment=put(ready.segment, tokens.segment),
      seen=seen_after(self.seen, tokens),
      lost=self.lost | ((tokens.position >= 0) & (page == self.key.shape[0])).any(1),
    )
    # A row that lost a token sees NaN alone, wherever its new tokens sit.
    lost, view = after.lost[:, None], after.kept()
    near = lambda x, new: jnp.where(lost, new[:, jnp.arange(room) % count], x)
    value = jnp.where(lost[..., None, None], jnp.nan, view.value)
    return View(view.key, value, jax.tree.map(near, view.tokens, tokens)), after

  def prepared(self, position: jax.Array) -> tuple[PagedCache, jax.Array, jax.Array]:
    """The cache with pages, which no other row names, for tokens at these positions (B, t).

    Returns:
      The cache, and the page and slot of each token, (B, t); page M where there is none.
    """
    (B, columns), (M, P) = self.table.shape, self.position.shape
    row = jnp.arange(B)[:, None]
    served = (position >= 0) & ~self.lost[:, None]
    column = jnp.where(served, position // P, columns)  # beyond the last: dropped
    wanted = jnp.zeros((B, columns), bool).at[row, column].set(True, mode="drop")
    used = jnp.zeros(M, jnp.int32).at[self.table].add(1, mode="drop")
    written = jnp.where(wanted, self.table, M)
    writers = jnp.zeros(M, jnp.int32).at[written].add(1, mode="drop")
    heir = jnp.full(M, -1, jnp.int32).at[written].max(row, mode="drop")
    heir = jnp.where(used == writers, heir, -1)  # where all write, one may keep the page
    new = wanted & (heir.at[written].get(mode="fill", fill_value=-1) != row)

    # The n-th new page is the n-th free one.
    free = jnp.argsort(used > 0, stable=True)
    nth = (new.cumsum() - 1).reshape(new.shape)
    given = jnp.where(nth < (used == 0).sum(), free[jnp.minimum(nth, M - 1)], M)
    table = jnp.where(new, given, self.table)
    # At most one page of a row is shared and grows, the first that is written to.
    first = new.argmax(1)[:, None]
    old = jnp.where(new.any(1, keepdims=True), jnp.take_along_axis(self.table, first, 1), M)
    copy = jnp.where(old < M, jnp.take_along_axis(table, first, 1), M)[:, 0]
    empty = self.position.at[jnp.where(new, given, M)].set(-1, mode="drop")

    def copied(pool, into):
      return into.at[copy].set(pool[jnp.minimum(old[:, 0], M - 1)], mode="drop")

    ready = dataclasses.replace(
      self,
      table=table,
      key=copied(self.key, self.key),
      value=copied(self.value, self.value),
      position=copied(self.position, empty),
      segment=copied(self.segment, self.segment),
    )
    page = table.at[row, column].get(mode="fill", fill_value=M)
    return ready, page, jnp.maximum(position, 0) % P

  def release(self, rows: jax.Array) -> PagedCache:
    """Rows (B,) bool that begin anew; pages that nobody else names are free again."""
    return dataclasses.replace(
      self,
      table=jnp.where(rows[:, None], self.position.shape[0], self.table),
      seen=jnp.where(rows, 0, self.seen),
      lost=self.lost & ~rows,
    )

  def fork(self, parents: jax.Array) -> PagedCache:
    """Row b goes on from row parents[b], (B,) int32, whose pages it shares: beams and samples."""
    new = {name: getattr(self, name)[parents] for name in ("table", "seen", "lost")}
    return dataclasses.replace(self, **new)


@dataclasses.dataclass(frozen=True)
class Paged:
  """(k_1, v_1), ..., (k_t, v_t), page by page: exact, and no row reserves what it may never need.

  Rows of any lengths share a pool; a row takes a page when its text reaches it, so that it wastes
  less than a page, and gives its pages back when it ends (arXiv:2309.06180). `release` frees rows
  and `fork` shares them; a shared page is copied when a row first writes to it. All of that is
  integer arithmetic on the table, under jit, and no size ever changes.

  Attention gathers the pages of a row in order of its table, and is then that of any keys. Keys are
  stored with positions. Each layer has a pool and a table of its own.

  Attributes:
    page: slots of a page, P.
    pages: pages of the pool, M; None makes room for all rows at full length.
    dtype: what keys and values are stored as.
  """

  page: int = 16
  pages: int | None = None
  dtype: str = "float32"

  def __post_init__(self):
    if self.page < 1 or (self.pages is not None and self.pages < 1):
      raise ValueError(f"page={self.page} and pages={self.pages} must be at least 1")

  def empty(self, batch, length, heads, key_dim, value_dim) -> PagedCache:
    """No page is taken; a row may grow to `length` tokens, rounded up to whole pages."""
    if length < 1:
      raise ValueError(f"length={length} must be at least 1: a cache without slots keeps nothing")
    columns = -(-length // self.page)
    pages = batch * columns if self.pages is None else self.pages
    return PagedCache(
      key=jnp.zeros((pages, self.page, heads, key_dim), self.dtype),
      value=jnp.zeros((pages, self.page, heads, value_dim), self.dtype),
      position=jnp.full((pages, self.page), -1, jnp.int32),
      segment=jnp.zeros((pages, self.page), jnp.int32),
      table=jnp.full((batch, columns), pages, jnp.int32),
      seen=jnp.zeros(batch, jnp.int32),
      lost=jnp.zeros(batch, bool),
    )


ENTRY = Entry(make=Paged, paper="arXiv:2309.06180", facts={"exact"}, tiny=dict(page=4))
