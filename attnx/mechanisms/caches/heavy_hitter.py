"""The last tokens are kept, and of the others those that have been looked at most (H2O)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnx.attention import reference
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.kv_cache import Evicting, View, seen_after


@struct.dataclass
class HeadTokens(Tokens):
  """Where keys sit when every head has keys of its own: leaves (B, N, S)."""

  def columns(self) -> Tokens:
    return Tokens(*(x[:, :, None] for x in (self.index, self.position, self.segment)))


@struct.dataclass
class HeavyHitterCache(Evicting):
  """Slots that each key head fills with tokens of its own.

  Attributes:
    key: (B, L, K, H), with positions.
    value: (B, L, K, V).
    position: (B, K, L) int32; -1 marks an empty slot.
    segment: (B, K, L) int32.
    mass: (B, K, L) float32, weight that the token of a slot has received so far.
    count: (B,) int32, tokens taken in.
    seen: (B,) int32.
    recent: how many of the last positions are safe.
  """

  key: jax.Array
  value: jax.Array
  position: jax.Array
  segment: jax.Array
  mass: jax.Array
  count: jax.Array
  seen: jax.Array
  recent: int = struct.static()

  @property
  def room(self) -> int:
    return self.position.shape[2]

  def kept(self):
    where = HeadTokens(jnp.maximum(self.position, 0), self.position, self.segment)
    return View(self.key, self.value, where)

  def take(self, q, k, v, tokens, *, spec, position, implementation):
    if implementation not in ("auto", "reference"):
      raise NotImplementedError(
        f"implementation={implementation!r} shows no weights, which a heavy hitter is chosen by;"
        " give 'auto' or 'reference'"
      )
    q, k = position.query(q, tokens.position), position.key(k, tokens.position)
    view = self.joined(k, v, tokens)
    columns = jax.tree.map(lambda x: jnp.repeat(x, q.shape[2] // k.shape[2], axis=1), view.tokens)
    heads = spec.finish(reference.partial(q, view.key, view.value, spec, tokens, columns))
    # Of the same products as above, which a compiler forms once.
    weights = jnp.abs(reference.weights(q, view.key, spec, tokens, columns))
    received = weights.reshape(*self.mass.shape[:2], -1, weights.shape[-1]).sum(2)
    mass = jnp.pad(self.mass, ((0, 0), (0, 0), (0, k.shape[1]))) + received.astype(jnp.float32)
    return heads.astype(self.value.dtype), self.after(k, v, tokens, mass, view.tokens.position)

  def joined(self, k, v, tokens: Tokens) -> View:
    """What is kept and, after it, the t new tokens: L + t of each."""
    each = lambda x: jnp.repeat(x[:, None], self.mass.shape[1], axis=1)
    new = HeadTokens(each(tokens.index), each(tokens.position), each(tokens.segment))
    join = lambda axis: lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis)
    old = self.kept()
    where = jax.tree.map(join(2), old.tokens, new)
    return View(join(1)(old.key, k), join(1)(old.value, v), where)

  def after(self, k, v, tokens: Tokens, mass: jax.Array, position: jax.Array) -> HeavyHitterCache:
    """The cache with the new tokens in free slots, or in the slots of those that are forgotten.

    Args:
      k, v, tokens: of the t new tokens.
      mass, position: of the old and the new tokens, (B, K, L + t).
    """
    number, count = self.numbers(tokens)
    B, heads, _ = self.mass.shape
    free = jnp.broadcast_to(number[:, None], (B, heads, number.shape[1]))
    slot = jnp.where(free < self.room, free, self.victim(mass, position)[..., None])
    slot = jnp.where(free < 0, self.room, slot)  # beyond the last: dropped
    row, head = jnp.arange(B)[:, None, None], jnp.arange(heads)[:, None]
    put = lambda slots, x: slots.at[row, head, slot].set(x, mode="drop")
    fill = lambda slots, x: slots.at[row, slot, head].set(
      jnp.swapaxes(x, 1, 2).astype(slots.dtype), mode="drop"
    )
    each = lambda x: jnp.broadcast_to(x[:, None], slot.shape)
    return dataclasses.replace(
      self,
      key=fill(self.key, k),
      value=fill(self.value, v),
      position=put(self.position, each(tokens.position)),
      segment=put(self.segment, each(tokens.segment)),
      mass=put(mass[..., : self.room], mass[..., self.room :]),
      count=count,
      seen=seen_after(self.seen, tokens),
    )

  def victim(self, mass: jax.Array, position: jax.Array) -> jax.Array:
    """The slot (B, K) of the least mass among tokens that are not recent, the oldest on a tie."""
    newest = position.max(-1, keepdims=True)
    safe = position > newest - self.recent
    mass = jnp.where(safe, jnp.inf, mass)
    least = mass == mass.min(-1, keepdims=True)
    return jnp.where(least, position, jnp.iinfo(jnp.int32).max).argmin(-1)


@dataclasses.dataclass(frozen=True)
class HeavyHitter:
  """(k_j, v_j) for the last tokens, and for those of the greatest sum_i w_ij over queries i so far.

  Each key head keeps `recent` + `heavy` tokens. A new token is attended to and attends with all of
  them; then its weights are added to their masses, |w| summed over the query heads of the group;
  then, if there is one token too many, the one of the least mass that is not recent goes, with its
  mass, for good (arXiv:2306.14048, algorithm 1). On a tie the oldest goes.

  Keys are stored with positions, which stay those of the text, so that any entry of `positions` may
  be used. Prompts follow the same rule: tokens that find room are one attention, whose (t, L + t)
  weights exist at once; beyond, they are taken one by one. A release of the authors instead lets a
  prompt see all of itself and forgets once at its end; that depends on where prompts are cut.

  Attributes:
    heavy: tokens that are kept for their mass.
    recent: last positions, the newest included, that are kept whatever their mass.
    dtype: what keys and values are stored as.
  """

  heavy: int
  recent: int
  dtype: str = "float32"

  def __post_init__(self):
    if self.heavy < 0 or self.recent < 0 or self.heavy + self.recent < 1:
      raise ValueError(
        f"heavy={self.heavy} and recent={self.recent} must not be negative, and not both 0"
      )

  def empty(self, batch, length, heads, key_dim, value_dim) -> HeavyHitterCache:
    """heavy + recent slots for each key head, whatever `length` is."""
    del length
    room = self.heavy + self.recent
    return HeavyHitterCache(
      key=jnp.zeros((batch, room, heads, key_dim), self.dtype),
      value=jnp.zeros((batch, room, heads, value_dim), self.dtype),
      position=jnp.full((batch, heads, room), -1, jnp.int32),
      segment=jnp.zeros((batch, heads, room), jnp.int32),
      mass=jnp.zeros((batch, heads, room), jnp.float32),
      count=jnp.zeros(batch, jnp.int32),
      seen=jnp.zeros(batch, jnp.int32),
      recent=self.recent,
    )


ENTRY = Entry(
  make=HeavyHitter,
  paper="arXiv:2306.14048",
  facts={"constant_state"},
  tiny=dict(heavy=2, recent=3),
)
