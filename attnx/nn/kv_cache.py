"""Key-value caches: what a decoder remembers, and how the next tokens attend to it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from attnx.attention import AttentionSpec, attend
from attnx.core import struct
from attnx.core.tokens import Tokens
from attnx.nn.position import Position


class View(NamedTuple):
  """Keys (B, L, K, H) and values (B, L, K, V) to attend to, and where they sit, leaves (B, L)."""

  key: jax.Array
  value: jax.Array
  tokens: Tokens


class Cache:
  """What decoding keeps of the keys and values that it has seen: a pytree of arrays.

  A cache either defines `append`, and is attended to like any keys, or has an `attend` of its own.

  Attributes:
    seen: (B,) int32, the position after the last token of each row.
  """

  seen: jax.Array

  def next(self, count: int) -> Tokens:
    """Where the next `count` tokens sit unless somebody says otherwise: after those seen."""
    position = self.seen[:, None] + jnp.arange(count, dtype=jnp.int32)
    return Tokens(index=position, position=position, segment=jnp.zeros_like(position))

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


@struct.dataclass
class KVCache(Cache):
  """Slots of keys and values; the token at position p has slot p mod L.

  Attributes:
    key: (B, L, K, H).
    value: (B, L, K, V).
    position: (B, L) int32; -1 marks a slot that was never written.
    segment: (B, L) int32.
    seen: (B,) int32.
    rolling: False: there is room for every token, and positions from L on give NaN, since JAX
      cannot raise here. True: the last L tokens are kept; a call attends to what was kept before it
      and to its own tokens, however many, and forgets afterwards.
  """

  key: jax.Array
  value: jax.Array
  position: jax.Array
  segment: jax.Array
  seen: jax.Array
  rolling: bool = struct.static(False)

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
  ) -> KVCache:
    """No tokens yet, and `length` slots."""
    if length < 1:
      raise ValueError(f"length={length} must be at least 1: a cache without slots keeps nothing")
    return cls(
      key=jnp.zeros((batch, length, heads, key_dim), dtype),
      value=jnp.zeros((batch, length, heads, value_dim), dtype),
      position=jnp.full((batch, length), -1, jnp.int32),
      segment=jnp.zeros((batch, length), jnp.int32),
      seen=jnp.zeros(batch, jnp.int32),
      rolling=rolling,
    )

  def tokens(self) -> Tokens:
    """Where the slots' tokens sit."""
    return Tokens(index=jnp.maximum(self.position, 0), position=self.position, segment=self.segment)

  def append(self, key, value, tokens):
    batch, room = self.position.shape
    count = key.shape[1]
    if not self.rolling and count > room:
      raise ValueError(f"{count} tokens do not fit a cache of length={room}; make it longer")
    key, value = key.astype(self.key.dtype), value.astype(self.value.dtype)
    tokens = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, count)), tokens)
    seen = jnp.maximum(self.seen, tokens.position.max(1) + 1).astype(jnp.int32)
    kept = (tokens.position >= 0) & (tokens.position >= seen[:, None] - room)
    slot = jnp.where(kept, tokens.position % room, room)  # beyond the last: dropped
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
      return View(after.key, after.value, after.tokens()), after
    join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
    where = jax.tree.map(join, self.tokens(), tokens)
    return View(join(self.key, key), join(self.value, value), where), after
