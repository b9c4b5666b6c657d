"""The systems of the delta rule within chunks of 64 tokens, solved on Hopper GPUs.

The corrections of a chunk are (I + L) Y = beta (V - asks S) with a strictly lower triangular L.
M = (I + L)^-1 does not depend on the state S, so that it is found for all chunks at once; with it
Y = U + P S, as `chunk_scan` wants it, U = M beta V and P = -M beta asks being products.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.gpu.chunk_scan import (
  C, COLUMNS, DTYPE, SHAPE, Correction, Pair, Plan, Span, diagonal, halves, in_parts, launch, mask,
  multiply, shared, tile_at, tokens_of,
)  # fmt: skip
from pallas_kernels.gpu.tiles import COLUMN, ROW, TILE, Warpgroup, smem

STEPS = C.bit_length() - 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def corrections(
  keys: jax.Array, values: jax.Array, beta: jax.Array, gamma: jax.Array, overlap: jax.Array,
  plan: Plan,
) -> Correction:  # fmt: skip
  """U = M beta V and P = M gamma K of every chunk, with M = (I + beta overlap)^-1.

  Args:
    keys: K (B, T, K, H) bfloat16.
    values: V (B, T, K, V) bfloat16.
    beta, gamma: (B, chunks, N, 64) float32.
    overlap: (#B, #chunks, #N, 64, 64), or of `Plan.weighs` the weights of K K^T that make it; on
      and above the diagonal anything finite.
    plan: what is static.
  """
  return Correction(*_solve(keys, values, beta, gamma, overlap, plan, keep=False))


def _solve(
  keys: jax.Array, values: jax.Array, beta: jax.Array, gamma: jax.Array, overlap: jax.Array,
  plan: Plan, *, keep: bool = True,
) -> list[jax.Array]:  # fmt: skip
  """U and P of `corrections`, and where it is to be kept M (B, chunks, N, 64, 64) bfloat16."""
  (B, chunks, N), H, V = beta.shape[:3], keys.shape[3], values.shape[3]
  wg = Warpgroup(plan.interpret)
  shapes = [SHAPE((B, chunks * C, N, width), DTYPE) for width in (V, H)]
  shapes += [SHAPE((B, chunks, N, C, C), DTYPE)] * keep

  def kernel(*refs, tiles, given, lower, lines, parts, barrier):
    at = _here(plan)
    v_ref, k_ref, overlap_ref, beta_ref, gamma_ref, *outs = refs
    for ref, held in zip((v_ref, k_ref), tiles):
      _copy(ref, held, at, barrier)
    plgpu.copy_gmem_to_smem(tile_at(overlap_ref, *at), given, barrier)
    for ref, line in zip((beta_ref, gamma_ref), lines):
      plgpu.copy_gmem_to_smem(tile_at(ref, *at, rows=None), line, barrier)
    plgpu.barrier_wait(barrier)
    scores = given[...].astype(jnp.float32) * wg.wide(wg.load(lines[0], ROW), (C, C))
    if plan.weighs:
      scores *= multiply([Pair(k, k, "nt") for k in _each(tiles[1])], plan)
    lower[...] = scores
    found = inverse(lower, parts, plan)
    for held, line in zip(tiles, lines):
      scaled = (found * wg.wide(wg.load(line, COLUMN), (C, C), 1)).astype(DTYPE)
      for tile in _each(held):
        result = multiply([Pair(scaled, tile, "nn")], plan).astype(DTYPE)
        plgpu.commit_smem()  # all threads have read the tile
        tile[...] = result
    if keep:
      parts.at[0][...] = found.astype(DTYPE)
    plgpu.commit_smem()
    for held, ref in zip(tiles, outs):
      _leave(held, ref, at)
    if keep:
      plgpu.copy_smem_to_gmem(parts.at[0], tile_at(outs[2], *at))
    plgpu.wait_smem_to_gmem(0)

  return launch(
    kernel, [values, keys, overlap, beta, gamma], shapes, plan,
    name="systems", grid=dict(b=B, n=N, c=chunks),
    scratch=dict(
      tiles=[smem(width // COLUMNS, C, COLUMNS, dtype=DTYPE) for width in (V, H)],
      given=smem(C, C, dtype=overlap.dtype),
      lower=smem(C, C, dtype=jnp.float32),
      lines=[plgpu.SMEM((C,), jnp.float32)] * 2,
      parts=smem(2, C, C, dtype=DTYPE),
      barrier=plgpu.Barrier(num_arrivals=3 + (H + V) // COLUMNS),
    ),
  )  # fmt: skip


def inverse(lower: Any, parts: Any, plan: Plan) -> jax.Array:
  """(I + L)^-1 of a tile, strictly lower triangular L being what is below its diagonal.

  Inverses of diagonal blocks of m rows become those of 2 m rows: the inverse of [[X, 0], [L, Y]]
  is [[X^-1, 0], [-Y^-1 L X^-1, Y^-1]], and if M holds all X^-1 and Y^-1, then M L M holds all
  Y^-1 L X^-1. This is forward substitution by blocks, and as stable, in 10 products of (64, 64).
  Each is made of three of bfloat16, and good to 2^-16.

  Args:
    lower: (64, 64) float32, in shared memory.
    parts: shared memory of two tiles of bfloat16.
    plan: what is static.
  """
  wg = Warpgroup(plan.interpret)
  blocks = lambda m: jnp.where(halves(m, wg), lower[...], 0.0)

  def times(x, y):
    (high, low), (right, rest) = in_parts(x), in_parts(y)
    parts.at[0][...], parts.at[1][...] = right, rest
    plgpu.commit_smem()
    pairs = [(high, 0), (high, 1), (low, 0)]
    result = multiply([Pair(left, parts.at[i], "nn") for left, i in pairs], plan)
    plgpu.commit_smem()  # all threads have read the parts
    return result

  def double(i, found):
    m = lax.shift_left(jnp.int32(2), i)
    return found - times(times(found, blocks(m)), found)

  found = jnp.where(diagonal(wg), 1.0, 0.0) - blocks(1)
  return lax.fori_loop(0, STEPS, double, found)


def _here(plan: Plan) -> tuple[Plan, Any, Any, Any]:
  """The row, the head and the chunk of a program, as `tile_at` wants them."""
  return plan, lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("c")


def _each(held: Any) -> list[Any]:
  """The tiles of an array of them in shared memory."""
  return [held.at[i] for i in range(held.shape[0])]


def _copy(ref: Any, held: Any, at: tuple[Plan, Any, Any, Any], barrier: Any) -> None:
  """Starts to bring the tokens of a chunk, as tiles."""
  for i, tile in enumerate(_each(held)):
    plgpu.copy_gmem_to_smem(tile_at(ref, *at, pl.ds(i * COLUMNS, COLUMNS)), tile, barrier)


def _leave(held: Any, ref: Any, at: tuple[Plan, Any, Any, Any]) -> None:
  """Starts to write tiles to the tokens of a chunk."""
  for i, tile in enumerate(_each(held)):
    plgpu.copy_smem_to_gmem(tile, tile_at(ref, *at, pl.ds(i * COLUMNS, COLUMNS)))


def _corrections_fwd(keys, values, beta, gamma, overlap, plan):
  u, p, found = _solve(keys, values, beta, gamma, overlap, plan)
  return Correction(u, p), (keys, values, beta, gamma, overlap, u, p, found)


def _corrections_bwd(plan, residuals, g):
  xs, (u, p, found) = residuals[:5], residuals[5:]
  return tuple(
    shared(grad, x) for grad, x in zip(_gradients(*xs, u, p, found, g, plan), xs, strict=True)
  )


corrections.defvjp(_corrections_fwd, _corrections_bwd)


def _gradients(
  keys: jax.Array, values: jax.Array, beta: jax.Array, gamma: jax.Array, overlap: jax.Array,
  u: jax.Array, p: jax.Array, found: jax.Array, g: Correction, plan: Plan,
) -> list[jax.Array]:  # fmt: skip
  """Gradients of what `corrections` is given, for every row, head and chunk.

  With N_u = M^T dU and N_p = M^T dP, those of V and K are beta N_u and gamma N_p, and that of
  beta overlap is -(N_u U^T + N_p P^T) below the diagonal.
  """
  (B, chunks, N), H, V = beta.shape[:3], keys.shape[3], values.shape[3]
  wg = Warpgroup(plan.interpret)
  line = SHAPE((B, chunks, N, C), jnp.float32)
  shapes = [SHAPE((B, chunks * C, N, width), DTYPE) for width in (H, V)]
  shapes += [line, line, SHAPE((B, chunks, N, C, C), DTYPE)]
  sides = [(values, g.u, u), (keys, g.p, p)]

  def kernel(*refs, tiles, matrix, given, lines, barrier):
    at = _here(plan)
    flat = [held for side in tiles for held in side]
    for ref, held in zip(refs, flat):
      _copy(ref, held, at, barrier)
    found_ref, overlap_ref, *factor_refs = refs[len(flat) : len(flat) + 4]
    plgpu.copy_gmem_to_smem(tile_at(found_ref, *at), matrix, barrier)
    plgpu.copy_gmem_to_smem(tile_at(overlap_ref, *at), given, barrier)
    k_ref, v_ref, *line_refs, overlap_ref = refs[len(flat) + 4 :]
    factors = [wg.load(tile_at(ref, *at, rows=None), ROW) for ref in factor_refs]
    plgpu.barrier_wait(barrier)

    back = lambda tile: multiply([Pair(matrix, tile, "tn")], plan)
    lower, sums = wg.full((C, C), 0.0, TILE), []
    for side, factor in zip(tiles, factors):
      own = wg.full((C,), 0.0, ROW)
      for base, grad, out in zip(*(_each(held) for held in side)):
        moved = back(grad)
        lower = multiply([Pair(moved.astype(DTYPE), out, "nt")], plan, lower)
        own += jnp.sum(moved * base[...].astype(jnp.float32), axis=1)
        if side is tiles[0] or not plan.weighs:
          base[...] = (moved * wg.wide(factor, (C, C))).astype(DTYPE)
      sums.append(own)
    t = tokens_of(wg)
    lower = jnp.where(mask(Span(t * 0, t), wg), -lower, 0.0)
    beta = wg.wide(factors[0], (C, C))
    plgpu.commit_smem()  # all threads have read the tiles
    room = [out.at[0] for _, _, out in tiles]
    if plan.weighs:
      room[1][...] = (lower * given[...].astype(jnp.float32) * beta).astype(DTYPE)
      lower *= multiply([Pair(k, k, "nt") for k in _each(tiles[1][0])], plan)
    sums[0] += jnp.sum(lower * given[...].astype(jnp.float32), axis=1)
    room[0][...] = (lower * beta).astype(DTYPE)
    for i, x in enumerate(sums):
      lines[i][...] = x
    if plan.weighs:
      plgpu.commit_smem()
      for base, grad, _ in zip(*(_each(held) for held in tiles[1])):
        moved = back(grad) * wg.wide(factors[1], (C, C))
        moved = multiply([Pair(room[1], base, how) for how in ("nn", "tn")], plan, moved)
        plgpu.commit_smem()
        base[...] = moved.astype(DTYPE)
    plgpu.commit_smem()
    for (base, _, _), ref in zip(tiles, (v_ref, k_ref)):
      _leave(base, ref, at)
    plgpu.copy_smem_to_gmem(room[0], tile_at(overlap_ref, *at))
    for x, ref in zip(lines, line_refs):
      plgpu.copy_smem_to_gmem(x, tile_at(ref, *at, rows=None))
    plgpu.wait_smem_to_gmem(0)

  tiles = [
    [smem(x.shape[3] // COLUMNS, C, COLUMNS, dtype=DTYPE) for x in side] for side in sides
  ]
  return launch(
    kernel, [*(x.astype(DTYPE) for side in sides for x in side), found, overlap, beta, gamma],
    shapes, plan, name="systems_backward", grid=dict(b=B, n=N, c=chunks),
    scratch=dict(
      tiles=tiles,
      matrix=smem(C, C, dtype=DTYPE),
      given=smem(C, C, dtype=overlap.dtype),
      lines=[plgpu.SMEM((C,), jnp.float32)] * 2,
      barrier=plgpu.Barrier(num_arrivals=2 + 3 * (H + V) // COLUMNS),
    ),
  )  # fmt: skip
