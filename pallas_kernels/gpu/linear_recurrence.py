"""Scores of queries and keys whose decay varies along the width, within chunks, on Hopper GPUs.

The scores sum_h q_th k_sh exp(log decay from s to t) of a chunk of 64 tokens are no product of two
matrices, for a factor of t times one of s has a positive exponent. They are one for the pairs of
each level: of a block of 2 m tokens, those of a query in the late half and a key in the early
half. The query has decayed since the middle, the key decays until it, and no exponent is ever
positive. Levels m = 32, 16, .., 1 and the diagonal hold all pairs, so 7 products of (64, 64) make
up the scores, none of them by pairs within a block. What a token has decayed is a sum over its own
span of tokens: a matrix of zeros and ones times the log decays, another product, of which the log
decays are split into two parts of bfloat16 (good to 2^-16). So cancel no two large sums.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.gpu.chunk_scan import (
  C, DTYPE, Pair, Plan, Span, diagonal, halves, in_parts, launch, mask, multiply, shared, tile_at,
  tokens_of,
)  # fmt: skip
from pallas_kernels.gpu.tiles import COLUMN, TILE, Warpgroup, smem
from pallas_kernels.tpu.linear_recurrence import FLOOR

WIDTH = 64  # columns of q and k that are handled at once
LEVELS = C.bit_length() - 1


class Kind(NamedTuple):
  """What is asked for.

  Attributes:
    before: queries read before the write of their token, and do not see its key.
    delta: the delta rule also wants what keys see of earlier keys.
  """

  before: bool = False
  delta: bool = False


class Decayed(NamedTuple):
  """What chunks are once their decay is known; of `Kind.delta` only where it says so.

  Attributes:
    into: (B, T, N, H), queries as they read the state that enters the chunk.
    onto: (B, T, N, H), keys as they reach the end of the chunk.
    inside: (B, chunks, N, C, C), scores of queries and keys; zero for keys that are not seen.
    total: (B, chunks, N, H) float32, what a chunk leaves of a state.
    asks: (B, T, N, H), of `Kind.delta`: keys as they read the state, less than zero.
    overlap: (B, chunks, N, C, C) float32, of `Kind.delta`: scores of keys and earlier keys.
  """

  into: jax.Array
  onto: jax.Array
  inside: jax.Array
  total: jax.Array
  asks: jax.Array | None = None
  overlap: jax.Array | None = None


class _Chunk(NamedTuple):
  """What a warpgroup knows of a chunk.

  Attributes:
    kind: what is asked for.
    plan: what is static.
    parts: shared memory of two tiles, for a tile of float32 in two parts of bfloat16.
  """

  kind: Kind
  plan: Plan
  parts: Any

  @property
  def wg(self) -> Warpgroup:
    return Warpgroup(self.plan.interpret)

  def zeros(self) -> jax.Array:
    """A tile."""
    return self.wg.full((C, C), 0.0, TILE)

  @property
  def row(self) -> jax.Array:
    return tokens_of(self.wg)

  def through(self, *, turned: bool = False) -> Span:
    """What a query at t has decayed by: s <= t, or s < t if it reads before the write."""
    t, until = self.row, 1 - self.kind.before
    return Span(t + (1 - until), t * 0 + C) if turned else Span(t * 0, t + until)

  def after(self, *, turned: bool = False) -> Span:
    """What a key at t decays by until the end of the chunk: s > t."""
    t = self.row
    return Span(t * 0, t) if turned else Span(t + 1, t * 0 + C)

  def level(self, m: Any, *, turned: bool = False) -> Span:
    """What lies between a token and the middle of its block of 2 m."""
    t, until = self.row, 1 - self.kind.before
    late, half = (t & m) != 0, t & -m
    if turned:
      return Span(jnp.where(late, t + (1 - until), half), jnp.where(late, half + m, t))
    return Span(jnp.where(late, half, t + 1), jnp.where(late, t + until, half + m))

  def split(self, x: jax.Array) -> None:
    """Leaves x in shared memory, for `sums`."""
    self.parts.at[0][...], self.parts.at[1][...] = in_parts(x)
    plgpu.commit_smem()

  def ones(self, span: Span) -> jax.Array:
    """Tiles times this are sums over spans."""
    return jnp.where(mask(span, self.wg), 1.0, 0.0).astype(DTYPE)

  def sums(self, ones: jax.Array, acc: jax.Array | None = None) -> jax.Array:
    """The sums over spans of what was split, added to `acc`."""
    return multiply([Pair(ones, self.parts.at[part], "nn") for part in range(2)], self.plan, acc)

  def total(self, logs: jax.Array) -> jax.Array:
    """exp of the sums of all tokens, of each column."""
    return jnp.exp(self.wg.cast(jnp.sum(logs, axis=0), COLUMN))

  def decay(self, ones: jax.Array) -> jax.Array:
    """exp of the sums over spans, at most 1."""
    return jnp.exp(self.sums(ones))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def decayed(
  q: jax.Array, k: jax.Array, log_decay: jax.Array, kind: Kind, plan: Plan
) -> Decayed:
  """Queries and keys with their decay, and scores, of all chunks at once.

  Args:
    q, k: (B, T, K, H) bfloat16, T and H multiples of 64; K divides N.
    log_decay: (#B, T, K, H) float32, at most 0; moved to where it just underflows.
    kind: what is asked for.
    plan: what is static.
  """
  B, T, _, H = q.shape
  N, chunks = plan.heads, q.shape[1] // C
  names = ["into", "onto"] + ["asks"] * kind.delta
  tiles = dict(inside=DTYPE) | (dict(overlap=jnp.float32) if kind.delta else {})
  shapes = [jax.ShapeDtypeStruct((B, T, N, H), DTYPE)] * len(names)
  shapes += [jax.ShapeDtypeStruct((B, chunks, N, C, C), dtype) for dtype in tiles.values()]
  shapes.append(jax.ShapeDtypeStruct((B, chunks, N, H), jnp.float32))

  def kernel(q_ref, k_ref, g_ref, *refs, held, logs, parts, keys, barriers):
    b, n, c = (lax.axis_index(name) for name in "bnc")
    outs, score_refs, total_ref = refs[: len(names)], refs[len(names) : -1], refs[-1]
    at, wg = (plan, b, n, c), Warpgroup(plan.interpret)
    blocks = [_Chunk(kind, plan, parts.at[i]) for i in range(H // WIDTH)]
    chunk, columns = blocks[0], [pl.ds(i * WIDTH, WIDTH) for i in range(len(blocks))]
    q, k = (lambda i, x=x: held.at[x, i][...].astype(jnp.float32) for x in range(2))

    for i, cut in enumerate(columns):
      for x, ref in enumerate((q_ref, k_ref)):
        plgpu.copy_gmem_to_smem(tile_at(ref, *at, cut), held.at[x, i], barriers.at[i])
      plgpu.copy_gmem_to_smem(tile_at(g_ref, *at, cut), logs.at[i], barriers.at[i])
    for i, block in enumerate(blocks):
      plgpu.barrier_wait(barriers.at[i])
      log = jnp.maximum(logs.at[i][...], FLOOR)
      tile_at(total_ref, *at, columns[i], rows=None)[...] = block.total(log)
      block.split(log)

    def level(i, found):
      m = lax.shift_right_logical(jnp.int32(C // 2), i)
      ones, queries = chunk.ones(chunk.level(m)), []
      for i, block in enumerate(blocks):
        decay = block.decay(ones)
        keys.at[i][...] = (k(i) * decay).astype(DTYPE)
        queries.append((q(i) * decay).astype(DTYPE))
      plgpu.commit_smem()
      both = [queries, [keys.at[i] for i in range(len(blocks))]]
      new = [
        multiply([Pair(x, keys.at[i], "nt") for i, x in enumerate(left)], plan)
        for left in both[: len(tiles)]
      ]
      pairs = halves(m, wg)
      return tuple(x + jnp.where(pairs, y, 0.0) for x, y in zip(found, new))

    found = lax.fori_loop(0, LEVELS, level, (chunk.zeros(),) * len(tiles))
    if not kind.before:
      own = multiply([Pair(held.at[0, i], held.at[1, i], "nt") for i in range(len(blocks))], plan)
      found = found[0] + jnp.where(diagonal(wg), own, 0.0), *found[1:]
    results = [[parts.at[i, x] for i in range(len(blocks))] for x in range(2)]
    results += [[keys.at[i] for i in range(len(blocks))]]
    ones = [chunk.ones(span) for span in (chunk.through(), chunk.after())]
    for i, block in enumerate(blocks):
      into, onto = (block.decay(x) for x in ones)
      results[0][i][...] = (q(i) * into).astype(DTYPE)
      results[1][i][...] = (k(i) * onto).astype(DTYPE)
      if kind.delta:
        results[2][i][...] = (-k(i) * into).astype(DTYPE)
    for value, tile in zip(found, (held.at[0, 0], logs.at[0])):
      tile[...] = value.astype(tile.dtype)
    plgpu.commit_smem()
    for ref, filled in zip(outs, results):
      for tile, cut in zip(filled, columns):
        plgpu.copy_smem_to_gmem(tile, tile_at(ref, *at, cut))
    for tile, ref in zip((held.at[0, 0], logs.at[0]), score_refs):
      plgpu.copy_smem_to_gmem(tile, tile_at(ref, *at))
    plgpu.wait_smem_to_gmem(0)

  results = launch(
    kernel, [q, k, log_decay], shapes, plan, name="vector_decay_forward",
    grid=dict(b=B, n=N, c=chunks),
    scratch=dict(
      held=smem(2, H // WIDTH, C, WIDTH, dtype=DTYPE),
      logs=smem(H // WIDTH, C, WIDTH, dtype=jnp.float32),
      parts=smem(H // WIDTH, 2, C, WIDTH, dtype=DTYPE),
      keys=smem(H // WIDTH, C, WIDTH, dtype=DTYPE),
      barriers=plgpu.Barrier(num_arrivals=3, num_barriers=H // WIDTH),
    ),
  )  # fmt: skip
  return Decayed(**dict(zip([*names, *tiles, "total"], results, strict=True)))


def _decayed_fwd(q, k, log_decay, kind, plan):
  return decayed(q, k, log_decay, kind, plan), (q, k, log_decay)


def _decayed_bwd(kind, plan, residuals, g):
  grads = _gradients(*residuals, g, kind, plan)
  return tuple(shared(grad, x) for grad, x in zip(grads, residuals, strict=True))


decayed.defvjp(_decayed_fwd, _decayed_bwd)


def _gradients(
  q: jax.Array, k: jax.Array, log_decay: jax.Array, g: Decayed, kind: Kind, plan: Plan
) -> Sequence[jax.Array]:
  """Gradients of q, k and log_decay, (B, T, N, H) each, given those of what `decayed` gives."""
  B, T, _, H = q.shape
  N, chunks = plan.heads, q.shape[1] // C
  tokens = [x for x in (q, k, g.into, g.onto, g.asks) if x is not None]
  scores = [x for x in (g.inside, g.overlap) if x is not None]

  def kernel(*refs, held, logs, given, parts, spare, barrier):
    b, n, c, i = (lax.axis_index(name) for name in "bnci")
    *ins, total_ref, dq_ref, dk_ref, dg_ref = refs
    columns = pl.ds(i * WIDTH, WIDTH)
    chunk, sums = _Chunk(kind, plan, parts.at[0]), _Chunk(kind, plan, parts.at[1])
    targets = [held.at[x] for x in range(len(tokens))] + [logs]
    for ref, tile in zip(ins, targets):
      plgpu.copy_gmem_to_smem(tile_at(ref, plan, b, n, c, columns), tile, barrier)
    for x, ref in enumerate(ins[len(targets) :]):
      plgpu.copy_gmem_to_smem(tile_at(ref, plan, b, n, c), given.at[x], barrier)
    d_total = chunk.wg.load(tile_at(total_ref, plan, b, n, c, columns, rows=None), COLUMN)
    plgpu.barrier_wait(barrier)
    q, k, d_into, d_onto, *d_asks = (
      lambda x=x: held.at[x][...].astype(jnp.float32) for x in range(len(tokens))
    )

    def back(span, moved, d_g):
      """The gradient of log decays, given that of the exponents and the turned spans of these."""
      sums.split(moved)
      return sums.sums(sums.ones(span), d_g)

    # What is read once makes room.
    queries, keys, masked = held.at[2], held.at[3], [spare, held.at[len(tokens) - 1]]

    log = jnp.maximum(logs[...], FLOOR)
    d_log = chunk.wg.wide(d_total * chunk.total(log), (C, C), 1)
    chunk.split(log)
    into, onto = (chunk.decay(chunk.ones(x)) for x in (chunk.through(), chunk.after()))
    d_q, d_k = d_into() * into, d_onto() * onto
    moved_in, moved_on = d_q * q(), d_k * k()
    if kind.delta:
      asked = d_asks[0]() * into
      d_k, moved_in = d_k - asked, moved_in - asked * k()
    d_g = back(chunk.through(turned=True), moved_in, d_log)
    d_g = back(chunk.after(turned=True), moved_on, d_g)

    def level(i, found):
      d_q, d_k, d_g = found
      m = lax.shift_right_logical(jnp.int32(C // 2), i)
      decay, pairs = chunk.decay(chunk.ones(chunk.level(m))), halves(m, chunk.wg)
      queries[...] = (q() * decay).astype(DTYPE)
      keys[...] = (k() * decay).astype(DTYPE)
      for x in range(len(scores)):
        masked[x][...] = jnp.where(pairs, given.at[x][...], 0.0).astype(DTYPE)
      plgpu.commit_smem()
      d_queries = multiply([Pair(masked[0], keys, "nn")], plan) * decay
      d_q, moved = d_q + d_queries, d_queries * q()
      factors = [Pair(masked[0], queries, "tn")]
      if kind.delta:  # where keys ask as well
        factors += [Pair(masked[1], keys, how) for how in ("tn", "nn")]
      d_keys = multiply(factors, plan) * decay
      return d_q, d_k + d_keys, back(chunk.level(m, turned=True), moved + d_keys * k(), d_g)

    d_q, d_k, d_g = lax.fori_loop(0, LEVELS, level, (d_q, d_k, d_g))
    if not kind.before:
      near = jnp.where(diagonal(chunk.wg), given.at[0][...], 0.0).astype(DTYPE)
      d_q = multiply([Pair(near, held.at[1], "nn")], plan, d_q)
      d_k = multiply([Pair(near, held.at[0], "nn")], plan, d_k)
    queries[...], keys[...] = d_q.astype(DTYPE), d_k.astype(DTYPE)
    logs[...] = jnp.where(logs[...] > FLOOR, d_g, 0.0)
    plgpu.commit_smem()
    for tile, ref in ((queries, dq_ref), (keys, dk_ref), (logs, dg_ref)):
      plgpu.copy_smem_to_gmem(tile, tile_at(ref, plan, b, n, c, columns))
    plgpu.wait_smem_to_gmem(0)

  return launch(
    kernel,
    [*(x.astype(DTYPE) for x in tokens), log_decay, *(x.astype(DTYPE) for x in scores), g.total],
    [jax.ShapeDtypeStruct((B, T, N, H), dtype) for dtype in (DTYPE, DTYPE, jnp.float32)], plan,
    name="vector_decay_backward", grid=dict(b=B, n=N, c=chunks, i=H // WIDTH),
    scratch=dict(
      held=smem(len(tokens), C, WIDTH, dtype=DTYPE),
      logs=smem(C, WIDTH, dtype=jnp.float32),
      given=smem(len(scores), C, C, dtype=DTYPE),
      parts=smem(2, 2, C, WIDTH, dtype=DTYPE),
      spare=smem(C, C, dtype=DTYPE),
      barrier=plgpu.Barrier(num_arrivals=len(tokens) + len(scores) + 1),
    ),
  )  # fmt: skip
