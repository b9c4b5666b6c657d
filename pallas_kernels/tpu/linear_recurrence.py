"""Chunks of linear attention with decay on TPU: the step that `chunk_scan` takes.

Everything is a matrix (rows, lanes) in float32. States are transposed, (V, H), so that a decay
along H is a row. Exponents are sums of log decays over spans of tokens, and never positive.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.products import AXES, PULL, dot

FLOOR = math.log(2.0**-149) - 1.0  # a log decay that just underflows; -inf is moved here
ONE_PASS, THREE_PASSES, EXACT = 1, 3, 6  # products of bfloat16 that make up one product


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a: jax.Array, b: jax.Array, kind: str, passes: int) -> jax.Array:
  """a b ("nn"), a b^T ("nt") or a^T b ("tn"), summed in float32; so are its cotangents.

  Args:
    a, b: float32 matrices.
    kind: which of them is transposed.
    passes: ONE_PASS rounds both to bfloat16, THREE_PASSES is good to 2^-16, EXACT to 2^-24.
  """
  if passes == EXACT:
    return _dot(a, b, kind, jax.lax.Precision.HIGHEST)
  if passes == ONE_PASS:
    return _dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), kind)
  (high_a, low_a), (high_b, low_b) = _parts(a, passes), _parts(b, passes)
  return _dot(high_a, high_b, kind) + (_dot(high_a, low_b, kind) + _dot(low_a, high_b, kind))


def _dot(a, b, kind: str, precision: jax.lax.Precision | None = None) -> jax.Array:
  return dot(a, b, AXES[kind], precision)


def _product_fwd(a, b, kind, passes):
  return product(a, b, kind, passes), (a, b)


def _product_bwd(kind, passes, residuals, g):
  given = dict(zip("ab", residuals)) | {"g": g}
  return tuple(product(*(given[x] for x in pair), how, passes) for pair, how in PULL[kind])


product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def span_sums(spans: jax.Array, x: jax.Array, passes: int) -> jax.Array:
  """spans @ x of a matrix of zeros and ones (R, C), which bfloat16 holds, and of x (C, H).

  What bfloat16 does not hold of x follows as further rows, and the product sums them up.
  """
  parts = _parts(x, passes)
  spans = jnp.concatenate([spans] * len(parts), axis=1).astype(jnp.bfloat16)
  return _dot(spans, jnp.concatenate(parts), "nn")


def _parts(x: jax.Array, passes: int) -> list[jax.Array]:
  """x in float32 as a sum of bfloat16: good to 2^-16, or to 2^-24."""
  parts = []
  for _ in range(3 if passes == EXACT else 2):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def _span_sums_fwd(spans, x, passes):
  return span_sums(spans, x, passes), spans


def _span_sums_bwd(passes, spans, g):
  spans = spans.astype(jnp.bfloat16)
  return None, sum(_dot(spans, part, "tn") for part in _parts(g, passes))


span_sums.defvjp(_span_sums_fwd, _span_sums_bwd)


def indices(C: int) -> tuple[jax.Array, jax.Array]:
  """The row and the column of each entry of a (C, C) matrix."""
  row, col = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
  return row, col


def column(row: jax.Array, shift: int = 0) -> jax.Array:
  """(1, C) to (C, 1), moved down by `shift` with zeros before it."""
  t, s = indices(row.shape[1])
  return jnp.sum(jnp.where(s == t - shift, row, 0.0), axis=1, keepdims=True)


def last(row: jax.Array) -> jax.Array:
  """The last of (1, C), as (1, 1)."""
  at = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1)
  return jnp.sum(jnp.where(at == row.shape[1] - 1, row, 0.0), axis=1, keepdims=True)


class Decay(NamedTuple):
  """What a chunk loses: factors in [0, 1], 1 lane wide where all of a head decays alike.

  Attributes:
    into: (C, #H), from the start of the chunk to where a query reads.
    onto: (C, #H), from a token to the end of the chunk.
    total: (1, #H), over the chunk.
    pairs: (C, C), from a key's token to where a query reads, if a head decays alike.
    levels: (C, H) for each half size m = C / 2, ..., 2, 1, if it does not. Of a block of 2 m
      tokens, a query in the late half has decayed since the middle, and a key in the early half
      decays until it; their product is what lies between them (no positive exponent).
  """

  into: jax.Array
  onto: jax.Array
  total: jax.Array
  pairs: jax.Array | None = None
  levels: tuple[jax.Array, ...] = ()


def decay_of(tile, passes: int, *, before: bool = False) -> Decay | None:
  """The decay of a chunk, of which queries read before or after the write of their token."""
  if "fine" in tile:
    return _scalar_decay(tile["coarse"], tile["fine"], before)
  if "log_decay" in tile:
    return _vector_decay(tile["log_decay"], passes, before)
  return None


def _scalar_decay(coarse, fine, before: bool) -> Decay:
  """From sums of log decays through each token, (1, C): exact multiples of 2^-11, and the rest.

  A difference of float32 sums near -2000 is off by 1e-4; one of the parts is not.
  """
  t, s = indices(fine.shape[1])
  early, end = (column(coarse), column(fine)), (last(coarse), last(fine))
  late = (column(coarse, 1), column(fine, 1)) if before else early
  between = (late[0] - coarse) + (late[1] - fine)
  return Decay(
    into=jnp.exp(late[0] + late[1]),
    onto=jnp.exp((end[0] - early[0]) + (end[1] - early[1])),
    total=jnp.exp(end[0] + end[1]),
    pairs=jnp.exp(jnp.where(s <= t - before, between, -jnp.inf)),
  )


def _vector_decay(log_decay, passes: int, before: bool) -> Decay:
  """From log decays (C, H); each exponent is a sum over its own span of tokens."""
  log_decay = jnp.maximum(log_decay, FLOOR)
  C = log_decay.shape[0]
  t, s = indices(C)
  through, after = s <= t - before, s > t
  halves = [C >> i for i in range(1, C.bit_length() - 1)]  # 2 and up
  levels = [((t ^ s) < m) & (((t & m) != 0) & through | ((t & m) == 0) & after) for m in halves]
  spans = jnp.concatenate([x.astype(jnp.float32) for x in (through, after, *levels)])
  sums = jnp.exp(span_sums(spans, log_decay, passes))
  into, onto, *levels = (sums[i : i + C] for i in range(0, len(sums), C))
  total = jnp.exp(jnp.sum(log_decay, axis=0, keepdims=True))
  odd = jax.lax.broadcasted_iota(jnp.int32, log_decay.shape, 0) & (not before)
  levels.append(jnp.exp(jnp.where(odd == 1, log_decay, 0.0)))
  return Decay(into=into, onto=onto, total=total, levels=tuple(levels))


def scores(queries, keys, decays, passes: int, *, strict: bool) -> list[jax.Array]:
  """sum_h q_th k_sh exp(log decay from s to t) for s <= t, or s < t if strict, else 0: (C, C) each.

  Args:
    queries, keys: (C, H) of each head.
    decays: a `Decay` or None of each head.
    passes: of `product`.
    strict: whether queries do not see the key of their own token.
  """
  C = queries[0].shape[0]
  t, s = indices(C)
  visible = s < t if strict else s <= t
  heads = list(zip(queries, keys, decays, strict=True))
  if decays[0] is not None and decays[0].levels:
    found = [jnp.where(t == s, jnp.sum(q * k, axis=1, keepdims=True), 0.0) for q, k, _ in heads]
    # Level by level, so that products of one head fill the gaps between another's.
    for i in reversed(range(len(decays[0].levels))):
      level = [product(q * x.levels[i], k * x.levels[i], "nt", passes) for q, k, x in heads]
      found = [jnp.where((t ^ s) < C >> i + 1, x, y) for x, y in zip(found, level, strict=True)]
    return [jnp.where(visible, x, 0.0) for x in found]
  found = [product(q, k, "nt", passes) for q, k, _ in heads]
  if decays[0] is None:
    return [jnp.where(visible, x, 0.0) for x in found]
  return [x * jnp.where(visible, y.pairs, 0.0) for x, y in zip(found, decays, strict=True)]


class Documents(NamedTuple):
  """Which document each token is of.

  Attributes:
    since: (1, C) float32, how many documents began since the state that enters the chunk.
  """

  since: jax.Array

  def meet(self) -> jax.Array:
    """(C, C), whether two tokens are of one document."""
    return column(self.since) == self.since

  def enters(self) -> jax.Array:
    """(C, 1), whether a token sees the state that enters the chunk."""
    return column(self.since) == 0

  def leaves(self) -> jax.Array:
    """(C, 1), whether a token is part of the state that leaves the chunk."""
    return column(self.since) == last(self.since)

  def passes(self) -> jax.Array:
    """(1, 1), whether the state that enters the chunk is part of the one that leaves it."""
    return last(self.since) == 0


def linear_attention(states, tiles, *, passes: int) -> list[tuple[jax.Array, jax.Array]]:
  """One chunk of o_t = q_t S_t with S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, by heads.

  Args:
    states: (V, H) each.
    tiles: q (C, H), k (C, H), v (C, V), and where there are such: log_decay (C, H), or its sums
      coarse (1, C) and fine (1, C), see `_scalar_decay`; bonus (1, H); since (1, C).
    passes: of `product`.

  Returns:
    The state after the chunk (V, H), and o (C, V).
  """
  before = "bonus" in tiles[0]
  decays = [decay_of(tile, passes, before=before) for tile in tiles]
  queries, keys = ([tile[name] for tile in tiles] for name in "qk")
  insides = scores(queries, keys, decays, passes, strict=before)
  return [_head(*head, passes) for head in zip(states, tiles, decays, insides, strict=True)]


def _head(state, tile, decay: Decay | None, inside, passes: int) -> tuple[jax.Array, jax.Array]:
  q, k, v = tile["q"], tile["k"], tile["v"]
  into, onto, kept = (q, k, state) if decay is None else (
    q * decay.into, k * decay.onto, state * decay.total
  )  # fmt: skip
  if "since" in tile:
    documents = Documents(tile["since"])
    inside = jnp.where(documents.meet(), inside, 0.0)
    into = jnp.where(documents.enters(), into, 0.0)
    onto = jnp.where(documents.leaves(), onto, 0.0)
    kept = jnp.where(documents.passes(), kept, 0.0)
  out = product(into, state, "nt", passes) + product(inside, v, "nn", passes)
  if "bonus" in tile:
    out += jnp.sum(q * tile["bonus"] * k, axis=1, keepdims=True) * v
  return kept + product(v, onto, "tn", passes), out
