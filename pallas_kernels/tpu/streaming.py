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
from pallas_kernels.visits import EMPTY, FIRST, LAST, Operand, occurring, visits

F32 = jnp.float32
MASS, PEAK, COUNT = range(3)  # rows of the statistics that `forward` returns
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
  """sum_j w_j v_j of every query over its visible keys, and what it was measured by.

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
    out (B, N, T, V) float32, and statistics (B, N, 8, T) float32, of which rows MASS, PEAK and
    COUNT are meant; the peak is 0 where the algebra has none.
  """
  call, plan = Call.of(q, k, v, blocks), visits(kinds)
  peaks = algebra.height is not None
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
      peak[...] = jnp.full(peak.shape, -jnp.inf if peaks else 0.0, jnp.float32)
      full[0] = 0
      stand(facts_refs[0], standing)

    def visit(masked: bool):
      if not masked:
        full[0] += blocks.k
      facts = facts_of(facts_refs, standing, blocks, b, n)
      body(facts, masked, q_ref, k_ref, v_ref, acc, mass, peak, count)

    by_kind(flags[t], visit, whole, some)

    @pl.when((flags[t] & LAST) > 0)
    def _():
      out_ref[...] = acc[...]
      stats_ref[...] = jnp.zeros(stats_ref.shape, jnp.float32)
      stats_ref[MASS : MASS + 1] = jnp.sum(mass[...].T, axis=0, keepdims=True)
      stats_ref[PEAK : PEAK + 1] = peak[...].T[:1]
      seen = jnp.sum(count[...].T, axis=0, keepdims=True)
      stats_ref[COUNT : COUNT + 1] = seen + full[0].astype(jnp.float32)

  statistic = pltpu.VMEM((blocks.q, LANES), jnp.float32)
  return run(
    kernel, plan, (call.B if plan.shared else 1, call.N, plan.count),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V)],
    [row(call.V),
     block_of((None, None, SUBLANES, blocks.q), lambda p: (p.b, p.n, 0, p.i), where)],
    [((call.B, call.N, call.T, call.V), F32), ((call.B, call.N, SUBLANES, call.T), F32)],
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
    if masked:
      count[rows] += lanes(jnp.where(visible, 1.0, 0.0))


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


def gradient_of_queries(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
  """What out and mass pull back to queries and to the floating operands by row.

  Args:
    q, k, v, q_side, k_side, operands, kinds, algebra, layout, blocks, interpret: as for `forward`.
    rows: (B, N, 8, T) float32; row ORIGIN is the peak, finite, and row SLOPE the cotangent of mass.
    grad: (B, N, T, V), the cotangent of out.

  Returns:
    (B, N, T, H) in the dtype of q, and for each such operand (#B, #N, #T, X) an array (B, N, T or
    T / blocks.q, X) float32, to be summed where the operand has an axis of one.
  """
  call, plan = Call.of(q, k, v, blocks), visits(kinds)
  where = lambda b, n, t, batch, line, at, flags: Place(b + batch[t], n, line[t], at[t])
  operand_specs, row, column = inputs_of(call, blocks, where, operands, layout)
  moving = [
    x for x, o in zip(operands, layout) if not o.pairs and jnp.issubdtype(x.dtype, jnp.floating)
  ]
  body = functools.partial(_query_tile, algebra=algebra, blocks=blocks, layout=layout)
  whole, some = occurring(kinds)
  tables = [
    block_of((None, None, None, blocks.q if x.shape[2] > 1 else 1, x.shape[3]),
             lambda p: (p.b, p.n, p.i, 0, 0), where)
    for x in moving
  ]  # fmt: skip

  def kernel(batch, line, at, flags, *refs):
    facts_refs, rest = refs[: 2 + len(operands)], refs[2 + len(operands) :]
    q_ref, k_ref, v_ref, rows_ref, grad_ref, dq_ref, *table_refs = rest[:-4]
    dq, origin, slope, standing = rest[-4:]
    t = pl.program_id(2)
    b, n = pl.program_id(0) + batch[t], pl.program_id(1)

    @pl.when((flags[t] & FIRST) > 0)
    def _():
      told = rows_ref[...].T
      for ref, which in ((origin, ORIGIN), (slope, SLOPE)):
        ref[...] = jnp.broadcast_to(told[:, which : which + 1], ref.shape)
      stand(facts_refs[0], standing)
      for ref in (dq, *table_refs):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def visit(masked: bool):
      facts = facts_of(facts_refs, standing, blocks, b, n)
      body(facts, masked, q_ref, k_ref, v_ref, grad_ref, origin, slope, dq, table_refs)

    by_kind(flags[t], visit, whole, some)

    @pl.when((flags[t] & LAST) > 0)
    def _():
      dq_ref[...] = dq[...].astype(dq_ref.dtype)

  told = pltpu.VMEM((blocks.q, LANES), jnp.float32)
  lines = call.T // blocks.q
  out, *grads = run(
    kernel, plan, (call.B if plan.shared else 1, call.N, plan.count),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V),
     block_of((None, None, SUBLANES, blocks.q), lambda p: (p.b, p.n, 0, p.i), where), row(call.V)],
    [row(call.H), *tables],
    [(q.shape, q.dtype),
     *(((call.B, call.N, lines, blocks.q if x.shape[2] > 1 else 1, x.shape[3]), F32)
       for x in moving)],
    [pltpu.VMEM((blocks.q, call.H), jnp.float32), told, told, upright(blocks.q)],
    (eight(q_side), eight(k_side), *operands, q, k, v, rows, grad),
    interpret, "attnx_gradient_of_queries",
  )  # fmt: skip
  return out, [x.reshape(call.B, call.N, -1, x.shape[-1]) for x in grads]


def _query_tile(
  facts, masked, q_ref, k_ref, v_ref, grad_ref, origin, slope, dq, table_refs,
  *, algebra, blocks, layout,
):  # fmt: skip
  R, C = blocks.rows, blocks.columns

  def start(r, c):
    rows, columns = pl.ds(r, R), pl.ds(c, C)
    return dot(q_ref[rows], k_ref[columns], (1, 1)), dot(grad_ref[rows], v_ref[columns], (1, 1))

  for (r, c), of in ahead(blocks.pieces(), start, blocks.ahead):
    rows = pl.ds(r, R)
    told = wide(origin[rows], C), wide(slope[rows], C)
    _, products, tables = _pulled(algebra, layout, masked, facts(r, c), *told)(*of)
    dq[rows] += dot(products.astype(k_ref.dtype), k_ref[pl.ds(c, C)], (1, 0))
    for ref, table in zip(table_refs, tables, strict=True):
      ref[rows if ref.shape[0] > 1 else slice(None)] += table


def gradient_of_keys(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """What out and mass pull back to keys and values, summed over the heads that share them.

  Arguments as for `gradient_of_queries`. Where the algebra turns, tiles are (K, Q): statistics of
  rows then lie along lanes, and no tile is transposed for the two products with it.

  Returns:
    (B, K, S, H) and (B, K, S, V), in the dtypes of k and v.
  """
  call, plan = Call.of(q, k, v, blocks), visits(kinds, by_key=True)
  group = call.N // call.K
  where = lambda b, kn, t, g, batch, line, at, flags: Place(
    b + batch[t], kn * group + g, at[t], line[t]
  )
  operand_specs, row, column = inputs_of(call, blocks, where, operands, layout)
  body = functools.partial(_key_tile, algebra=algebra, blocks=blocks, layout=layout)
  whole, some = occurring(kinds)

  def kernel(batch, line, at, flags, *refs):
    facts_refs, rest = refs[: 2 + len(operands)], refs[2 + len(operands) :]
    q_ref, k_ref, v_ref, rows_ref, grad_ref, dk_ref, dv_ref, dk, dv, standing = rest
    t, g = pl.program_id(2), pl.program_id(3)
    b, n = pl.program_id(0) + batch[t], pl.program_id(1) * group + g

    @pl.when(((flags[t] & FIRST) > 0) & (g == 0))
    def _():
      for ref in (dk, dv):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
      if algebra.turns:
        stand(facts_refs[1], standing)

    def visit(masked: bool):
      if not algebra.turns:
        stand(facts_refs[0], standing)
      facts = facts_of(facts_refs, standing, blocks, b, n, turned=algebra.turns)
      body(facts, masked, q_ref, k_ref, v_ref, rows_ref, grad_ref, dk, dv)

    by_kind(flags[t], visit, whole, some)

    @pl.when(((flags[t] & LAST) > 0) & (g == group - 1))
    def _():
      dk_ref[...] = dk[...].astype(dk_ref.dtype)
      dv_ref[...] = dv[...].astype(dv_ref.dtype)

  dk, dv = run(
    kernel, plan, (call.B if plan.shared else 1, call.K, plan.count, group),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V),
     block_of((None, None, SUBLANES, blocks.q), lambda p: (p.b, p.n, 0, p.i), where), row(call.V)],
    [column(call.H), column(call.V)],
    [(k.shape, k.dtype), (v.shape, v.dtype)],
    [pltpu.VMEM((blocks.k, call.H), jnp.float32), pltpu.VMEM((blocks.k, call.V), jnp.float32),
     upright(blocks.k if algebra.turns else blocks.q)],
    (eight(q_side), eight(k_side), *operands, q, k, v, rows, grad),
    interpret, "attnx_gradient_of_keys",
  )  # fmt: skip
  return dk, dv


def _key_tile(
  facts, masked, q_ref, k_ref, v_ref, rows_ref, grad_ref, dk, dv, *, algebra, blocks, layout
):
  R, C = blocks.rows, blocks.columns
  turned = algebra.turns

  def start(r, c):
    rows, columns = pl.ds(r, R), pl.ds(c, C)
    sides = (q_ref[rows], k_ref[columns]), (grad_ref[rows], v_ref[columns])
    return [dot(*(pair[::-1] if turned else pair), (1, 1)) for pair in sides]

  for (r, c), of in ahead(blocks.pieces(), start, blocks.ahead):
    rows, columns = pl.ds(r, R), pl.ds(c, C)
    told = [rows_ref[which : which + 1, rows] for which in (ORIGIN, SLOPE)]
    if not turned:
      told = [_column(x) for x in told]
    edited, products, _ = _pulled(algebra, layout, masked, facts(r, c), *told)(*of)
    over = 1 if turned else 0
    dk[columns] += dot(products.astype(q_ref.dtype), q_ref[rows], (over, 0))
    dv[columns] += dot(edited.astype(grad_ref.dtype), grad_ref[rows], (over, 0))


def _column(row: jax.Array) -> jax.Array:
  """(1, rows) to (rows, 1)."""
  return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def gradient_of_pairs(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, number: int, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> jax.Array:  # fmt: skip
  """What out and mass pull back to an operand of pairs, (#B, #N, #T, #S) float32.

  Arguments as for `gradient_of_queries`, and the number of the operand. The axes over which it is
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
  stats = block_of((None, None, SUBLANES, blocks.q), lambda p: (p.b, p.n, 0, p.i), where)

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
     row(call.H), column(call.H), column(call.V), stats, row(call.V),
     pl.BlockSpec(memory_space=pl.ANY)],
    [out_spec], [(of.shape, F32)], [upright(blocks.q)], (*inputs, jnp.zeros(of.shape, jnp.float32)),
    interpret, "attnx_gradient_of_pairs", aliases={4 + len(inputs): 0},
  )[0]  # fmt: skip
