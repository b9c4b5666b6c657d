"""Gradients of streaming attention on TPU: what output and mass pull back, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.algebra import LANES, Algebra, Facts
from pallas_kernels.tpu.walk import (
  SUBLANES, Blocks, Call, Place, ahead, asks, block_of, by_kind, dot, doubled, eight, facts_of,
  inputs_of, leading, parts, run, sides_of, stand, statistics, upright, wide,
)  # fmt: skip
from pallas_kernels.varying import varying
from pallas_kernels.visits import EMPTY, FIRST, LAST, Operand, occurring, visits

F32 = jnp.float32
ORIGIN, SLOPE = range(2)  # rows of what the kernels are told


def _pulled(
  algebra: Algebra, layout, masked: bool, facts: Facts, origin, slope, *,
  number: int | None = None, given: float = 1.0,
):  # fmt: skip
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
    scores, _, told = algebra.masked(products, of, masked, given=given)
    w = algebra.weigh(scores, told, origin)
    return jnp.abs(w) if algebra.signed else w, algebra.edited(w, of)

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
    q_ref, k_ref, v_ref, rows_ref, grad_ref, *table_refs, told, standing = rest
    t = pl.program_id(2)
    b, n = pl.program_id(0) + batch[t], pl.program_id(1)

    @pl.when((flags[t] & FIRST) > 0)
    def _():
      stand(rows_ref, told)
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
        row = [wide(told[which, rows], C) for which in (ORIGIN, SLOPE)]
        *_, moved = _pulled(algebra, layout, masked, facts(r, c), *row)(*of)
        for ref, table in zip(table_refs, moved, strict=True):
          ref[rows if ref.shape[0] > 1 else slice(None)] += table

    by_kind(flags[t], visit, whole, some)

  grads = run(
    kernel, plan, (call.B if plan.shared else 1, call.N, plan.count),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V), statistics(blocks, where), row(call.V)],
    [block_of((None, None, None, length(x), x.shape[3]), lambda p: (p.b, p.n, p.i, 0, 0), where)
     for x in moving],
    [((call.B, call.N, call.T // blocks.q, length(x), x.shape[3]), F32) for x in moving],
    [pltpu.VMEM((2, blocks.q, LANES), F32), upright(blocks.q)],
    (eight(q_side), eight(k_side), *operands, q, k, v, rows, grad),
    interpret, "attnx_gradient_of_tables",
  )  # fmt: skip
  return [x.reshape(call.B, call.N, -1, x.shape[-1]) for x in grads]


def by_row(operands: Sequence[jax.Array], layout: Sequence[Operand]) -> list[jax.Array]:
  """The floating operands that are handed over by row."""
  kinds = zip(operands, layout, strict=True)
  return [x for x, o in kinds if not o.pairs and jnp.issubdtype(x.dtype, jnp.floating)]


def gradients(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """What out and mass pull back to queries, keys and values, in one pass over the tiles.

  Blocks of keys are lines, so that dk and dv are summed in VMEM, over the heads that share them,
  too. dq is summed in HBM: a visit fetches what the lines before have left of its block while it
  computes its own part, adds the two, and sends them back while the next visit computes; no copy
  is begun before the last one has ended.

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
  whole, some = occurring(kinds)
  sums: _Standing = (_Lying if blocks.lying else _Standing)(call, blocks, algebra, q.dtype)

  def kernel(batch, line, at, flags, *refs):
    facts_refs, rest = refs[: 2 + len(operands)], refs[2 + len(operands) :]
    q_ref, k_ref, v_ref, rows_ref, grad_ref, _, dk_ref, dv_ref, total = rest[:9]
    block, side, fetched, stored, *own = rest[9:]
    t, g = pl.program_id(2), pl.program_id(3)
    b, n = pl.program_id(0) + batch[t], pl.program_id(1) * group + g
    facts = facts_of(facts_refs, side, blocks, b, n, turned=sums.turned)
    given = leading(algebra, facts(0, 0), blocks, call.H, q.dtype) if blocks.lying else 1.0
    held = sums.Held(*own)
    begins, ends = (t == 0) & (g == 0), (t == pl.num_programs(2) - 1) & (g == group - 1)
    there = total.at[b, n, pl.ds(pl.multiple_of(at[t] * blocks.q, blocks.q), blocks.q)]
    fetch = pltpu.make_async_copy(there, block, fetched)
    store = pltpu.make_async_copy(block, there, stored)

    @pl.when(begins)
    def _():  # so that there is always one copy to wait for
      block[...] = jnp.zeros(block.shape, F32)
      store.start()

    @pl.when(((flags[t] & FIRST) > 0) & (g == 0))
    def _():
      for ref in (held.dk, held.dv):
        ref[...] = jnp.zeros(ref.shape, F32)
      if sums.turned:
        stand(facts_refs[1], side)
      sums.begin(held, given, k_ref)

    def midway():
      store.wait()
      fetch.start()

    def visit(masked: bool):
      if not sums.turned and (masked or asks(algebra, facts(0, 0), blocks)):
        stand(facts_refs[0], side)
      held.dq[...] = jnp.zeros(held.dq.shape, F32)
      sums.enter(held, q_ref, rows_ref, grad_ref)
      pieces = blocks.pieces()
      start = functools.partial(sums.start, held, given, q_ref, k_ref, v_ref, grad_ref)
      for number, ((r, c), of) in enumerate(ahead(pieces, start, blocks.ahead)):
        if number == len(pieces) // 2:
          midway()
        told = [sums.told(held, rows_ref, which, r) for which in (ORIGIN, SLOPE)]
        pull = _pulled(algebra, layout, masked, facts(r, c), *told, given=given)
        edited, products, _ = pull(*of)
        both = edited.astype(q.dtype), products.astype(q.dtype)
        sums.add(held, r, c, *both, q_ref, k_ref, grad_ref)
      fetch.wait()
      block[...] += sums.moved(held, given)
      store.start()

    by_kind(flags[t], visit, whole, some)
    pl.when(ends)(store.wait)

    @pl.when(((flags[t] & LAST) > 0) & (g == group - 1))
    def _():
      sums.write(held, given, dk_ref, dv_ref)

  inputs = (eight(q_side), eight(k_side), *operands, q, k, v, rows, grad)
  dk, dv, dq = run(
    kernel, plan, (call.B if plan.shared else 1, call.K, plan.count, group),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V), statistics(blocks, where), row(call.V),
     pl.BlockSpec(memory_space=pl.ANY)],
    [column(call.H), column(call.V), pl.BlockSpec(memory_space=pl.ANY)],
    [(k.shape, k.dtype), (v.shape, v.dtype), (q.shape, F32)],
    [pltpu.VMEM((blocks.q, call.H), F32), upright(blocks.k if sums.turned else blocks.q),
     pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA, *sums.scratch()],
    (*inputs, _zeros(q.shape, grad)),
    interpret, "attnx_gradients", aliases={4 + len(inputs): 2},
  )  # fmt: skip
  return dq, dk, dv


class _Standing:
  """Sums with tokens upright, dq (Q, H), dk (K, H) and dv (K, V).

  Where the algebra turns, tiles are (K, Q): statistics of rows then lie along lanes, and no tile is
  transposed for its products with q and the cotangents.

  Attributes:
    turned: whether tiles are (K, Q).
  """

  class Held(NamedTuple):
    dq: Any
    dk: Any
    dv: Any

  def __init__(self, call: Call, blocks: Blocks, algebra: Algebra, dtype: Any):
    self.call, self.blocks, self.algebra, self.dtype = call, blocks, algebra, dtype
    self.turned = algebra.turns

  def scratch(self) -> list:
    """What holds the arrays of `Held`."""
    (H, V), blocks = (self.call.H, self.call.V), self.blocks
    return [pltpu.VMEM(shape, F32) for shape in ((blocks.q, H), (blocks.k, H), (blocks.k, V))]

  def begin(self, held, given: float, k_ref) -> None:
    """Before the first tile of a block of keys, which are multiplied by `given` for products."""

  def enter(self, held, q_ref, rows_ref, grad_ref) -> None:
    """Before a tile."""

  def told(self, held, rows_ref, which: int, r: int) -> jax.Array:
    """What the rows of a piece are told: ORIGIN or SLOPE."""
    row = rows_ref[which : which + 1, r : r + self.blocks.rows]
    return row if self.turned else _column(row)

  def start(self, held, given: float, q_ref, k_ref, v_ref, grad_ref, r: int, c: int):
    """Products of queries and keys, and of cotangents and values."""
    rows, columns = pl.ds(r, self.blocks.rows), pl.ds(c, self.blocks.columns)
    pairs = (q_ref[rows], k_ref[columns]), (grad_ref[rows], v_ref[columns])
    return [dot(*(pair[::-1] if self.turned else pair), (1, 1)) for pair in pairs]

  def add(self, held, r: int, c: int, edited, products, q_ref, k_ref, grad_ref) -> None:
    """Of a piece, what its weights and the cotangents of its products add."""
    rows, columns = pl.ds(r, self.blocks.rows), pl.ds(c, self.blocks.columns)
    key = 0 if self.turned else 1  # the axis of a tile that runs along the keys
    held.dq[rows] += dot(products, k_ref[columns], (key, 0))
    held.dk[columns] += dot(products, q_ref[rows], (1 - key, 0))
    held.dv[columns] += dot(edited, grad_ref[rows], (1 - key, 0))

  def moved(self, held, given: float) -> jax.Array:
    """dq of the tile, (Q, H)."""
    return held.dq[...]

  def write(self, held, given: float, dk_ref, dv_ref) -> None:
    """dk and dv, after the last tile."""
    dk_ref[...] = held.dk[...].astype(dk_ref.dtype)
    dv_ref[...] = held.dv[...].astype(dv_ref.dtype)


class _Lying(_Standing):
  """Sums with tokens along lanes, dq (H, Q), dk (H, K) and dv (V, K); tiles are (Q, K).

  Tokens fill the columns of the matrix units, as in `streaming._Lying`, and one product of three
  transposes its tile. Here the keys of a line have the factor that scores begin with.
  """

  class Held(NamedTuple):
    dq: Any
    dk: Any
    dv: Any
    queries: Any  # (H, Q)
    grads: Any  # (V, Q)
    keys: Any  # (H, K)
    rows: Any  # (2, Q, 128), what rows are told
    scaled: Any = None  # (K, 2 H), `parts` of the keys

  def __init__(self, call, blocks, algebra, dtype):
    super().__init__(call, blocks, algebra, dtype)
    self.turned = False

  def scratch(self):
    (H, V), (q, k) = (self.call.H, self.call.V), (self.blocks.q, self.blocks.k)
    sums = [pltpu.VMEM(shape, F32) for shape in ((H, q), (H, k), (V, k))]
    scaled = [pltpu.VMEM((k, 2 * H), self.dtype)] if doubled(H, self.dtype) else []
    lying = [pltpu.VMEM(shape, self.dtype) for shape in ((H, q), (V, q), (H, k))]
    return [*sums, *lying, pltpu.VMEM((2, q, LANES), F32), *scaled]

  def begin(self, held, given, k_ref):
    held.keys[...] = k_ref[...].T
    if given != 1:
      held.scaled[...] = parts(k_ref[...], given)

  def enter(self, held, q_ref, rows_ref, grad_ref):
    held.queries[...] = q_ref[...].T
    held.grads[...] = grad_ref[...].T
    stand(rows_ref, held.rows)

  def told(self, held, rows_ref, which, r):
    return wide(held.rows[which, pl.ds(r, self.blocks.rows)], self.blocks.columns)

  def start(self, held, given, q_ref, k_ref, v_ref, grad_ref, r, c):
    rows, columns = pl.ds(r, self.blocks.rows), pl.ds(c, self.blocks.columns)
    queries, keys = q_ref[rows], k_ref[columns]
    if given != 1:
      queries, keys = jnp.concatenate([queries, queries], axis=1), held.scaled[columns]
    return dot(queries, keys, (1, 1)), dot(grad_ref[rows], v_ref[columns], (1, 1))

  def add(self, held, r, c, edited, products, q_ref, k_ref, grad_ref):
    rows = (slice(None), pl.ds(r, self.blocks.rows))
    columns = (slice(None), pl.ds(c, self.blocks.columns))
    held.dq[rows] += dot(held.keys[columns], products, (1, 1))
    held.dk[columns] += dot(held.queries[rows], products, (1, 0))
    held.dv[columns] += dot(held.grads[rows], edited, (1, 0))

  def moved(self, held, given):
    return held.dq[...].T * given

  def write(self, held, given, dk_ref, dv_ref):
    dk_ref[...] = (held.dk[...].T * given).astype(dk_ref.dtype)
    dv_ref[...] = held.dv[...].T.astype(dv_ref.dtype)


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
     row(call.H), column(call.H), column(call.V), statistics(blocks, where), row(call.V),
     pl.BlockSpec(memory_space=pl.ANY)],
    [out_spec], [(of.shape, F32)], [upright(blocks.q)], (*inputs, _zeros(of.shape, grad)),
    interpret, "attnx_gradient_of_pairs", aliases={4 + len(inputs): 0}, apart=0,
  )[0]  # fmt: skip
