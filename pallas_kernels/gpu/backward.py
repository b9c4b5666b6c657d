"""Gradients of streaming attention on Hopper GPUs, for which weights are computed anew.

One warpgroup moves tiles through rings in shared memory; the others multiply. Sums over keys, for
queries, and sums over queries, for keys and values, are made by two kernels. Each number is written
once, so that gradients are the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.experimental.pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.algebra import Algebra, Facts
from pallas_kernels.gpu.rings import (
  REGISTERS, Line, Turns, anew, digits, drain, fill, free, ready, ring, run, tiles_of, wait,
  write,
)  # fmt: skip
from pallas_kernels.gpu.tiles import (
  COLUMN, ROW, SHARED, TILE, Blocks, Order, Warpgroup, eights, inlined, lists, smem, somewhere,
  whole,
)  # fmt: skip
from pallas_kernels.visits import EMPTY, Operand

F32 = jnp.float32
ORIGIN, SLOPE = range(2)  # rows of what the kernels are told
WIDE = 256  # H + V above which the sums of 64 keys and values leave a warpgroup no registers


def gradient_of_queries(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(),
  interpret: Any = False,
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
  """What out and mass pull back to queries, and to the floating operands of one number.

  Args:
    q, k, v, q_side, k_side, operands, kinds, algebra, layout, blocks, interpret: as for `forward`.
    rows: (B, N, 2, T) float32; row ORIGIN is the peak, finite, and row SLOPE the cotangent of mass.
    grad: (B, T, N, V), the cotangent of out, in the dtype of q.

  Returns:
    (B, T, N, H) in the dtype of q, and for each operand of one number, not of pairs, an array
    (B, N, T, 1) float32, to be summed over the axes along which the operand is one.
  """
  moving = [not o.pairs and _floating(x) for x, o in zip(operands, layout, strict=True)]
  return _gradient_of_queries(
    q, k, v, q_side, k_side, operands, kinds, rows, grad, moving=moving, algebra=algebra,
    layout=layout, blocks=blocks, interpret=interpret,
  )  # fmt: skip


def _gradient_of_queries(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, moving: Sequence[bool], algebra: Algebra, layout, blocks: Blocks, interpret: Any,
):  # fmt: skip
  _check(q, k, v, grad, operands)
  (B, T, N, H), (_, S, K, V) = q.shape, v.shape
  kinds = somewhere(kinds)
  (_, lines, length), plan, unit = kinds.shape, lists(kinds), Warpgroup(interpret)
  bq, bk, W = blocks.q, blocks.k, blocks.warpgroups
  total, columns = lines * blocks.line, length * bk
  assert q_side.shape[2] == total >= T and k_side.shape[2] == columns >= S, (T, S, blocks)
  order = Order.of(B * N, lines, S * (H + V) * q.dtype.itemsize * K // N)
  tile = functools.partial(smem, dtype=q.dtype)
  stages = blocks.stages
  fits = (W * bq + stages * bk) * (H + V) * q.dtype.itemsize <= SHARED
  rings = dict(
    k_ring=ring(tile(stages, bk, H), plgpu.SMEM((stages, 3, bk), jnp.int32), readers=W),
    v_ring=ring(tile(stages if fits else stages - 1, bk, V), readers=W),
  )

  def kernel(
    at, counts, q_side, k_side, *refs, q_tiles, grad_tiles, own_full, k_ring, v_ring, turn
  ):
    operand_refs, refs = refs[: len(operands)], refs[len(operands) :]
    q, k, v, rows, grad, dq, *tables = refs
    w = lax.axis_index("warpgroup")
    line_of = lambda: Line.at(order, lax.axis_index("block"), N, counts, at, bk)

    @pl.when(w == W)
    def _move():
      plgpu.set_max_registers(REGISTERS[W][1], action="decrease")
      here = line_of()
      b, head = here.b, lax.div(here.n, jnp.int32(N // K))

      @pl.loop(0, here.visits)
      def _(t):
        keys = here.tile(t)
        fill(k_ring, t, k.at[b, keys, head], k_side.at[here.of(k_side), :, keys])
        fill(v_ring, t, v.at[b, keys, head])

      drain(here.visits, k_ring, v_ring)

    @pl.when(w < W)
    def _multiply():
      plgpu.set_max_registers(REGISTERS[W][0], action="increase")
      here = line_of()
      b, n, mine = here.b, here.n, pl.ds(here.line * blocks.line + w * bq, bq)
      q_tile, grad_tile = q_tiles.at[w], grad_tiles.at[w]
      plgpu.copy_gmem_to_smem(q.at[b, mine, n], q_tile, own_full.at[w])
      plgpu.copy_gmem_to_smem(grad.at[b, mine, n], grad_tile, own_full.at[w])
      told = [unit.load(rows.at[b, n, row, mine], ROW) for row in (ORIGIN, SLOPE)]
      q_facts = unit.side(q_side.at[here.of(q_side), :, mine], ROW)
      origin = unit.origin(q_side.at[here.of(q_side), :, mine])
      numbers, turns = unit.numbers(operand_refs, b, n), Turns(turn, w, W)
      plgpu.barrier_wait(own_full.at[w])

      def step(masked: bool, t, sums):
        products, dq, *seen = sums
        q_tile, grad_tile = anew(w, q_tiles, grad_tiles)
        (k_tile, k_facts), (v_tile,) = tiles_of(k_ring, t), wait(v_ring, t)
        tiles = unit.operands_at(operand_refs, layout, b, n, mine, here.tile(t), numbers)
        facts = unit.facts(q_facts, unit.side(k_facts, COLUMN), b, n, tiles, origin=origin)
        forth, back = _pulled(algebra, unit, masked, facts, moving, told, axis=0)
        work = lambda: forth(products)
        cotangents, (_, saved) = unit.product_beside(grad_tile, v_tile, work, blocks.beside)
        free(v_ring, t)
        products, moved = back(saved, cotangents)
        ready(t + 1, t + 1 < here.visits, k_ring)
        (following, _), terms = tiles_of(k_ring, t + 1), [(dq, products.astype(q.dtype), k_tile)]
        turns.take()
        (dq,), products = unit.sums(terms, (q_tile, following), meanwhile=turns.give)
        free(k_ring, t)
        return products, dq, *(x + jnp.sum(y, axis=1) for x, y in zip(seen, moved, strict=True))

      turns.begin()
      k_tile, _ = wait(k_ring, 0)
      turns.take()
      products = unit.product(q_tile, k_tile, meanwhile=turns.give)
      sums = unit.full((bq, H), 0.0, TILE), *(unit.full((bq,), 0.0, ROW) for _ in tables)
      _, dq_tile, *seen = here.fold(step, (products, *sums), kinds)
      write((q_tile, dq_tile, dq.at[b, mine, n]))
      for ref, x in zip(tables, seen, strict=True):
        ref[b, n, mine] = x
      turns.end()

  out, *tables = run(
    kernel, "attnx_gradient_of_queries", B * N * lines, W,
    [((B, total if interpret else eights(T), N, H), q.dtype),
     *[((B, N, total), F32)] * sum(moving)],
    dict(
      q_tiles=tile(W, bq, H), grad_tiles=tile(W, bq, V),
      own_full=plgpu.Barrier(num_arrivals=2, num_barriers=W),
      turn=plgpu.Barrier(num_barriers=W), **rings,
    ),
    interpret,
    *plan, q_side, k_side, *operands, whole(q, total, 1, interpret),
    whole(k, columns, 1, interpret), whole(v, columns, 1, interpret), whole(rows, total, 3, True),
    whole(grad, total, 1, interpret),
  )  # fmt: skip
  return out[:, :T], [x[:, :, :T, None] for x in tables]


def keys_of_line(blocks: Blocks, H: int, V: int) -> int:
  """Keys of a line of `gradient_of_keys`.

  Those of all its warpgroups; where H + V > WIDE, two share them: one sums for values, the other
  for keys.
  """
  return blocks.q if H + V > WIDE else blocks.line


def gradient_of_keys(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(k=64),
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """What out and mass pull back to keys and values, summed over the heads that share them.

  Tiles are (K, Q), so that none is transposed for the two products with it, and so are blocks: a
  warpgroup has `blocks.q` keys, past which tiles of `blocks.k` queries stream, of one head after
  the other.

  Args:
    kinds: (#B, length, lines) int32, for tiles of `blocks.k` queries and lines of `keys_of_line`
      keys; sides are as long as those are together.
    q, k, v, q_side, k_side, operands, rows, grad, algebra, layout, blocks, interpret: as for
      `gradient_of_queries`.

  Returns:
    (B, S, K, H) and (B, S, K, V), in the dtypes of k and v.

  Raises:
    NotImplementedError: where the algebra cannot be asked about (K, Q) tiles, or heads are wide and
      the warpgroups not two.
  """
  _check(q, k, v, grad, operands)
  (B, T, N, H), (_, S, K, V) = q.shape, v.shape
  kinds = somewhere(kinds, -2)
  (_, length, lines), plan, unit = kinds.shape, lists(kinds, by_key=True), Warpgroup(interpret)
  bs, bt, W, stages = blocks.q, blocks.k, blocks.warpgroups, blocks.stages
  apart, group, line_size = H + V > WIDE, N // K, keys_of_line(blocks, H, V)
  total, columns = length * bt, lines * line_size
  if not algebra.turns:
    raise NotImplementedError(
      "gradients of keys on a GPU want an algebra of (K, Q) tiles (turns=True), got one that looks "
      "along an axis: choose another implementation"
    )
  if apart and W != 2:
    raise NotImplementedError(
      f"keys and values of H + V = {H + V} > {WIDE} want two warpgroups, got {blocks}: set "
      "warpgroups=2"
    )
  assert q_side.shape[2] == total >= T and k_side.shape[2] == columns >= S, (T, S, blocks)
  order = Order.of(B * K, lines, T * (H + V) * q.dtype.itemsize * group)
  tile = functools.partial(smem, dtype=q.dtype)
  owners = 1 if apart else W
  scratch: dict[str, Any] = dict(
    k_tiles=tile(owners, bs, H), v_tiles=tile(owners, bs, V),
    own_full=plgpu.Barrier(num_arrivals=2, num_barriers=owners),
    turn=plgpu.Barrier(num_barriers=W),
    q_ring=ring(tile(stages, bt, H), plgpu.SMEM((stages, 3, bt), jnp.int32), readers=W),
    grad_ring=ring(tile(stages, bt, V), plgpu.SMEM((stages, 2, bt), F32), readers=W),
  )  # fmt: skip
  if apart:
    scratch["handed"] = smem(bs, bt, dtype=F32), plgpu.Barrier(), plgpu.Barrier()
  still = [False] * len(operands)

  def kernel(
    at, counts, q_side, k_side, *refs,
    k_tiles, v_tiles, own_full, q_ring, grad_ring, turn, handed=None,
  ):  # fmt: skip
    operand_refs, (q, k, v, rows, grad, dk, dv) = refs[: len(operands)], refs[len(operands) :]
    w = lax.axis_index("warpgroup")
    line_of = lambda: Line.at(
      order, lax.axis_index("block"), K, counts, at, bt, group, first=True
    )  # fmt: skip

    @pl.when(w == W)
    def _move():
      plgpu.set_max_registers(REGISTERS[W][1], action="decrease")
      here = line_of()
      b = here.b

      @pl.loop(0, here.visits)
      def _(t):
        n, queries = here.head(t), here.tile(t)
        fill(q_ring, t, q.at[b, queries, n], q_side.at[here.of(q_side), :, queries])
        fill(grad_ring, t, grad.at[b, queries, n], rows.at[b, n, :, queries])

      drain(here.visits, q_ring, grad_ring)

    @pl.when(w < W)
    def _multiply():
      plgpu.set_max_registers(REGISTERS[W][0], action="increase")
      here, own = line_of(), 0 if apart else w
      b, head, mine = here.b, here.n, pl.ds(here.line * line_size + own * bs, bs)
      k_tile, v_tile = k_tiles.at[own], v_tiles.at[own]

      @pl.when(w == own)
      def _():
        plgpu.copy_gmem_to_smem(k.at[b, mine, head], k_tile, own_full.at[own])
        plgpu.copy_gmem_to_smem(v.at[b, mine, head], v_tile, own_full.at[own])

      k_facts = unit.side(k_side.at[here.of(k_side), :, mine], ROW)
      turns = Turns(turn, w, W)
      plgpu.barrier_wait(own_full.at[own])

      def facts_of(t, side):
        n = here.head(t)
        tiles = unit.operands_at(operand_refs, layout, b, n, here.tile(t), mine, turned=True)
        how = dict(turned=True, origin=unit.origin(side))
        return unit.facts(unit.side(side, COLUMN), k_facts, b, n, tiles, **how)

      def told_of(told):
        return [unit.load(told.at[row], COLUMN) for row in (ORIGIN, SLOPE)]

      def both(masked: bool, t, sums):
        """Sums for the keys and values of this warpgroup."""
        products, dk, dv = sums
        k_tile, v_tile = anew(own, k_tiles, v_tiles)
        (q_tile, side), (grad_tile, told) = tiles_of(q_ring, t), wait(grad_ring, t)
        facts = facts_of(t, side)
        forth, back = _pulled(algebra, unit, masked, facts, still, told_of(told), axis=1)
        work = lambda: forth(products)
        cotangents, (edited, saved) = unit.product_beside(
          v_tile, grad_tile, work, blocks.beside
        )  # fmt: skip
        products, _ = back(saved, cotangents)
        edited, products = (x.astype(q_tile.dtype) for x in (edited, products))
        ready(t + 1, t + 1 < here.visits, q_ring)
        following, _ = tiles_of(q_ring, t + 1)
        turns.take()
        terms = [(dv, edited, grad_tile), (dk, products, q_tile)]
        (dv, dk), products = unit.sums(terms, (k_tile, following), meanwhile=turns.give)
        free(q_ring, t)
        free(grad_ring, t)
        return products, dk, dv

      def added(sums, weights, tile, t, *, first, last):
        """sums + weights tile of the ring `last`, in its turn; the next visit begins at `first`."""

        def after():
          turns.give()
          ready(t + 1, t + 1 < here.visits, first)

        turns.take()
        sums = unit.add(sums, weights, tile, meanwhile=after)
        free(last, t)
        return sums

      def values(masked: bool, t, dv):
        """Sums for values; products are handed to the warpgroup that sums for their keys."""
        scores, filled, taken = handed
        (k_tile,) = anew(own, k_tiles)
        q_tile, side = tiles_of(q_ring, t)
        turns.take()
        products = unit.product(k_tile, q_tile, meanwhile=turns.give)
        pl.when(t > 0)(lambda: plgpu.barrier_wait(taken))
        scores[...] = products
        plgpu.barrier_arrive(filled)
        facts = facts_of(t, side)
        grad_tile, told = wait(grad_ring, t)
        origin = unit.wide(told_of(told)[ORIGIN], (bs, bt), 1)

        def weights(products):
          scores, _, seen = algebra.masked(products, facts, masked)
          return algebra.edited(algebra.weigh(scores, seen, origin), facts)

        edited = inlined(weights)(products).astype(grad_tile.dtype)
        free(q_ring, t)
        return added(dv, edited, grad_tile, t, first=q_ring, last=grad_ring)

      def keys(masked: bool, t, dk):
        """Sums for keys, from the products that are handed over."""
        scores, filled, taken = handed
        (v_tile,) = anew(own, v_tiles)
        grad_tile, told = tiles_of(grad_ring, t)
        turns.take()
        cotangents = unit.product(v_tile, grad_tile, meanwhile=turns.give)
        q_tile, side = wait(q_ring, t)
        facts = facts_of(t, side)
        plgpu.barrier_wait(filled)
        products = unit.load(scores, TILE)
        plgpu.barrier_arrive(taken)
        forth, back = _pulled(algebra, unit, masked, facts, still, told_of(told), axis=1)
        products, _ = back(forth(products)[1], cotangents)
        free(grad_ring, t)
        return added(dk, products.astype(q_tile.dtype), q_tile, t, first=grad_ring, last=q_ring)

      zeros = lambda width: unit.full((bs, width), 0.0, TILE)
      fold = lambda step, sums: here.fold(step, sums, kinds)
      dk_out, dv_out = dk.at[b, mine, head], dv.at[b, mine, head]
      if not apart:
        turns.begin()
        q_tile, _ = wait(q_ring, 0)
        turns.take()
        products = unit.product(k_tile, q_tile, meanwhile=turns.give)
        _, dk_tile, dv_tile = fold(both, (products, zeros(H), zeros(V)))
        write((k_tile, dk_tile, dk_out), (v_tile, dv_tile, dv_out))
        return turns.end()

      @pl.when(w == 0)
      def _():
        wait(q_ring, 0)
        dv_tile = fold(values, zeros(V))
        plgpu.barrier_wait(handed[2])  # values have been read
        turns.take()
        write((v_tile, dv_tile, dv_out))

      @pl.when(w == 1)
      def _():
        wait(grad_ring, 0)
        turns.give()
        write((k_tile, fold(keys, zeros(H)), dk_out))

  stored = columns if interpret else eights(S)
  dk, dv = run(
    kernel, "attnx_gradient_of_keys", B * K * lines, W,
    [((B, stored, K, H), k.dtype), ((B, stored, K, V), v.dtype)], scratch, interpret,
    *plan, q_side, k_side, *operands, whole(q, total, 1, interpret),
    whole(k, columns, 1, interpret), whole(v, columns, 1, interpret), whole(rows, total, 3, True),
    whole(grad, total, 1, interpret),
  )  # fmt: skip
  return dk[:, :S], dv[:, :S]


def gradient_of_pairs(
  q, k, v, q_side, k_side, operands, kinds, rows, grad,
  *, number: int, algebra: Algebra, layout: Sequence[Operand] = (), blocks: Blocks = Blocks(k=64),
  interpret: Any = False,
) -> jax.Array:  # fmt: skip
  """What out and mass pull back to an operand of pairs, (#B, #N, #T, #S) float32.

  Arguments as for `gradient_of_queries`, and the number of the operand. A block of the grid sums
  one tile over the axes along which the operand is one, in order.
  """
  like = operands[number]
  moving = [n == number for n in range(len(operands))]
  if like.shape[2:] == (1, 1):
    _, (found,) = _gradient_of_queries(
      q, k, v, q_side, k_side, operands, kinds, rows, grad, moving=moving, algebra=algebra,
      layout=layout, blocks=blocks, interpret=interpret,
    )  # fmt: skip
    return found.sum([axis for axis, n in enumerate(like.shape) if n == 1], keepdims=True)
  _check(q, k, v, grad, operands)
  (B, T, N, H), (_, S, K, V) = q.shape, v.shape
  (_, lines, length), unit = kinds.shape, Warpgroup(interpret)
  bq, bk, W = blocks.q, blocks.k, blocks.warpgroups
  total, columns = lines * blocks.line, length * bk
  assert q_side.shape[2] == total >= T and k_side.shape[2] == columns >= S, (T, S, blocks)
  sizes = (B, N, lines, length)
  outer = tuple(1 if n == 1 else size for n, size in zip(like.shape, sizes))
  inner = tuple(size if n == 1 else 1 for n, size in zip(like.shape, sizes))
  of_row = like.shape[3] == 1  # numbers of queries; else the sums are tiles, or their rows
  room = SHARED // ((W * bq + bk) * (H + V) * q.dtype.itemsize)
  stages = max(1, min(blocks.stages, room))
  tile = functools.partial(smem, stages, dtype=q.dtype)

  def kernel(kinds, q_side, k_side, *refs, tiles):
    operand_refs, (q, k, v, rows, grad, out) = refs[: len(operands)], refs[len(operands) :]
    w = lax.axis_index("warpgroup")
    block = digits(lax.axis_index("block"), outer)

    def walk(visit: Callable, sums):
      """visit(t, place, sums) at every place (b, n, line, j) whose tile is not EMPTY."""

      def step(u, carry):
        b, n, line, j = place = [x + y for x, y in zip(block, digits(u, inner))]
        there = kinds[0 if kinds.shape[0] == 1 else b, line, j] > EMPTY
        visited = lambda t, sums: (t + 1, visit(t, place, sums))
        return lax.cond(there, visited, lambda t, sums: (t, sums), *carry)

      return lax.fori_loop(0, math.prod(inner), step, (jnp.int32(0), sums))

    @pl.when(w == W)
    def _move():
      plgpu.set_max_registers(REGISTERS[W][1], action="decrease")

      def visit(t, place, sums):
        b, n, line, j = place
        head, keys = lax.div(n, jnp.int32(N // K)), pl.ds(j * bk, bk)
        mine = [pl.ds(line * blocks.line + c * bq, bq) for c in range(W)]
        queries = [[x.at[b, rows, n] for rows in mine] for x in (q, grad)]
        fill(tiles, t, *queries, k.at[b, keys, head], v.at[b, keys, head])
        return sums

      visits, _ = walk(visit, ())
      drain(visits, tiles)

    @pl.when(w < W)
    def _multiply():
      plgpu.set_max_registers(REGISTERS[W][0], action="increase")

      def visit(t, place, sums):
        b, n, line, j = place
        of = lambda ref: 0 if ref.shape[0] == 1 else b
        mine, keys = pl.ds(line * blocks.line + w * bq, bq), pl.ds(j * bk, bk)
        told = [unit.load(rows.at[b, n, row, mine], ROW) for row in (ORIGIN, SLOPE)]
        facts = unit.facts(
          unit.side(q_side.at[of(q_side), :, mine], ROW),
          unit.side(k_side.at[of(k_side), :, keys], COLUMN), b, n,
          unit.operands_at(operand_refs, layout, b, n, mine, keys),
          origin=unit.origin(q_side.at[of(q_side), :, mine]),
        )  # fmt: skip
        q_tiles, grad_tiles, k_tile, v_tile = wait(tiles, t)
        products = unit.products([(q_tiles.at[w], k_tile), (grad_tiles.at[w], v_tile)])
        free(tiles, t)
        scores, cotangents = products
        forth, back = _pulled(algebra, unit, True, facts, moving, told, axis=0)
        _, (found,) = back(forth(scores)[1], cotangents)
        return sums + (jnp.sum(found, axis=1) if of_row else found)

      sums = unit.full((bq,), 0.0, ROW) if of_row else unit.full((bq, bk), 0.0, TILE)
      _, sums = walk(visit, sums)
      b, n, line, j = block
      mine = pl.ds(line * blocks.line + w * bq, bq)
      if of_row:
        out[b, n, mine] = sums
      else:
        out[b, n, mine, pl.ds(j * bk, bk)] = sums

  shape = (*outer[:2], outer[2] * blocks.line, *(() if of_row else (columns,)))
  (out,) = run(
    kernel, "attnx_gradient_of_pairs", math.prod(outer), W, [(shape, F32)],
    dict(tiles=ring(tile(W, bq, H), tile(W, bq, V), tile(bk, H), tile(bk, V), readers=W,
                    arrivals=2 * W + 2)),
    interpret,
    kinds, q_side, k_side, *operands, whole(q, total, 1, interpret),
    whole(k, columns, 1, interpret), whole(v, columns, 1, interpret), whole(rows, total, 3, True),
    whole(grad, total, 1, interpret),
  )  # fmt: skip
  if of_row:
    return out[:, :, :T, None]
  return out[..., :S].sum(2, keepdims=True) if like.shape[2] == 1 else out[:, :, :T, :S]


def _floating(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _check(q, k, v, grad, operands) -> None:
  (B, _, N, H), (_, S, K, V) = q.shape, v.shape
  assert k.shape == (B, S, K, H) and N % K == 0, (q.shape, k.shape, v.shape)
  assert grad.shape == (*q.shape[:3], V) and grad.dtype == q.dtype, (grad.shape, grad.dtype)
  assert all(x.ndim == 4 for x in operands), [x.shape for x in operands]


def _pulled(
  algebra: Algebra, unit: Warpgroup, masked: bool, facts: Facts, moving: Sequence[bool], told,
  *, axis: int,
) -> tuple[Callable, Callable]:  # fmt: skip
  """Products to the weights that read values, and what pulls cotangents of those weights back.

  Args:
    told: origin and slope of the queries, which lie along `axis` of the tile.
    moving: which operands have a cotangent.

  Returns:
    A function products -> (edited weights, what is saved of it), and a function of what is saved
    and cotangents -> cotangents of products, and a list of those of the operands, tiles each.
  """

  def weights(products, moved, origin):
    rest = iter(moved)
    operands = tuple(next(rest) if m else x for x, m in zip(facts.operands, moving, strict=True))
    of = facts._replace(operands=operands)
    scores, _, seen = algebra.masked(products, of, masked)
    w = algebra.weigh(scores, seen, origin)
    return jnp.abs(w) if algebra.signed else w, algebra.edited(w, of)

  wide = lambda x, like: unit.wide(x, like.shape, axis)

  def forth(products):
    def weighed(products, moved, origin):
      (_, edited), back = jax.vjp(lambda *of: weights(*of, origin), products, moved)
      return edited, back

    of = (x for x, m in zip(facts.operands, moving, strict=True) if m)
    spread = [jnp.broadcast_to(x, products.shape) for x in of]
    return inlined(weighed)(products, spread, wide(told[ORIGIN], products))

  def back(saved, cotangents):
    pulled = inlined(lambda saved, *of: saved(of))
    products, moved = pulled(saved, wide(told[SLOPE], cotangents), cotangents)
    return products, [unit.cast(x, TILE) for x in moved]

  return forth, back
