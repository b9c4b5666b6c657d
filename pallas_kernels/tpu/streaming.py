"""Streaming attention on TPU: a fold over tiles of keys, and its reverse.

The grid walks over a list of the tiles that a mask leaves to visit, so that keys of any length
stream from HBM while the sums of a block of queries stay in VMEM. Within a tile, pieces of some
rows and columns are computed at once; the products of the pieces ahead are started before the
weights of the present one are needed, so that the matrix units work while the vector units do.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.algebra import LANES, Algebra, Facts
from pallas_kernels.tpu.walk import (
  SUBLANES, Blocks, Call, Place, ahead, block_of, by_kind, dot, eight, facts_of, inputs_of, lanes,
  run, sides_of, stand, upright, weigh, wide,
)  # fmt: skip
from pallas_kernels.varying import varying
from pallas_kernels.visits import EMPTY, FIRST, LAST, Operand, occurring, visits

F32 = jnp.float32
SIZE, COUNT = range(2)  # rows of the statistics that `forward` returns
ORIGIN, SLOPE = range(2)  # rows of what the backward kernels are told


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
  logarithm is returned: of 16-bit inputs, nothing of float32 is written that is as large as the
  output.

  Args:
    q: (B, N, T, H), T a multiple of `blocks.q`.
    k, v: (B, K, S, H) and (B, K, S, V), S a multiple of `blocks.k`; K divides N.
    q_side, k_side: (#B, 3, T) and (#B, 3, S) int32, the fields of `Side`.
    operands: arrays that `layout` describes, one for one.
    kinds: (#B, T / blocks.q, S / blocks.k) int32: EMPTY, PARTIAL or FULL; NumPy or traced.
    algebra: what becomes of products.
    layout: how the operands lie.
    blocks: how the work is cut.
    interpret: emulate on CPU, for tests: True, or `pltpu.InterpretParams`.

  Returns:
    out (B, N, T, V) and statistics (B, N, 8, T) float32, of which rows SIZE and COUNT are meant. Of
    an algebra that has peaks, out is divided by the mass and in the dtype of q, 0 where that is 0,
    and SIZE is the logarithm of the mass, in the unit of peaks, -inf where that is 0. Otherwise out
    is float32 and SIZE the mass.
  """
  call, plan = Call.of(q, k, v, blocks), visits(kinds)
  divided = algebra.height is not None
  where = lambda b, n, t, batch, line, at, flags: Place(b + batch[t], n, line[t], at[t])
  operand_specs, row, column = inputs_of(call, blocks, where, operands, layout)
  body = functools.partial(_forward_tile, algebra=algebra, blocks=blocks)
  whole, some = occurring(kinds)

  def kernel(batch, line, at, flags, *refs):
    *facts_refs, q_ref, k_ref, v_ref, out_ref, stats_ref = refs[:-6]
    acc, mass, peak, count, standing, full = refs[-6:]
    t = pl.program_id(2)
    b, n = pl.program_id(0) + batch[t], pl.program_id(1)

    @pl.when((flags[t] & FIRST) > 0)
    def _():
      for ref in (acc, mass, count):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
      peak[...] = jnp.full(peak.shape, -jnp.inf if divided else 0.0, jnp.float32)
      full[0] = 0
      stand(facts_refs[0], standing)

    def visit(masked: bool):
      if algebra.counts and not masked:
        full[0] += blocks.k
      facts = facts_of(facts_refs, standing, blocks, b, n)
      body(facts, masked, q_ref, k_ref, v_ref, acc, mass, peak, count)

    by_kind(flags[t], visit, whole, some)

    @pl.when((flags[t] & LAST) > 0)
    def _():
      stats_ref[...] = jnp.zeros(stats_ref.shape, jnp.float32)
      if divided:
        _divide(acc, mass, peak, out_ref, stats_ref, algebra=algebra, rows=blocks.rows)
      else:
        out_ref[...] = acc[...]
        stats_ref[SIZE : SIZE + 1] = jnp.sum(mass[...].T, axis=0, keepdims=True)
      seen = jnp.sum(count[...].T, axis=0, keepdims=True)
      stats_ref[COUNT : COUNT + 1] = seen + full[0].astype(jnp.float32)

  statistic = pltpu.VMEM((blocks.q, LANES), jnp.float32)
  return run(
    kernel, plan, (call.B if plan.shared else 1, call.N, plan.count),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V)],
    [row(call.V), _statistics(blocks, where)],
    [((call.B, call.N, call.T, call.V), q.dtype if divided else F32),
     ((call.B, call.N, SUBLANES, call.T), F32)],
    [pltpu.VMEM((blocks.q, call.V), jnp.float32), *[statistic] * 3,
     upright(blocks.q), pltpu.SMEM((1,), jnp.int32)],
    (eight(q_side), eight(k_side), *operands, q, k, v),
    interpret, "attnx_forward",
  )  # fmt: skip


def _forward_tile(facts, masked, q_ref, k_ref, v_ref, acc, mass, peak, count, *, algebra, blocks):
  """merge(seen, visit(piece)) for every piece of a tile."""
  R, C = blocks.rows, blocks.columns
  products = lambda r, c: dot(q_ref[pl.ds(r, R)], k_ref[pl.ds(c, C)], (1, 1))
  for (r, c), product in ahead(blocks.pieces(), products, blocks.ahead):
    rows, of = pl.ds(r, R), facts(r, c)
    scores, visible, told = algebra.masked(product, of, masked)
    weights, factor = weigh(algebra, scores, told, peak, mass, rows)
    edited = algebra.edit(weights, of).astype(v_ref.dtype)
    read = dot(edited, v_ref[pl.ds(c, C)], (1, 0))
    seen = acc[rows]
    acc[rows] = (seen if factor is None else seen * wide(factor, read.shape[1])) + read
    if algebra.counts and masked:
      count[rows] += lanes(jnp.where(visible, 1.0, 0.0))


def _divide(acc, mass, peak, out_ref, stats_ref, *, algebra: Algebra, rows: int):
  """Writes a block of acc / mass, and the logarithm of the mass, some rows at once."""

  @pl.loop(0, acc.shape[0] // rows)  # unrolled, it spills registers
  def _(at):
    here = pl.ds(pl.multiple_of(at * rows, rows), rows)
    total = jnp.sum(mass[here], axis=1, keepdims=True)
    out_ref[here] = (acc[here] / jnp.where(total > 0.0, total, 1.0)).astype(out_ref.dtype)
    size = peak[here] + jnp.log(total) * (1 / algebra.base)
    stats_ref[SIZE : SIZE + 1, here] = size.T[:1]


def _pulled(
  algebra: Algebra, layout, masked: bool, facts: Facts, origin, slope, number: int | None = None
):
  """Products and cotangents of the weights that read to the weights and the cotangents of both.

  Returns:
    A function (products, cotangents) -> (edited weights, cotangents of products, and a list of
    those of the floating operands that are handed over by row, or of operand `number` alone).
  """
  kinds = list(zip(facts.operands, layout, strict=True))
  moving = [not o.pairs and jnp.issubdtype(x.dtype, jnp.floating) for x, o in kinds]
  if number is not None:
    moving = [n == number for n in range(len(kinds))]

  def weights(products, moved):
    rest = iter(moved)
    operands = tuple(next(rest) if m else x for x, m in zip(facts.operands, moving))
    of = facts._replace(operands=operands)
    scores, _, told = algebra.masked(products, of, masked)
    w = algebra.weigh(scores, told, origin)
    return jnp.abs(w) if algebra.signed else w, algebra.edit(w, of)

  def pull(products, cotangents):
    moved = [x for x, m in zip(facts.operands, moving) if m]
    (_, edited), back = jax.vjp(weights, products, moved)
    return edited, *back((jnp.broadcast_to(slope, products.shape), cotangents))

  return pull


def gradient_of_tables(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> list[jax.Array]:  # fmt: skip
  """What out and mass pull back to the floating operands that are handed over by row.

  Args: as for `gradients`.

  Returns:
    For each such operand (#B, #N, #T, X) an array (B, N, T or T / blocks.q, X) float32, to be
    summed where the operand has an axis of one.
  """
  call, plan = Call.of(q, k, v, blocks), visits(kinds)
  where = lambda b, n, t, batch, line, at, flags: Place(b + batch[t], n, line[t], at[t])
  operand_specs, row, column = inputs_of(call, blocks, where, operands, layout)
  moving = by_row(operands, layout)
  whole, some = occurring(kinds)
  length = lambda x: blocks.q if x.shape[2] > 1 else 1
  R, C = blocks.rows, blocks.columns

  def kernel(batch, line, at, flags, *refs):
    facts_refs, rest = refs[: 2 + len(operands)], refs[2 + len(operands) :]
    q_ref, k_ref, v_ref, rows_ref, grad_ref, *table_refs, origin, slope, standing = rest
    t = pl.program_id(2)
    b, n = pl.program_id(0) + batch[t], pl.program_id(1)

    @pl.when((flags[t] & FIRST) > 0)
    def _():
      told = rows_ref[...].T
      for ref, which in ((origin, ORIGIN), (slope, SLOPE)):
        ref[...] = jnp.broadcast_to(told[:, which : which + 1], ref.shape)
      stand(facts_refs[0], standing)
      for ref in table_refs:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def start(r, c):
      rows, columns = pl.ds(r, R), pl.ds(c, C)
      return dot(q_ref[rows], k_ref[columns], (1, 1)), dot(grad_ref[rows], v_ref[columns], (1, 1))

    def visit(masked: bool):
      facts = facts_of(facts_refs, standing, blocks, b, n)
      for (r, c), of in ahead(blocks.pieces(), start, blocks.ahead):
        rows = pl.ds(r, R)
        told = wide(origin[rows], C), wide(slope[rows], C)
        *_, moved = _pulled(algebra, layout, masked, facts(r, c), *told)(*of)
        for ref, table in zip(table_refs, moved, strict=True):
          ref[rows if ref.shape[0] > 1 else slice(None)] += table

    by_kind(flags[t], visit, whole, some)

  told = pltpu.VMEM((blocks.q, LANES), jnp.float32)
  grads = run(
    kernel, plan, (call.B if plan.shared else 1, call.N, plan.count),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V), _statistics(blocks, where), row(call.V)],
    [block_of((None, None, None, length(x), x.shape[3]), lambda p: (p.b, p.n, p.i, 0, 0), where)
     for x in moving],
    [((call.B, call.N, call.T // blocks.q, length(x), x.shape[3]), F32) for x in moving],
    [told, told, upright(blocks.q)],
    (eight(q_side), eight(k_side), *operands, q, k, v, rows, grad),
    interpret, "attnx_gradient_of_tables",
  )  # fmt: skip
  return [x.reshape(call.B, call.N, -1, x.shape[-1]) for x in grads]


def by_row(operands: Sequence[jax.Array], layout: Sequence[Operand]) -> list[jax.Array]:
  """The floating operands that are handed over by row."""
  kinds = zip(operands, layout, strict=True)
  return [x for x, o in kinds if not o.pairs and jnp.issubdtype(x.dtype, jnp.floating)]


def _statistics(blocks: Blocks, where) -> pl.BlockSpec:
  """Of what rows are told, or tell."""
  return block_of((None, None, SUBLANES, blocks.q), lambda p: (p.b, p.n, 0, p.i), where)


def gradients(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """What out and mass pull back to queries, keys and values, in one pass over the tiles.

  Blocks of keys are lines, so that dk and dv are summed in VMEM, over the heads that share them,
  too. dq is summed in HBM: a visit fetches what the lines before have left of its block while it
  computes its own part, adds the two, and sends them back while the next visit computes; no copy
  is begun before the last one has ended. Where the algebra turns, tiles are (K, Q): statistics of
  rows then lie along lanes, and no tile is transposed for its products with q and the cotangents.

  Args:
    q, k, v, q_side, k_side, operands, kinds, algebra, layout, blocks, interpret: as for `forward`.
    rows: (B, N, 8, T) float32; row ORIGIN is what weights are measured from, finite, and row SLOPE
      the cotangent of the mass of weights so measured.
    grad: (B, N, T, V), the cotangent of out.

  Returns:
    (B, N, T, H) float32, and (B, K, S, H) and (B, K, S, V) in the dtypes of k and v.
  """
  call, plan = Call.of(q, k, v, blocks), visits(kinds, by_key=True)
  group = call.N // call.K
  where = lambda b, kn, t, g, batch, line, at, flags: Place(
    b + batch[t], kn * group + g, at[t], line[t]
  )
  operand_specs, row, column = inputs_of(call, blocks, where, operands, layout)
  body = functools.partial(_gradients_of_tile, algebra=algebra, blocks=blocks, layout=layout)
  whole, some = occurring(kinds)

  def kernel(batch, line, at, flags, *refs):
    facts_refs, rest = refs[: 2 + len(operands)], refs[2 + len(operands) :]
    q_ref, k_ref, v_ref, rows_ref, grad_ref, _, dk_ref, dv_ref, sums = rest[:9]
    dq, dk, dv, block, standing, fetched, stored = rest[9:]
    t, g = pl.program_id(2), pl.program_id(3)
    b, n = pl.program_id(0) + batch[t], pl.program_id(1) * group + g
    begins, ends = (t == 0) & (g == 0), (t == pl.num_programs(2) - 1) & (g == group - 1)
    there = sums.at[b, n, pl.ds(pl.multiple_of(at[t] * blocks.q, blocks.q), blocks.q)]
    fetch = pltpu.make_async_copy(there, block, fetched)
    store = pltpu.make_async_copy(block, there, stored)

    @pl.when(begins)
    def _():  # so that there is always one copy to wait for
      block[...] = jnp.zeros(block.shape, jnp.float32)
      store.start()

    @pl.when(((flags[t] & FIRST) > 0) & (g == 0))
    def _():
      for ref in (dk, dv):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
      if algebra.turns:
        stand(facts_refs[1], standing)

    def midway():
      store.wait()
      fetch.start()

    def visit(masked: bool):
      if not algebra.turns:
        stand(facts_refs[0], standing)
      dq[...] = jnp.zeros(dq.shape, jnp.float32)
      facts = facts_of(facts_refs, standing, blocks, b, n, turned=algebra.turns)
      body(facts, masked, midway, q_ref, k_ref, v_ref, rows_ref, grad_ref, dq, dk, dv)
      fetch.wait()
      block[...] += dq[...]
      store.start()

    by_kind(flags[t], visit, whole, some)
    pl.when(ends)(store.wait)

    @pl.when(((flags[t] & LAST) > 0) & (g == group - 1))
    def _():
      dk_ref[...] = dk[...].astype(dk_ref.dtype)
      dv_ref[...] = dv[...].astype(dv_ref.dtype)

  f32 = lambda length, width: pltpu.VMEM((length, width), jnp.float32)
  inputs = (eight(q_side), eight(k_side), *operands, q, k, v, rows, grad)
  dk, dv, dq = run(
    kernel, plan, (call.B if plan.shared else 1, call.K, plan.count, group),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V), _statistics(blocks, where), row(call.V),
     pl.BlockSpec(memory_space=pl.ANY)],
    [column(call.H), column(call.V), pl.BlockSpec(memory_space=pl.ANY)],
    [(k.shape, k.dtype), (v.shape, v.dtype), (q.shape, F32)],
    [f32(blocks.q, call.H), f32(blocks.k, call.H), f32(blocks.k, call.V), f32(blocks.q, call.H),
     upright(blocks.k if algebra.turns else blocks.q),
     pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA],
    (*inputs, _zeros(q.shape, grad)),
    interpret, "attnx_gradients", aliases={4 + len(inputs): 2},
  )  # fmt: skip
  return dq, dk, dv


def _gradients_of_tile(
  facts, masked, midway, q_ref, k_ref, v_ref, rows_ref, grad_ref, dq, dk, dv,
  *, algebra, blocks, layout,
):  # fmt: skip
  """Adds those of every piece to dq, dk and dv, and calls `midway` between the pieces."""
  R, C = blocks.rows, blocks.columns
  turned = algebra.turns
  key = 0 if turned else 1  # the axis of a tile that runs along the keys

  def start(r, c):
    rows, columns = pl.ds(r, R), pl.ds(c, C)
    sides = (q_ref[rows], k_ref[columns]), (grad_ref[rows], v_ref[columns])
    return [dot(*(pair[::-1] if turned else pair), (1, 1)) for pair in sides]

  pieces = blocks.pieces()
  for n, ((r, c), of) in enumerate(ahead(pieces, start, blocks.ahead)):
    if n == len(pieces) // 2:
      midway()
    rows, columns = pl.ds(r, R), pl.ds(c, C)
    told = [rows_ref[which : which + 1, rows] for which in (ORIGIN, SLOPE)]
    if not turned:
      told = [_column(x) for x in told]
    edited, products, _ = _pulled(algebra, layout, masked, facts(r, c), *told)(*of)
    products = products.astype(q_ref.dtype)
    dq[rows] += dot(products, k_ref[columns], (key, 0))
    dk[columns] += dot(products, q_ref[rows], (1 - key, 0))
    dv[columns] += dot(edited.astype(grad_ref.dtype), grad_ref[rows], (1 - key, 0))


def _zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
  """Sums to begin with, which inside of `jax.shard_map` vary over the axes that `like` does."""
  return varying(jnp.zeros(shape, jnp.float32), like)


def _column(row: jax.Array) -> jax.Array:
  """(1, rows) to (rows, 1)."""
  return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def gradient_of_pairs(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, number: int, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> jax.Array:  # fmt: skip
  """What out and mass pull back to an operand of pairs, (#B, #N, #T, #S) float32.

  Arguments as for `gradients`, and the number of the operand. The axes over which it is
  one are walked innermost, so that a block of it is summed while it stays in fast memory.
  """
  call, of = Call.of(q, k, v, blocks), operands[number]
  kinds = kinds.max(0, keepdims=True) if kinds.shape[0] > 1 else kinds  # FULL means masked below
  B, N, T, S = of.shape
  by_key = T == 1 and S > 1
  plan = visits(kinds, by_key=by_key)
  order = [axis for axis, n in (("b", B), ("n", N)) if n > 1]
  order += ["t"] + [axis for axis in "bn" if axis not in order]
  inner = order[order.index("t") + 1 :]
  size = {"b": call.B, "n": call.N, "t": plan.count}

  def where(*grid):
    at, (_, line, other, _) = dict(zip(order, grid)), grid[3:]
    i, j = line[at["t"]], other[at["t"]]
    return Place(at["b"], at["n"], *((j, i) if by_key else (i, j)))

  operand_specs, row, column = inputs_of(call, blocks, where, operands, layout)

  def kernel(batch, line, at, flags, *refs):
    facts_refs, rest = refs[: 2 + len(operands)], refs[2 + len(operands) :]
    q_ref, k_ref, v_ref, rows_ref, grad_ref, _, out_ref, standing = rest
    place = {axis: pl.program_id(n) for n, axis in enumerate(order)}
    t = place["t"]
    begins = functools.reduce(
      jnp.logical_and, [place[axis] == 0 for axis in inner], jnp.array(True)
    )
    if T == 1 and S == 1:
      begins &= t == 0
    elif T == 1 or S == 1:
      begins &= (flags[t] & FIRST) > 0

    @pl.when(begins)
    def _():
      out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    @pl.when((flags[t] & 3) > EMPTY)
    def _():
      stand(facts_refs[0], standing)
      facts = facts_of(facts_refs, standing, blocks, place["b"], place["n"])
      for r, c in blocks.pieces():
        R, C = pl.ds(r, blocks.rows), pl.ds(c, blocks.columns)
        told = [_column(rows_ref[which : which + 1, R]) for which in (ORIGIN, SLOPE)]
        pull = _pulled(algebra, layout, True, facts(r, c), *told, number=number)
        *_, (pair,) = pull(dot(q_ref[R], k_ref[C], (1, 1)), dot(grad_ref[R], v_ref[C], (1, 1)))
        out_ref[R if T > 1 else slice(None), C if S > 1 else slice(None)] += pair

  block: Any = tuple(1 if n == 1 else cut for n, cut in ((T, blocks.q), (S, blocks.k)))
  out_spec = block_of(
    (None, None, *block),
    lambda p: tuple(0 if n == 1 else i for n, i in zip(of.shape, p)), where,
  )  # fmt: skip
  inputs = (eight(q_side), eight(k_side), *operands, q, k, v, rows, grad)
  return run(
    kernel, plan, tuple(size[axis] for axis in order),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V), _statistics(blocks, where), row(call.V),
     pl.BlockSpec(memory_space=pl.ANY)],
    [out_spec], [(of.shape, F32)], [upright(blocks.q)], (*inputs, _zeros(of.shape, grad)),
    interpret, "attnx_gradient_of_pairs", aliases={4 + len(inputs): 0}, apart=0,
  )[0]  # fmt: skip
