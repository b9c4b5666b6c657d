"""Softmax attention over keys of few values, as a recurrence (arXiv:2309.16354)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.recurrence import chunks


@struct.dataclass
class Keys:
  """Quantised keys one by one.

  Attributes:
    key: (B, S, K, H).
    value: (B, S, K, V).
    code: (B, S, K) int32, of R codes.
    position: (B, S) int32, negative where there is none.
  """

  key: jax.Array
  value: jax.Array
  code: jax.Array
  position: jax.Array

  def __add__(self, later: Keys) -> Keys:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, later)

  def __getitem__(self, window: slice) -> Keys:
    return jax.tree.map(lambda x: x[:, window], self)


@struct.dataclass
class Relative:
  """b_d = (q + shift) . embedding_d for distances 0 <= d <= M, and 0 beyond.

  Attributes:
    embedding: (M + 1, K, H).
    shift: (N, H).
  """

  embedding: jax.Array
  shift: jax.Array

  def __call__(self, q: jax.Array, q_position: jax.Array, k_position: jax.Array) -> jax.Array:
    """Queries (B, T, N, H) and keys at positions (B, T) and (B, S) to (B, K, N / K, T, S)."""
    last = self.embedding.shape[0] - 1
    products = jnp.einsum("btkgh,dkh->bkgtd", *by_key(q + self.shift, self.embedding))
    distance = (q_position[:, :, None] - k_position[:, None])[:, None, None]
    at = jnp.broadcast_to(jnp.clip(distance, 0, last), (*products.shape[:-1], distance.shape[-1]))
    near = (distance >= 0) & (distance <= last)
    return jnp.where(near, jnp.take_along_axis(products, at, axis=-1), 0.0)


@struct.dataclass
class Past:
  """What a block knows of the tokens before it, all of one document.

  Attributes:
    recent: the last M keys.
    mean: (B, R, K, V), for each code the mean of the values of older keys.
    count: (B, R, K), how many those are.
    segment: (B,) int32, the document.
    seen: (B,) int32, the position after the last token.
  """

  recent: Keys
  mean: jax.Array
  count: jax.Array
  segment: jax.Array
  seen: jax.Array

  @classmethod
  def empty(
    cls, batch: int, memory: int, codewords: tuple[int, ...], width: int, dtype: Any
  ) -> Past:
    """No tokens, with room for M = `memory` keys of (K, R, H) codewords and values of a width."""
    K, R, H = codewords
    zero = lambda *shape: jnp.zeros((batch, *shape), dtype)
    none = jnp.zeros(batch, jnp.int32)
    code = jnp.zeros((batch, memory, K), jnp.int32)
    recent = Keys(zero(memory, K, H), zero(memory, K, width), code, code[..., 0] - 1)
    return cls(recent, zero(R, K, width), zero(R, K), segment=none, seen=none)


def quantised_attention(
  q: jax.Array,
  keys: Keys,
  segment: jax.Array,
  codewords: jax.Array,
  relative: Relative,
  past: Past,
  *,
  block: int = 512,
  gaps: bool = True,
) -> tuple[jax.Array, Past]:
  """softmax_s(q_t . k_s + b_{t - s}) v_s over s <= t of one document, in O(T (block + M + R)).

  Keys that have one code and are further away than M have one score, so that the number of a code
  and the mean of its values stand for them, with log(number) added to the score: exactly what the
  quadratic form gives. A query meets the keys of its block and the M before the block one by one.
  The gradient of a key comes from the queries that meet it so; that of a value from all.

  Args:
    q: (B, T, N, H), scaled.
    keys: of the same T tokens, K dividing N.
    segment: (B, T), documents; where the id changes nothing before is seen.
    codewords: (K, R, H), of which `keys.key` are those of `keys.code`.
    relative: b, for the last M distances.
    past: before the first token.
    block: tokens handled at once.
    gaps: whether a token may be missing, at a negative position.

  Returns:
    (B, T, N, V) in the dtype of the values, zero where no token is, and the past after them.
  """
  (B, T, N, _), V = q.shape, keys.value.shape[-1]
  whole, heads = T - T % block, []
  body = functools.partial(_block, gaps=gaps)
  for a, b, size in ((0, whole, block), (whole, T, T - whole)):
    if a < b:
      xs = jax.tree.map(lambda x: chunks.cut(x[:, a:b], size), (q, keys, segment))
      past, out = chunks.scan(body, past, xs, consts=(codewords, relative))
      heads.append(chunks.join(out, b - a))
  return jnp.concatenate(heads, axis=1).reshape(B, T, N, V), past


def quantised_weights(
  q: jax.Array, key: jax.Array, position: jax.Array, segment: jax.Array, relative: Relative
) -> jax.Array:
  """The weights (B, N, T, T) of `quantised_attention` without a past. Materialises them."""
  _, run = _runs(position, segment, segment[:, 0])
  scores = jnp.einsum("btkgh,bskh->bkgts", *by_key(q, key)) + relative(q, position, position)
  weights = _softmax(scores, _meets(position, run, position, run))
  return weights.reshape(q.shape[0], q.shape[2], *weights.shape[3:])


def by_key(q: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Queries (B, T, N, H) as (B, T, K, N / K, H), for keys (.., K, H)."""
  return q.reshape(*q.shape[:2], key.shape[-2], -1, q.shape[-1]), key


def _block(past: Past, xs, codewords: jax.Array, relative: Relative, *, gaps: bool):
  """One block: the past after it, and its outputs (B, C, N, V)."""
  q, own, segment = xs
  segment, run = _runs(own.position, segment, past.segment)
  keys = past.recent + own
  k_run = jnp.concatenate([jnp.zeros_like(past.recent.position), run], axis=1)
  near = jnp.einsum("btkgh,bskh->bkgts", *by_key(q, keys.key))
  near += relative(q, own.position, keys.position)
  count = jnp.moveaxis(past.count, 1, 2)[:, :, None, None]  # (B, K, 1, 1, R)
  grouped = by_key(q, keys.key)[0]
  far = jnp.einsum("btkgh,krh->bkgtr", grouped, codewords) + jnp.log(jnp.maximum(count, 1.0))
  meets = _meets(own.position, run, keys.position, k_run)
  enters = ((run == 0) & (own.position >= 0))[:, None, None, :, None] & (count > 0)
  both = lambda a, b: jnp.concatenate(
    [jnp.broadcast_to(a, near.shape), jnp.broadcast_to(b, far.shape)], axis=-1
  )
  weights = _softmax(both(near, far), both(meets, enters))
  near, far = jnp.split(weights, [near.shape[-1]], axis=-1)
  out = jnp.einsum("bkgts,bskv->btkgv", near, keys.value.astype(near.dtype))
  out += jnp.einsum("bkgtr,brkv->btkgv", far, past.mean)
  out = out.reshape(*q.shape[:3], -1).astype(own.value.dtype)
  after = _settle(past, keys, k_run, segment[:, -1], gaps)
  return jax.tree.map(lambda new, old: new.astype(old.dtype), after, past), out


def _settle(past: Past, keys: Keys, run: jax.Array, segment: jax.Array, gaps: bool) -> Past:
  """The last M keys of M + C stay, the others go to their codes; other documents are forgotten."""
  M, last = past.recent.position.shape[1], run[:, -1:]
  position = jnp.where(run == last, keys.position, -1)
  keys = Keys(keys.key, keys.value, keys.code, position)
  if gaps:  # places without a token first, so that the last M are tokens
    order = jnp.argsort(position >= 0, axis=1, stable=True)
    pick = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)
    keys = jax.tree.map(pick, keys)
  recent, old = keys[-M:], keys[:-M]
  R, dtype = past.count.shape[1], past.count.dtype
  which = jax.nn.one_hot(jnp.where(old.position[..., None] >= 0, old.code, R), R, dtype=dtype)
  goes_on = last == 0
  before = jnp.where(goes_on[..., None], past.count, 0)
  count = before + jnp.swapaxes(which.sum(1), 1, 2)
  share = 1 / jnp.maximum(count, 1)
  new = jnp.einsum("bskr,bskv->brkv", which, old.value.astype(dtype))
  mean = (before * share)[..., None] * past.mean + share[..., None] * new
  seen = jnp.maximum(jnp.where(goes_on[:, 0], past.seen, 0), position.max(1) + 1)
  return Past(recent, mean, count, segment, seen)


def _runs(position: jax.Array, segment: jax.Array, before: jax.Array):
  """Segments (B, C), of a missing token those of the one before it, and how often they changed."""
  at = jnp.where(position >= 0, jnp.arange(position.shape[1]), -1)
  at = jax.lax.cummax(at, axis=1)
  known = jnp.take_along_axis(segment, jnp.maximum(at, 0), axis=1)
  segment = jnp.where(at >= 0, known, before[:, None])
  previous = jnp.concatenate([before[:, None], segment[:, :-1]], axis=1)
  return segment, jnp.cumsum(segment != previous, axis=1, dtype=jnp.int32)


def _meets(q_position, q_run, k_position, k_run) -> jax.Array:
  """Which keys are of the query's document and not after it, (B, 1, 1, T, S)."""
  q_position, q_run = q_position[:, :, None], q_run[:, :, None]
  k_position, k_run = k_position[:, None], k_run[:, None]
  there = (q_position >= 0) & (k_position >= 0)
  return (there & (q_run == k_run) & (k_position <= q_position))[:, None, None]


def _softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
  """Softmax over what is visible, zero in rows where nothing is."""
  some = visible.any(-1, keepdims=True)
  return jax.nn.softmax(scores, axis=-1, where=visible | ~some) * some
