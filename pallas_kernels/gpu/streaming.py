"""Streaming attention on Hopper GPUs: a fold over tiles of keys.

One warpgroup moves tiles of keys and values through a ring in shared memory; the others multiply,
each with queries of its own. They take turns at the tensor cores, so that one multiplies while the
others weigh.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.experimental.pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.algebra import FLOOR, Algebra, Facts
from pallas_kernels.gpu.rings import REGISTERS, run
from pallas_kernels.gpu.tiles import (
  COLUMN, ROW, TILE, Blocks, Order, Warpgroup, inlined, lists, smem, whole,
)  # fmt: skip
from pallas_kernels.visits import Operand, occurring

F32 = jnp.float32
MASS, PEAK, COUNT = range(3)  # rows of the statistics that `forward` returns


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_side: jax.Array,
  k_side: jax.Array,
  operands: Sequence[jax.Array],
  kinds: Any,
  *,
  algebra: Algebra,
  layout: Sequence[Operand] = (),
  blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """sum_j w_j v_j of every query over its visible keys, and what it was measured by.

  Nothing is copied to fill up tiles: tokens past the end read as zeros, and `kinds` calls no tile
  FULL that has some.

  Args:
    q: (B, T, N, H), bfloat16 or float16.
    k, v: (B, S, K, H) and (B, S, K, V) of its dtype; K divides N.
    q_side, k_side: (#B, 3, lines * blocks.line) and (#B, 3, length * blocks.k) int32, the fields of
      `Side`; tokens past T and S do not exist.
    operands: arrays (#B, #N, #T, #S) of as many tokens, or of one number for each head.
    kinds: (#B, lines, length) int32: EMPTY, PARTIAL or FULL; NumPy or traced.
    algebra: what becomes of products.
    layout: how the operands lie; all are of pairs, or of one number.
    blocks: how the work is cut.
    interpret: emulate on CPU, for tests: `InterpretGPUParams`.

  Returns:
    out (B, T, N, V) float32, and statistics (B, N, 3, T) float32 with rows MASS, PEAK and COUNT;
    the peak is 0 where the algebra has none.
  """
  (B, T, N, H), (_, S, K, V) = q.shape, v.shape
  _, lines, length = kinds.shape
  bq, bk, W, stages = blocks.q, blocks.k, blocks.warpgroups, blocks.stages
  rows, columns = lines * blocks.line, length * bk
  assert k.shape == (B, S, K, H) and N % K == 0, (q.shape, k.shape, v.shape)
  assert q_side.shape[2] == rows >= T and k_side.shape[2] == columns >= S, (T, S, blocks)
  plan, unit = lists(kinds), Warpgroup(interpret)
  whole_occurs, some_occurs = occurring(kinds)
  order = Order.of(B * N, lines, S * (H + V) * q.dtype.itemsize * K // N)
  one = all(x.shape[2:] == (1, 1) for x in operands)
  visit = functools.partial(_visit, unit=unit, algebra=algebra)

  def kernel(at, counts, q_side, k_side, *refs, q_tiles, k_tiles, v_tiles, k_sides, **barriers):
    *operand_refs, q, k, v, out, stats = refs
    k_full, v_full, k_free, v_free = (barriers[x] for x in ("k_full", "v_full", "k_free", "v_free"))
    q_full, turn = barriers["q_full"], barriers["turn"]
    w = lax.axis_index("warpgroup")
    bn, line = order.at(lax.axis_index("block"))
    b, n = lax.div(bn, jnp.int32(N)), lax.rem(bn, jnp.int32(N))
    of = lambda ref: 0 if ref.shape[0] == 1 else b
    full = counts[of(counts), line, 0]
    total = full + counts[of(counts), line, 1]
    slot_of = lambda t: lax.rem(t, jnp.int32(stages))
    keys_of = lambda t: pl.ds(pl.multiple_of(at[of(at), line, t] * bk, bk), bk)

    @pl.when(w == W)
    def _move():
      plgpu.set_max_registers(REGISTERS[W][1], action="decrease")
      head = lax.div(n, jnp.int32(N // K))

      def move(t, again: bool):
        slot, keys = slot_of(t), keys_of(t)
        if again:
          plgpu.barrier_wait(k_free.at[slot])
        plgpu.copy_gmem_to_smem(k.at[b, keys, head], k_tiles.at[slot], k_full.at[slot])
        if again:
          plgpu.barrier_wait(v_free.at[slot])
        plgpu.copy_gmem_to_smem(
          k_side.at[of(k_side), :, keys], k_sides.at[slot], k_full.at[slot]
        )
        plgpu.copy_gmem_to_smem(v.at[b, keys, head], v_tiles.at[slot], v_full.at[slot])

      pl.loop(0, lax.min(total, stages))(lambda t: move(t, False))
      pl.loop(stages, total)(lambda t: move(t, True))

      @pl.loop(lax.max(total - stages, 0), total)
      def _drain(t):
        plgpu.barrier_wait(k_free.at[slot_of(t)])
        plgpu.barrier_wait(v_free.at[slot_of(t)])

    @pl.when(w < W)
    def _multiply():
      plgpu.set_max_registers(REGISTERS[W][0], action="increase")
      mine = pl.ds(line * blocks.line + w * bq, bq)
      q_tile = q_tiles.at[w]
      plgpu.copy_gmem_to_smem(q.at[b, mine, n], q_tile, q_full.at[w])
      q_facts = unit.side(q_side.at[of(q_side), :, mine], ROW)
      origin = unit.origin(q_side.at[of(q_side), :, mine])
      numbers = unit.numbers(operand_refs, b, n)

      def give_turn():
        if W > 1:
          plgpu.barrier_arrive(turn.at[lax.rem(w + 1, jnp.int32(W))])

      def take_turn():
        if W > 1:
          plgpu.barrier_wait(turn.at[w])

      def step(masked: bool, t, carry):
        acc, *seen = carry
        slot = slot_of(t)
        products = unit.product(q_tile, k_tiles.at[slot], meanwhile=give_turn)
        plgpu.barrier_arrive(k_free.at[slot])
        keys = pl.ds(0, bk) if one else keys_of(t)
        tiles = unit.operands_at(operand_refs, layout, b, n, mine, keys, numbers)
        facts = unit.facts(q_facts, unit.side(k_sides.at[slot], COLUMN), b, n, tiles, origin=origin)
        weigh = inlined(lambda *of: visit(*of, facts=facts, masked=masked))
        weights, factor, seen = weigh(products, seen)
        if factor is not None:
          acc = acc * unit.wide(factor, acc.shape)
        weights = weights.astype(v.dtype)
        acc, weights, *seen = lax.optimization_barrier((acc, weights, *seen))
        plgpu.barrier_wait(v_full.at[slot])
        take_turn()

        def next_keys():
          ahead = t + 1
          pl.when(ahead < total)(lambda: plgpu.barrier_wait(k_full.at[slot_of(ahead)]))

        acc = unit.add(acc, weights, v_tiles.at[slot], meanwhile=next_keys)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, *seen

      pl.when(w == W - 1)(give_turn)
      plgpu.barrier_wait(q_full.at[w])
      pl.when(total > 0)(lambda: plgpu.barrier_wait(k_full.at[0]))
      take_turn()
      statistic = functools.partial(unit.full, (bq,), layout=ROW)
      lowest = 0.0 if algebra.height is None else -jnp.inf
      carry = (
        unit.full((bq, V), 0.0, TILE), statistic(0.0), statistic(lowest),
        statistic(full * bk if algebra.counts else 0.0),
      )  # fmt: skip
      if whole_occurs:
        carry = lax.fori_loop(0, full, functools.partial(step, False), carry)
      if some_occurs:
        carry = lax.fori_loop(full, total, functools.partial(step, True), carry)
      pl.when(w < W - 1)(give_turn)
      acc, *seen = carry
      out[b, mine, n] = acc
      for row, x in zip((MASS, PEAK, COUNT), seen, strict=True):
        stats[b, n, row, mine] = x

  ring = functools.partial(plgpu.Barrier, num_barriers=stages)
  out, stats = run(
    kernel, "attnx_forward", B * N * lines, W,
    [((B, rows, N, V), F32), ((B, N, 3, rows), F32)],
    dict(
      q_tiles=smem(W, bq, H, dtype=q.dtype),
      k_tiles=smem(stages, bk, H, dtype=k.dtype),
      v_tiles=smem(stages, bk, V, dtype=v.dtype),
      k_sides=plgpu.SMEM((stages, 3, bk), jnp.int32),
      q_full=plgpu.Barrier(num_barriers=W),
      k_full=ring(num_arrivals=2),
      v_full=ring(),
      k_free=ring(num_arrivals=W),
      v_free=ring(num_arrivals=W),
      turn=plgpu.Barrier(num_barriers=W),
    ),
    interpret,
    *plan, q_side, k_side, *operands,
    whole(q, rows, 1, interpret), whole(k, columns, 1, interpret), whole(v, columns, 1, interpret),
  )  # fmt: skip
  return out[:, :T], stats[..., :T]


def _visit(products, seen, *, facts: Facts, masked: bool, unit: Warpgroup, algebra: Algebra):
  """Weights of a tile that read values, the factor by which earlier sums shrink, or None, and

  the mass, peak and count of its rows after it.
  """
  mass, peak, count = seen
  scores, visible, told = algebra.masked(products, facts, masked)
  if algebra.height is None:
    factor, origin = None, unit.full(peak.shape, 0.0, ROW)
  else:
    height = algebra.height(scores)
    height = height if told is True else jnp.where(told, height, -jnp.inf)
    before, peak = peak, jnp.maximum(peak, jnp.max(height, axis=1) * algebra.unit)
    origin = jnp.maximum(peak, FLOOR)  # finite where nothing was seen
    factor = algebra.exp(before - origin)
    mass = mass * factor
  weights = algebra.weigh(scores, told, unit.wide(origin, scores.shape))
  mass = mass + jnp.sum(jnp.abs(weights) if algebra.signed else weights, axis=1)
  if masked and algebra.counts:
    count = count + jnp.sum(jnp.where(visible, 1.0, 0.0), axis=1)
  return algebra.edit(weights, facts), factor, (mass, peak, count)
