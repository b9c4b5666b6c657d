"""The first tokens and the last ones are kept, and positions are places in the cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnx.attention import attend
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.nn.kv_cache import Evicting, View, placed, seen_after


@struct.dataclass
class SinkCache(Evicting):
  """The first token of a row has slot 0; from `start` on slots are a ring.

  Attributes:
    key: (B, L, K, H), before positions.
    value: (B, L, K, V).
    position: (B, L) int32, where the tokens sit in the text; -1 marks an empty slot.
    segment: (B, L) int32.
    count: (B,) int32, tokens taken in.
    seen: (B,) int32.
    start: slots that are never given away.
  """

  key: jax.Array
  value: jax.Array
  position: jax.Array
  segment: jax.Array
  count: jax.Array
  seen: jax.Array
  start: int = struct.static(4)

  @property
  def room(self) -> int:
    return self.position.shape[1]

  def kept(self):
    return View(self.key, self.value, placed(self.position, self.segment))

  def take(self, q, k, v, tokens, *, spec, position, implementation):
    number, count = self.numbers(tokens)
    ring = self.start + (number - self.start) % (self.room - self.start)
    slot = jnp.where(number < self.start, number, ring)
    slot = jnp.where(number < 0, self.room, slot)  # beyond the last: dropped
    row = jnp.arange(slot.shape[0])[:, None]
    put = lambda slots, x: slots.at[row, slot].set(x.astype(slots.dtype), mode="drop")
    after = dataclasses.replace(
      self,
      key=put(self.key, k),
      value=put(self.value, v),
      position=put(self.position, tokens.position),
      segment=put(self.segment, tokens.segment),
      count=count,
      seen=seen_after(self.seen, tokens),
    )
    gone = jnp.maximum(count - self.room, 0)[:, None]
    q_tokens = placed(jnp.where(number < 0, -1, number - gone), tokens.segment)
    k_tokens = placed(after.ranks(), after.segment)
    key = after.key.astype(jnp.promote_types(after.key.dtype, q.dtype))
    heads = attend(
      position.query(q, q_tokens.position), position.key(key, k_tokens.position), after.value, spec,
      q_tokens=q_tokens, k_tokens=k_tokens, implementation=implementation,
    )  # fmt: skip
    return heads, after

  def ranks(self) -> jax.Array:
    """The place of each slot's token among those kept, in order of text, (B, L); -1 for none."""
    slot, count = jnp.arange(self.room), self.count[:, None]
    width = self.room - self.start
    last = slot + (count - 1 - slot) // width * width  # the last token that came to the slot
    rank = jnp.where(slot < self.start, slot, last - jnp.maximum(count - self.room, 0))
    return jnp.where(slot < count, rank, -1)


@dataclasses.dataclass(frozen=True)
class Sinks:
  """(k_j, v_j) for j <= start and for t - recent < j <= t, at positions 0 .. start + recent - 1.

  Attention of a model that was trained on short texts goes to the first tokens whatever they say;
  it breaks down when these leave a window. Here they stay, and the text between them and the window
  is cut out: a token's position is its rank among the tokens that are kept, so that no distance
  exceeds the size of the cache, however long the stream (arXiv:2309.17453).

  Keys are stored before positions are applied, and all of them get their ranks anew at each step.
  Every entry of `positions` that acts on queries and keys is served exactly, and masks and
  transforms see ranks too; what was added to embeddings cannot be moved. A call whose tokens all
  find room is one attention; beyond, each query has ranks of its own, and a prompt is taken token
  by token.

  Attributes:
    start: first tokens, never forgotten; the paper's 4 is enough for models without a learned sink.
    recent: last tokens, the newest included.
    dtype: what keys and values are stored as.
  """

  start: int = 4
  recent: int = 512
  dtype: str = "float32"

  def __post_init__(self):
    if self.start < 0 or self.recent < 1:
      raise ValueError(
        f"start={self.start} must not be negative and recent={self.recent} must be at least 1"
      )

  def empty(self, batch, length, heads, key_dim, value_dim) -> SinkCache:
    """start + recent slots, whatever `length` is: a stream has no end."""
    del length
    room = self.start + self.recent
    return SinkCache(
      key=jnp.zeros((batch, room, heads, key_dim), self.dtype),
      value=jnp.zeros((batch, room, heads, value_dim), self.dtype),
      position=jnp.full((batch, room), -1, jnp.int32),
      segment=jnp.zeros((batch, room), jnp.int32),
      count=jnp.zeros(batch, jnp.int32),
      seen=jnp.zeros(batch, jnp.int32),
      start=self.start,
    )


ENTRY = Entry(
  make=Sinks,
  paper="arXiv:2309.17453",
  facts={"constant_state", "masked:sink_window"},
  tiny=dict(start=2, recent=3),
)
