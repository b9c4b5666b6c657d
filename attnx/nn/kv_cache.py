"""Key-value caches: what a decoder remembers, and how the next tokens attend to it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from attnx.attention import AttentionSpec, attend
from attnx.core import struct
from attnx.core.tokens import Tokens
from attnx.core.varying import varying
from attnx.nn.position import Position


class View(NamedTuple):
  """Keys (B, L, K, H) and values (B, L, K, V) to attend to, and where they sit, leaves (B, L)."""

  key: jax.Array
  value: jax.Array
  tokens: Tokens


class Cache:
  """What decoding keeps of the keys and values that it has seen: a pytree of arrays.

  A cache either defines `append`, and is attended to like any keys, or has an `attend` of its own.
  The tokens of a row come in the order of their positions.

  Attributes:
    seen: (B,) int32, the position after the last token of each row.
  """

  seen: jax.Array

  def next(self, count: int) -> Tokens:
    """Where the next `count` tokens sit unless somebody says otherwise: after those seen."""
    position = self.seen[:, None] + jnp.arange(count, dtype=jnp.int32)
    return Tokens(index=position, position=position, segment=jnp.zeros_like(position))

  def kept(self) -> View:
    """What is remembered, as it is stored; a slot that holds nothing has position -1.

    The leaves of `tokens` are (B, K, L) where every key head remembers tokens of its own.
    """
    raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")

  def append(self, key: jax.Array, value: jax.Array, tokens: Tokens) -> tuple[View, Self]:
    """Takes in keys (B, t, K, H) and values (B, t, K, V) of t more tokens.

    Returns:
      All that the new tokens may attend to, themselves included, and the cache after them.
    """
    raise NotImplementedError(f"{type(self).__name__} has no keys apart from attending to them")

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    *,
    spec: AttentionSpec,
    position: Position,
    implementation: str = "auto",
  ) -> tuple[jax.Array, Self]:
    """Attention of t new tokens over what is remembered and themselves.

    Args:
      q, k, v: (B, t, N, H), (B, t, K, H), (B, t, K, V), without positions.
      tokens: where they sit; negative positions are padding, and leave no trace.
      spec: what to compute.
      position: what is done to queries and keys before they meet.
      implementation: as for `attnx.attention.attend`.

    Returns:
      heads (B, t, N, V), and the cache after these tokens.
    """
    q, k = position.query(q, tokens.position), position.key(k, tokens.position)
    view, after = self.append(k, v, tokens)
    heads = attend(
      q, view.key, view.value, spec,
      q_tokens=tokens, k_tokens=view.tokens, implementation=implementation,
    )  # fmt: skip
    return heads, after


BLOCK = 64  # tokens that stay together where slots are dealt out to shards


@struct.dataclass
class KVCache(Cache):
  """Slots of keys and values; the token at position p has slot p mod L, or that of `slot`.

  Attributes:
    key: (B, L, K, H).
    value: (B, L, K, V).
    position: (B, L) int32; -1 marks a slot that was never written.
    segment: (B, L) int32.
    seen: (B,) int32.
    rolling: False: there is room for every token, and positions from L on give NaN, since JAX
      cannot raise here. True: the last L tokens are kept; a call attends to what was kept before it
      and to its own tokens, however many, and forgets afterwards.
    shards: parts of L / shards slots each that take blocks of 64 tokens by turns, so that devices
      which hold a part each are as full as each other while a text grows.
  """

  key: jax.Array
  value: jax.Array
  position: jax.Array
  segment: jax.Array
  seen: jax.Array
  rolling: bool = struct.static(False)
  shards: int = struct.static(1)

  @classmethod
  def empty(
    cls,
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: Any = jnp.float32,
    rolling: bool = False,
    shards: int = 1,
  ) -> KVCache:
    """No tokens yet, and `length` slots, or more where shards take whole blocks."""
    if length < 1:
      raise ValueError(f"length={length} must be at least 1: a cache without slots keeps nothing")
    if shards < 1 or (rolling and shards > 1):
      raise ValueError(f"shards={shards} must be at least 1, and 1 where slots are taken anew")
    length += -length % (shards * BLOCK) if shards > 1 else 0
    return cls(
      key=jnp.zeros((batch, length, heads, key_dim), dtype),
      value=jnp.zeros((batch, length, heads, value_dim), dtype),
      position=jnp.full((batch, length), -1, jnp.int32),
      segment=jnp.zeros((batch, length), jnp.int32),
      seen=jnp.zeros(batch, jnp.int32),
      rolling=rolling,
      shards=shards,
    )

  def kept(self):
    return View(self.key, self.value, placed(self.position, self.segment))

  def append(self, key, value, tokens):
    batch, room = self.position.shape
    count = key.shape[1]
    if not self.rolling and count > room:
      raise ValueError(f"{count} tokens do not fit a cache of length={room}; make it longer")
    key, value = key.astype(self.key.dtype), value.astype(self.value.dtype)
    tokens = in_every_row(tokens, batch)
    seen = seen_after(self.seen, tokens)
    kept = (tokens.position >= 0) & (tokens.position >= seen[:, None] - room)
    slot = jnp.where(kept, self.slot(tokens.position), room)  # beyond the last: dropped
    put = lambda slots, x: slots.at[jnp.arange(batch)[:, None], slot].set(
      x.astype(slots.dtype), mode="drop"
    )
    if not self.rolling:
      lost = (tokens.position >= room)[..., None, None]
      value = jnp.where(lost.any(1, keepdims=True), jnp.nan, value)
    after = dataclasses.replace(
      self,
      key=put(self.key, key),
      value=put(self.value, value),
      position=put(self.position, tokens.position),
      segment=put(self.segment, tokens.segment),
      seen=seen,
    )
    if not self.rolling:
      return after.kept(), after
    join = lambda old, new: jnp.concatenate([old, new], axis=1)
    return jax.tree.map(join, self.kept(), View(key, value, tokens)), after

  def slot(self, position: jax.Array) -> jax.Array:
    """Where the token at a position has its keys and values."""
    room = self.position.shape[-1]
    if self.shards == 1:
      return position % room
    block, place = jnp.divmod(position, BLOCK)
    turn, shard = jnp.divmod(block, self.shards)
    return shard * (room // self.shards) + turn * BLOCK + place


class Evicting(Cache):
  """A cache that forgets one token for every new one as soon as its slots are taken.

  Whom it forgets, or where the others sit then, is settled anew for each query. Tokens that all
  find free slots are taken together, others one after the other: what comes out does not depend on
  the pieces in which a text arrives.

  Attributes:
    count: (B,) int32, how many tokens each row has taken in, those that it forgot included.
    room: number of slots.
  """

  count: jax.Array
  room: int

  def take(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    *,
    spec: AttentionSpec,
    position: Position,
    implementation: str,
  ) -> tuple[jax.Array, Self]:
    """`attend` for one token, or for several that all find free slots; leaves of tokens (B, t)."""
    raise NotImplementedError

  def attend(self, q, k, v, tokens, *, spec, position, implementation="auto"):
    options = dict(spec=spec, position=position, implementation=implementation)
    new = (q, k, v, in_every_row(tokens, q.shape[0]))
    together = lambda cache, new: cache.take(*new, **options)

    def one_by_one(cache, new):
      each = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], new)
      cache, heads = jax.lax.scan(lambda cache, new: together(cache, new)[::-1], cache, each)
      return jnp.moveaxis(heads[:, :, 0], 0, 1), cache

    def piece(cache, new):
      if (count := new[0].shape[1]) == 1:
        return together(cache, new)
      if count > self.room:  # a fresh cache has room for the first of them
        cut = lambda window: jax.tree.map(lambda x: x[:, window], new)
        first, cache = piece(cache, cut(slice(self.room)))
        rest, cache = one_by_one(cache, cut(slice(self.room, None)))
        return jnp.concatenate([first, rest], axis=1), cache
      fit = cache.count + (new[-1].position >= 0).sum(1) <= self.room
      return jax.lax.cond(fit.all(), together, one_by_one, cache, new)

    return piece(varying(self, new, spec), new)

  def numbers(self, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """The place of new tokens among all of their row, (B, t), -1 for padding; the next `count`."""
    live = (tokens.position >= 0).astype(jnp.int32)
    number = self.count[:, None] + live.cumsum(1, dtype=jnp.int32) - 1
    return jnp.where(live > 0, number, -1), self.count + live.sum(1, dtype=jnp.int32)


def placed(position: jax.Array, segment: jax.Array) -> Tokens:
  """Tokens at these positions, which are their places too."""
  return Tokens(index=jnp.maximum(position, 0), position=position, segment=segment)


def in_every_row(tokens: Tokens, batch: int) -> Tokens:
  """The same tokens with leaves (B, t) int32, in place of (#B, t)."""
  rows = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, x.shape[1]))
  return jax.tree.map(rows, tokens)


def seen_after(seen: jax.Array, tokens: Tokens) -> jax.Array:
  """(B,), the position after the last token of each row once these have been seen."""
  return jnp.maximum(seen, tokens.position.max(1) + 1).astype(jnp.int32)
