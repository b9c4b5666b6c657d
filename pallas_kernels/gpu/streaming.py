"""Streaming attention on Hopper GPUs: a fold over tiles of keys.

One warpgroup moves tiles of keys and values through rings in shared memory; the others multiply,
each with queries of its own. They take turns at the tensor cores, so that one multiplies while the
others weigh; in a turn a tile of values is added, and without a pause the next tile of keys
multiplied, at the end of a line with the queries of the next.
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
from pallas_kernels.gpu.rings import (
  REGISTERS, Line, Turns, drain, fill, free, ready, ring, run, tiles_of, wait, write,
)  # fmt: skip
from pallas_kernels.gpu.tiles import (
  COLUMN, ROW, SHARED, TILE, Blocks, Order, Warpgroup, eights, inlined, lists, smem, somewhere,
  whole,
)  # fmt: skip
from pallas_kernels.visits import Operand

F32 = jnp.float32
SIZE, COUNT = range(2)  # rows of the statistics that `forward` returns


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
  """sum_j w_j v_j of every query over its visible keys, and by what it was measured.

  Where the algebra has peaks, the output is divided by the mass, sum_j |w_j|, of which the
  logarithm is returned: nothing of float32 goes to memory that is as large as the output.

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
    out (B, T, N, V) and statistics (B, N, 2, T) float32 with rows SIZE and COUNT. Of an algebra
    that has peaks, out is divided by the mass and in the dtype of q, 0 where nothing was seen, and
    SIZE is the logarithm of the mass, in the unit of peaks, -inf where nothing was seen. Otherwise
    out is float32 and SIZE the mass.
  """
  (B, T, N, H), (_, S, K, V) = q.shape, v.shape
  _, lines, length = kinds.shape
  bq, bk, W, stages = blocks.q, blocks.k, blocks.warpgroups, blocks.stages
  rows, columns = lines * blocks.line, length * bk
  assert k.shape == (B, S, K, H) and N % K == 0, (q.shape, k.shape, v.shape)
  assert q_side.shape[2] == rows >= T and k_side.shape[2] == columns >= S, (T, S, blocks)
  kinds = somewhere(kinds)
  plan, unit = lists(kinds), Warpgroup(interpret)
  order = Order.of(B * N, lines, S * (H + V) * q.dtype.itemsize * K // N)
  one = all(x.shape[2:] == (1, 1) for x in operands)
  divided = algebra.height is not None
  visit = functools.partial(_visit, unit=unit, algebra=algebra)
  tile = functools.partial(smem, dtype=q.dtype)
  size = (W * bq * H + stages * bk * (H + V)) * q.dtype.itemsize
  ahead = 2 if size + W * bq * H * q.dtype.itemsize <= SHARED else 1  # lines whose queries fit
  staged = divided and V == H and ahead > 1  # out leaves by way of the queries that it answers

  def kernel(dealt, shares, at, counts, q_side, k_side, *refs, q_ring, k_ring, v_ring, turn):
    *operand_refs, q, k, v, out, stats = refs
    w, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    line_of = lambda i: Line.at(order, dealt[block, i], N, counts, at, bk)
    own = shares[block]

    @pl.when(w == W)
    def _move():
      plgpu.set_max_registers(REGISTERS[W][1], action="decrease")

      def move(i, before):
        here = line_of(i)
        b, head = here.b, lax.div(here.n, jnp.int32(N // K))

        @pl.loop(0, here.visits)
        def _(t):
          fill(k_ring, before + t, k.at[b, here.tile(t), head])

          @pl.when(t == 0)
          def _():
            mine = [pl.ds(here.line * blocks.line + c * bq, bq) for c in range(W)]
            fill(q_ring, i, [q.at[b, rows, here.n] for rows in mine])

          at = here.tile(t)
          fill(v_ring, before + t, v.at[b, at, head], k_side.at[here.of(k_side), :, at])

        return before + here.visits

      visits = lax.fori_loop(0, own, move, jnp.int32(0))
      drain(own, q_ring)
      drain(visits, k_ring, v_ring)

    @pl.when(w < W)
    def _multiply():
      plgpu.set_max_registers(REGISTERS[W][0], action="increase")
      turns = Turns(turn, w, W)

      def multiply(i, carry):
        before, line, products = carry
        here, following = Line(*line, at, bk, 1), line_of(jnp.minimum(i + 1, own - 1))
        b, n, mine = here.b, here.n, pl.ds(here.line * blocks.line + w * bq, bq)
        q_facts = unit.side(q_side.at[here.of(q_side), :, mine], ROW)
        origin = unit.origin(q_side.at[here.of(q_side), :, mine])
        numbers = unit.numbers(operand_refs, b, n)

        def step(masked: bool, t, carry):
          """Adds the values of a visit, and multiplies for the next, maybe of another line."""
          products, acc, *seen = carry
          last = t + 1 == here.visits
          follows = jnp.logical_not(last) | (i + 1 < own)
          if ahead == 1:
            pl.when(last)(lambda: free(q_ring, i))
          v_tile, k_facts = wait(v_ring, before + t)
          keys = pl.ds(0, bk) if one else here.tile(t)
          tiles = unit.operands_at(operand_refs, layout, b, n, mine, keys, numbers)
          facts = unit.facts(q_facts, unit.side(k_facts, COLUMN), b, n, tiles, origin=origin)
          weigh = inlined(lambda *of: visit(*of, facts=facts, masked=masked))
          weights, factor, seen = weigh(products, seen)
          if factor is not None:
            acc = acc * unit.wide(factor, acc.shape)
          weights = weights.astype(v.dtype)
          acc, weights, *seen = lax.optimization_barrier((acc, weights, *seen))
          ready(before + t + 1, follows, k_ring)
          ready(i + 1, last & follows, q_ring)
          (q_tiles,), (k_tile,) = (
            tiles_of(q_ring, i + last.astype(jnp.int32)), tiles_of(k_ring, before + t + 1)
          )  # fmt: skip
          turns.take()
          pair = q_tiles.at[w], k_tile
          (acc,), products = unit.sums([(acc, weights, v_tile)], pair, meanwhile=turns.give)
          free(v_ring, before + t)
          pl.when(follows)(lambda: free(k_ring, before + t + 1))
          return products, acc, *seen

        statistic = functools.partial(unit.full, (bq,), layout=ROW)
        carry = (
          products, unit.full((bq, V), 0.0, TILE), statistic(0.0),
          statistic(-jnp.inf if divided else 0.0),
          statistic(here.full * bk if algebra.counts else 0.0),
        )  # fmt: skip
        products, acc, mass, peak, count = here.fold(step, carry, kinds)
        if divided:
          acc = acc * unit.wide(1.0 / jnp.where(mass > 0.0, mass, 1.0), acc.shape)
          mass = peak + jnp.log(mass) * (1 / algebra.base)
        stats[b, n, SIZE, mine] = mass
        stats[b, n, COUNT, mine] = count
        if staged:
          write((tiles_of(q_ring, i)[0].at[w], acc, out.at[b, mine, n]))
        else:
          out[b, mine, n] = acc.astype(out.dtype)
        if ahead > 1:
          free(q_ring, i)
        return before + here.visits, following.numbers, products

      turns.begin()
      (q_tiles,), (k_tile,) = wait(q_ring, 0), wait(k_ring, 0)
      turns.take()
      products = unit.product(q_tiles.at[w], k_tile, meanwhile=turns.give)
      free(k_ring, 0)
      lax.fori_loop(0, own, multiply, (jnp.int32(0), line_of(0).numbers, products))
      turns.end()

  out, stats = run(
    kernel, "attnx_forward", order.blocks, W,
    [((B, eights(T) if staged and not interpret else rows, N, V), q.dtype if divided else F32),
     ((B, N, 2, rows), F32)],
    dict(
      q_ring=ring(tile(ahead, W, bq, H), readers=W, arrivals=W),
      k_ring=ring(tile(stages, bk, H), readers=W),
      v_ring=ring(tile(stages, bk, V), plgpu.SMEM((stages, 3, bk), jnp.int32), readers=W),
      turn=plgpu.Barrier(num_barriers=W),
    ),
    interpret,
    *order.shares(plan.counts.sum(-1)), *plan, q_side, k_side, *operands,
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
  return algebra.edited(weights, facts), factor, (mass, peak, count)
