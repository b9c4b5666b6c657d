"""Decoding on a GPU: few queries of each row against a long cache, which is split over its keys.

Decoding reads every key once, so that the bandwidth of memory bounds it. The queries of all heads
that share a key head are the columns of one matrix, and keys are the rows: tiles are (keys,
queries), so that an instruction, which has 64 rows, wastes none where queries are few. One
warpgroup moves tiles, and widens what is stored in 8 bits; the other computes. Two blocks share a
processor where they fit, so that one computes while the other waits.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.algebra import FLOOR, Algebra, Facts, Side
from pallas_kernels.decoding import Call, Partials, check_beside, packed, planned, scales
from pallas_kernels.gpu import decode_call
from pallas_kernels.gpu.decode_call import FIELDS, PIECE, STORED, Cut, Operands
from pallas_kernels.gpu.tiles import (
  COLUMN, COMPILER, ROW, TILE, Warpgroup, inlined, smem, swizzle_of, whole,
)  # fmt: skip
from pallas_kernels.products import dot
from pallas_kernels.visits import Operand

COMPUTE, MOVE = range(2)  # warpgroups
MASS, PEAK, COUNT = range(3)  # rows of the statistics
UNPACK = plgpu.Layout.WGMMA_UPCAST_4X  # eight numbers side by side


def decode(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_side: jax.Array,
  k_side: jax.Array | None,
  operands: Sequence[jax.Array] = (),
  kinds: jax.Array | None = None,
  *,
  algebra: Algebra,
  layout: Sequence[Operand] = (),
  pages: jax.Array | None = None,
  lengths: jax.Array | None = None,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  splits: int | None = None,
  block_k: int | None = None,
  interpret: Any = False,
) -> Partials:
  """sum_j w_j v_j of every query over the visible slots of its row's cache, in parts.

  Slots of a row come in the order of its cache; tiles are runs of `block_k` slots.

  Args:
    q: (B, N, T, H), bfloat16 or float16, few rows T.
    k, v: (B, S, K, H) and (B, S, K, V), of the dtype of `q`, int8 or float8_e4m3fn; or pools of
      pages, (M, P, K, H) and (M, P, K, V). K divides N; H and V are multiples of 64, at most 256.
    q_side, k_side: (#B, 3, T) and (#B, 3, S) int32, the fields of `Side`. k_side None: index and
      position of a slot are its number, and its segment is 0.
    operands: (#B, #N, #T, X) arrays that `layout` describes, one for one; X is 1 or runs along the
      slots.
    kinds: (#B, tiles) int32, EMPTY, PARTIAL or FULL, for all queries of a row; None: all PARTIAL.
    algebra: what becomes of products; it is asked about (K, Q) tiles.
    layout: how the operands lie.
    pages: (B, S / P) int32, the pages of each row in order; beyond its length they may be anything.
    lengths: (B,) int32, slots of each row that are filled; None: all, if there are no pages.
    k_scale, v_scale: what stored keys and values are multiplied by, float32: of each head, (K,) or
      (B, K), or of each token in the order of slots, (B, K, S). None: 1.
    splits: parts to deal the tiles of a row out to; None: what fills an H100.
    block_k: slots of a tile; None: `decode_call.block_of`.
    interpret: emulate on CPU, for tests: `InterpretGPUParams`.

  Raises:
    ValueError: shapes, dtypes or sizes do not fit each other.
    NotImplementedError: a width, dtype, page, operand or algebra that no tile is made for.
  """
  if not algebra.turns:
    raise NotImplementedError(
      "the algebra has turns=False; decoding on a GPU asks about (keys, queries) tiles: write it "
      "so that it may be asked about those, or decode without a kernel"
    )
  call = decode_call.call_of(q, k, v, pages, splits, block_k)
  slots = jax.ShapeDtypeStruct((1, FIELDS, call.S), jnp.int32) if k_side is None else k_side
  check_beside(call, q_side, slots, operands, layout, kinds, pages, lengths)
  (k_head, k_token), (v_head, v_token) = (scales(call, x) for x in (k_scale, v_scale))
  ends: Any = np.full(call.B, call.S) if lengths is None else jnp.clip(lengths, 0, call.S)
  order, counts = decode_call.dealt(planned(call, kinds, ends), in_order=kinds is None)
  along = functools.partial(
    decode_call.aligned, length=call.tiles * call.block, interpret=interpret
  )
  extent = 0 if call.page else call.tiles * call.block
  given = Operands(
    ends.astype(np.int32), counts, order, pages, k_head,
    q_rows=decode_call.standing(call, q_side), k_side=along(k_side),
    beside=tuple(
      decode_call.beside(call, x, kind, packed(call, x))
      for x, kind in zip(operands, layout, strict=True)
    ),
    k_token=along(k_token), v_token=along(v_token), q=packed(call, q),
    k=whole(k, max(extent, k.shape[1]), 1, interpret),
    v=whole(v, max(extent, v.shape[1]), 1, interpret),
  )  # fmt: skip
  out, stats = _run(call, given, algebra, kinds is not None, interpret)
  out = out if v_head is None else out * v_head[:, :, None, None]
  return _unpacked(call, out, stats)


def _unpacked(call: Call, out: jax.Array, stats: jax.Array) -> Partials:
  """(splits, B, K, X, rows) to (splits, B, N, T, X)."""

  def unpack(x: jax.Array) -> jax.Array:
    x = x[..., : call.group * call.T].swapaxes(3, 4)
    return x.reshape(call.splits, call.B, call.N, call.T, x.shape[-1])

  out, stats = unpack(out), unpack(stats)
  return Partials(out, stats[..., MASS], stats[..., PEAK], stats[..., COUNT])


class Scratch(NamedTuple):
  """Shared memory of a block.

  Attributes:
    q: (rows, H).
    facts: (4, rows) int32, of `decode_call.standing`.
    weights: (rows, block), of the tile at hand.
    k, v: (stages, block, H or V), as they are stored.
    side: (stages, 3, block), k_token, v_token: (stages, block); None where there are none.
    keys, values: (block, H or V), of the tile at hand in the dtype of the queries; None where they
      are stored so.
  """

  q: Any
  facts: Any
  weights: Any
  k: Any
  v: Any
  side: Any
  k_token: Any
  v_token: Any
  keys: Any
  values: Any


class Barriers(NamedTuple):
  """What the warpgroups wait for.

  Attributes:
    q: queries have come.
    come, done: a tile has come, is done with; one for each stage.
    keys, values: those of a tile are wide; None where they are stored so.
    read: the wide keys have been multiplied.
  """

  q: Any
  come: Any
  done: Any
  keys: Any
  values: Any
  read: Any


def _scratch(call: Call, cut: Cut, given: Operands) -> tuple[Scratch, Barriers]:
  n, dtype, narrow = cut.stages, given.q.dtype, given.k.dtype.name in STORED
  token = lambda x, *shape: None if x is None else plgpu.SMEM((n, *shape, call.block), x.dtype)
  wide = lambda width: smem(call.block, width, dtype=dtype) if narrow else None
  pages = max(1, call.block // call.page) if call.page else 1
  copies = 2 * pages + sum(x is not None for x in (given.k_side, given.k_token, given.v_token))
  scratch = Scratch(
    smem(cut.rows, call.H, dtype=dtype), plgpu.SMEM((FIELDS + 1, cut.rows), jnp.int32),
    smem(cut.rows, call.block, dtype=dtype),
    smem(n, call.block, call.H, dtype=given.k.dtype),
    smem(n, call.block, call.V, dtype=given.v.dtype),
    token(given.k_side, FIELDS), token(given.k_token), token(given.v_token),
    wide(call.H), wide(call.V),
  )  # fmt: skip
  barriers = Barriers(
    plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=copies, num_barriers=n),
    plgpu.Barrier(num_barriers=n), *[plgpu.Barrier() if narrow else None] * 3,
  )  # fmt: skip
  return scratch, barriers


def _run(call: Call, given: Operands, algebra: Algebra, full: bool, interpret):
  """The call of the kernel: sums (splits, B, K, V, rows), and statistics (.., 3, rows)."""
  tokens = (given.k_token, given.v_token)
  numbers = FIELDS * (given.k_side is not None) + sum(x is not None for x in tokens)
  cut = decode_call.cut_of(call, given.q, given.k, numbers)
  inputs, tree = jax.tree.flatten(given)

  def kernel(*refs):
    given = tree.unflatten(refs[: len(inputs)])
    block = Block(call, cut, algebra, full, given, Warpgroup(interpret))
    scratch, barriers = _scratch(call, cut, given)
    pl.run_scoped(
      functools.partial(_kernel, block, *refs[len(inputs) :]), scratch, barriers,
      collective_axes="warpgroup",
    )  # fmt: skip

  result = lambda lines: jax.ShapeDtypeStruct(
    (call.splits, call.B, call.K, lines, call.rows), jnp.float32
  )
  return plgpu.kernel(
    kernel,
    out_type=[result(call.V), result(MASS + PEAK + COUNT)],
    grid=(call.B, call.splits, call.K * cut.lines),  # heads side by side share rows of memory
    grid_names=("row", "split", "head"),
    num_threads=2,
    thread_name="warpgroup",
    compiler_params=COMPILER,
    interpret=interpret,
    kernel_name="attnx_decode",
  )(*inputs)


class Block(NamedTuple):
  """What a block of threads knows before it runs."""

  call: Call
  cut: Cut
  algebra: Algebra
  full: bool
  given: Operands
  wg: Warpgroup


class Place(NamedTuple):
  """Where a block is: scalars.

  Attributes:
    row, split, head: of the batch, of the parts, of the keys.
    line: the first of its queries.
    full, first, last: in the order of visits, where FULL tiles end, where its own begin and end.
    filled: slots of the row that hold a token.
  """

  row: Any
  split: Any
  head: Any
  line: Any
  full: Any
  first: Any
  last: Any
  filled: Any


def _place(block: Block) -> Place:
  call, cut, given = block.call, block.cut, block.given
  row, split, at = (lax.axis_index(name) for name in ("row", "split", "head"))
  count = given.counts[row, 1]
  part = lambda s: lax.div(count * s, jnp.int32(call.splits))
  first, last = part(split), part(split + 1)
  full = jnp.clip(given.counts[row, 0], first, last)
  head, line = at, 0  # type: tuple[Any, Any]
  if cut.lines > 1:
    head, line = lax.div(at, jnp.int32(cut.lines)), lax.rem(at, jnp.int32(cut.lines)) * cut.rows
  return Place(row, split, head, line, full, first, last, given.lengths[row])


def _tile(block: Block, place: Place, i) -> Any:
  """Which tile the visit i goes to."""
  order = block.given.order
  return i if order is None else order[place.row, i]


def _kernel(block: Block, out_ref, stats_ref, scratch: Scratch, barriers: Barriers) -> None:
  place, warpgroup = _place(block), lax.axis_index("warpgroup")
  pl.when(warpgroup == MOVE)(lambda: _move(block, place, scratch, barriers))
  pl.when(warpgroup == COMPUTE)(
    lambda: _compute(block, place, scratch, barriers, out_ref, stats_ref)
  )


def _move(block: Block, place: Place, scratch: Scratch, barriers: Barriers) -> None:
  """Sends for the queries and for one tile after the other, as places become free."""
  cut, given, slot_of = block.cut, block.given, functools.partial(_slot, block, place)
  lines, row = pl.ds(place.line, cut.rows), 0 if given.q_rows.shape[0] == 1 else place.row
  plgpu.copy_gmem_to_smem(given.q.at[place.row, place.head, lines], scratch.q, barriers.q)
  plgpu.copy_gmem_to_smem(given.q_rows.at[row, :, lines], scratch.facts, barriers.q)
  send = functools.partial(_send, block, place, scratch, barriers)
  wait = lambda i: plgpu.barrier_wait(barriers.done.at[slot_of(i)])
  ahead = place.first + cut.stages
  pl.loop(place.first, jnp.minimum(ahead, place.last))(send)
  if scratch.keys is not None:
    _widen_all(block, place, scratch, barriers, send)
    return

  @pl.loop(ahead, place.last)
  def more(i):
    wait(i - cut.stages)
    send(i)

  pl.loop(jnp.maximum(place.first, place.last - cut.stages), place.last)(wait)


def _widen_all(block: Block, place: Place, scratch: Scratch, barriers: Barriers, send) -> None:
  """Widens one tile after the other, keys and then values, while the one before is computed with.

  There is room for the keys of one tile, and for its values: keys are widened while weights are
  made and values multiplied, values while keys are multiplied and weights made.
  """
  wg, slot_of = block.wg, functools.partial(_slot, block, place)

  @pl.loop(place.first, place.last)
  def step(i):
    slot, before, more = slot_of(i), i - 1, i > place.first
    plgpu.barrier_wait(barriers.come.at[slot])
    pl.when(more)(lambda: plgpu.barrier_wait(barriers.read))
    _widen(wg, scratch.k.at[slot], scratch.keys)
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.keys)

    @pl.when(more)
    def go_on():
      plgpu.barrier_wait(barriers.done.at[slot_of(before)])
      later = before + block.cut.stages
      pl.when(later < place.last)(lambda: send(later))

    _widen(wg, scratch.v.at[slot], scratch.values)
    if scratch.v.dtype != jnp.int8:  # an integer is a number, whatever it is
      _clean(block, place, scratch.values, _tile(block, place, i))
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.values)

  @pl.when(place.first < place.last)
  def see_out():
    plgpu.barrier_wait(barriers.read)
    plgpu.barrier_wait(barriers.done.at[slot_of(place.last - 1)])


def _slot(block: Block, place: Place, i) -> Any:
  """Where the tile of visit i lies."""
  return lax.rem(i - place.first, jnp.int32(block.cut.stages))


def _widen(wg: Warpgroup, narrow: Any, wide: Any) -> None:
  """Writes numbers of 8 bits (block, X) to numbers of 16, both in swizzled shared memory."""
  width = swizzle_of(narrow.shape[1], narrow.dtype)
  for row in range(0, narrow.shape[0], PIECE):
    for column in range(0, narrow.shape[1], width):
      at = pl.ds(row, PIECE), pl.ds(column, width)
      x = wg.cast(narrow[at], UNPACK)
      x = x.astype(jnp.float32) if x.dtype == jnp.float8_e4m3fn else x  # its way to bfloat16
      wide[at] = x.astype(wide.dtype)


def _clean(block: Block, place: Place, values: Any, tile) -> None:
  """Zeroes the values (block, V) of slots that hold no token: 0 NaN is not 0."""
  wg, filled = block.wg, place.filled - tile * block.call.block

  @pl.when(filled < block.call.block)
  def clean():
    for row in range(0, values.shape[0], PIECE):
      for column in range(0, values.shape[1], PIECE):
        at = pl.ds(row, PIECE), pl.ds(column, PIECE)
        x = wg.cast(values[at], TILE)
        values[at] = jnp.where(_number(wg, x.shape) < filled - row, x, jnp.zeros_like(x))
    plgpu.commit_smem()


def _send(block: Block, place: Place, scratch: Scratch, barriers: Barriers, i) -> None:
  """Sends for what visit i needs."""
  call, given, tile, slot = block.call, block.given, _tile(block, place, i), _slot(block, place, i)
  slots, row = pl.ds(tile * call.block, call.block), place.row
  copy = lambda x, to: plgpu.copy_gmem_to_smem(x, to, barriers.come.at[slot])
  if given.k_side is not None:
    copy(given.k_side.at[0 if given.k_side.shape[0] == 1 else row, :, slots], scratch.side.at[slot])
  for x, to in ((given.k_token, scratch.k_token), (given.v_token, scratch.v_token)):
    if x is not None:
      copy(x.at[row, place.head, slots], to.at[slot])
  if not call.page:
    copy(given.k.at[row, slots, place.head], scratch.k.at[slot])
    copy(given.v.at[row, slots, place.head], scratch.v.at[slot])
    return
  size, runs = min(call.page, call.block), max(1, call.block // call.page)
  last, pool = given.pages.shape[1] - 1, given.k.shape[0] - 1
  numbers = [tile * runs + n for n in range(runs)]  # of runs of `size` slots
  pages = [lax.div(n * size, jnp.int32(call.page)) for n in numbers]
  pages = [jnp.clip(given.pages[row, jnp.minimum(n, last)], 0, pool) for n in pages]
  for n, page in enumerate(pages):
    inside, at = lax.rem(numbers[n] * size, jnp.int32(call.page)), pl.ds(n * size, size)
    for x, to in ((given.k, scratch.k), (given.v, scratch.v)):
      copy(x.at[page, pl.ds(inside, size), place.head], to.at[slot, at])


class Sums(NamedTuple):
  """Sums of the queries of a block while tiles pass, float32.

  Attributes:
    out: (V, rows).
    mass, count: (64, rows), which are summed over their rows once, at the end; no count is None.
    peak: (rows,), or None.
  """

  out: Any
  mass: Any
  count: Any
  peak: Any


def _compute(block: Block, place: Place, scratch, barriers, out_ref, stats_ref) -> None:
  """Adds up the tiles as they come, and writes the sums."""
  call, wg, rows = block.call, block.wg, block.cut.rows
  tile = lambda lines: wg.full((lines, rows), 0.0, TILE)
  peak = None if block.algebra.height is None else wg.full((rows,), -jnp.inf, COLUMN)
  sums = Sums(tile(call.V), tile(PIECE), tile(PIECE) if block.algebra.counts else None, peak)
  plgpu.barrier_wait(barriers.q)

  def visit(masked: bool, i, sums: Sums) -> Sums:
    slot = _slot(block, place, i)
    plgpu.barrier_wait(barriers.come.at[slot])
    sums = _visit(block, place, scratch, barriers, _tile(block, place, i), slot, sums, masked)
    plgpu.barrier_arrive(barriers.done.at[slot])
    return sums

  if block.full:
    sums = lax.fori_loop(place.first, place.full, functools.partial(visit, False), sums)
  sums = lax.fori_loop(place.full, place.last, functools.partial(visit, True), sums)
  columns = pl.ds(place.line, rows)
  out_ref[place.split, place.row, place.head, :, columns] = sums.out
  zero = wg.full((rows,), 0.0, COLUMN)
  stats = {MASS: jnp.sum(sums.mass, axis=0), PEAK: zero, COUNT: zero}
  if sums.peak is not None:
    stats[PEAK] = sums.peak
  if sums.count is not None:
    stats[COUNT] = jnp.sum(sums.count, axis=0)
  for line, x in stats.items():
    stats_ref[place.split, place.row, place.head, line, columns] = x


def _visit(
  block: Block, place: Place, scratch: Scratch, barriers: Barriers, tile, slot, sums: Sums,
  masked: bool,
) -> Sums:  # fmt: skip
  """merge(seen, visit(tile)), piece by piece of 64 keys."""
  call, wg, shape = block.call, block.wg, (PIECE, block.cut.rows)
  pieces = [pl.ds(at, PIECE) for at in range(0, call.block, PIECE)]
  filled, number = place.filled - tile * call.block, _number(wg, shape)
  exist = [number < filled - piece.start if masked else True for piece in pieces]
  values = scratch.v.at[slot] if scratch.values is None else scratch.values
  if masked and scratch.values is None:  # before weights take registers
    _clean(block, place, values, tile)
  products = _products(block, scratch, barriers, slot, pieces)
  facts = [_facts(block, place, scratch, tile, slot, piece) for piece in pieces]
  scaled = [_scaled(block, place, scratch, slot, *of) for of in zip(pieces, products)]
  weigh = inlined(lambda *of: _weigh(block, facts, exist, masked, *of))
  weights, factor, (mass, count, peak) = weigh(scaled, sums.mass, sums.count, sums.peak)
  for piece, x, some in zip(pieces, weights, exist, strict=True):
    if scratch.v_token is not None:
      x *= wg.wide(wg.load(scratch.v_token.at[slot, piece], ROW), shape)
    if masked:  # of what lies beyond, not even zero times it may be read
      x = jnp.where(some, x, 0.0)
    _store(wg, scratch.weights, piece, x.astype(scratch.weights.dtype))
  plgpu.commit_smem()
  if scratch.values is not None:
    plgpu.barrier_wait(barriers.values)
  out = sums.out if factor is None else sums.out * wg.wide(factor, sums.out.shape, 1)
  return Sums(_add(wg, out, values, scratch.weights), mass, count, peak)


def _weigh(block: Block, facts, exist, masked: bool, scaled, mass, count, before):
  """Weights of the pieces of a tile, what sums shrink by or None, and mass, count and peak."""
  algebra, wg, shape = block.algebra, block.wg, scaled[0].shape
  asked = [
    algebra.masked(x, of, masked, some) for x, of, some in zip(scaled, facts, exist, strict=True)
  ]
  origin, factor, peak = wg.full(shape, 0.0, TILE), None, before
  if before is not None:
    peak = jnp.maximum(before, _highest(algebra, asked))
    finite = jnp.maximum(peak, FLOOR)  # where nothing was seen
    factor, origin = algebra.exp(before - finite), wg.wide(finite, shape, 1)
    mass = mass * wg.wide(factor, shape, 1)
  edited = []
  for (scores, visible, told), of in zip(asked, facts, strict=True):
    weights = algebra.weigh(scores, told, origin)
    mass += jnp.abs(weights) if algebra.signed else weights
    if count is not None:
      count += 1.0 if visible is True else jnp.where(visible, 1.0, 0.0)
    edited.append(algebra.edited(weights, of))
  return edited, factor, (mass, count, peak)


def _highest(algebra: Algebra, asked: Sequence[tuple]) -> jax.Array:
  """The height of the highest visible pair of every query, -inf where there is none."""
  assert algebra.height is not None
  heights = [
    algebra.height(scores) if visible is True
    else jnp.where(visible, algebra.height(scores), -jnp.inf)
    for scores, visible, _ in asked
  ]  # fmt: skip
  return jnp.max(functools.reduce(jnp.maximum, heights), axis=0) * algebra.unit


def _facts(block: Block, place: Place, scratch: Scratch, tile, slot, piece) -> Facts:
  call, wg, given = block.call, block.wg, block.given
  rows = block.cut.rows
  at = tile * call.block + piece.start
  if scratch.side is None:
    number = _number(wg, (PIECE, rows))
    k = Side(number + at, number + at, jnp.zeros_like(number))
  else:
    k = Side(*(
      wg.wide(wg.load(scratch.side.at[slot, c, piece], ROW), (PIECE, rows)) for c in range(FIELDS)
    ))  # fmt: skip
  *q, head = (
    wg.wide(wg.load(scratch.facts.at[c], COLUMN), (PIECE, rows), 1) for c in range(FIELDS + 1)
  )
  operands = tuple(_operand(block, place, x, at) for x in given.beside)
  return Facts(Side(*q), k, place.row, head + place.head * call.group, operands, True)


def _operand(block: Block, place: Place, x: Any, at) -> jax.Array:
  """A piece of what `decode_call.beside` laid out."""
  rows, wg = block.cut.rows, block.wg
  row, head = (0 if n == 1 else i for n, i in zip((*x.shape, 1), (place.row, place.head)))
  if x.ndim == 1:
    return jnp.full((1, 1), x[row])
  columns = pl.ds(place.line, rows)
  if x.ndim == 4:
    return wg.load(x.at[row, head, pl.ds(at, PIECE), columns], TILE)
  return wg.wide(wg.load(x.at[row, head, columns], COLUMN), (PIECE, rows), 1)


def _scaled(block: Block, place: Place, scratch: Scratch, slot, piece, product) -> jax.Array:
  """Products with keys as they were before they were stored."""
  if block.given.k_head is not None:
    product *= block.given.k_head[place.row, place.head]
  if scratch.k_token is not None:
    scale = block.wg.load(scratch.k_token.at[slot, piece], ROW)
    product *= block.wg.wide(scale, product.shape)
  return product


def _products(block: Block, scratch: Scratch, barriers: Barriers, slot, pieces) -> list[jax.Array]:
  """k q^T of every piece, (64, rows)."""
  if scratch.keys is None:
    return block.wg.products([(scratch.k.at[slot, piece], scratch.q) for piece in pieces])
  plgpu.barrier_wait(barriers.keys)
  products = block.wg.products([(scratch.keys.at[piece], scratch.q) for piece in pieces])
  plgpu.barrier_arrive(barriers.read)
  return products


def _number(wg: Warpgroup, shape: tuple[int, int]) -> jax.Array:
  """The number of its row at every place of a tile."""
  return wg.cast(lax.broadcasted_iota(jnp.int32, shape, 0), TILE)


def _store(wg: Warpgroup, ref: Any, piece, x: jax.Array) -> None:
  """Writes a tile (64, rows) turned to columns of shared memory (rows, block)."""
  if wg.interpret:
    ref[:, piece] = x.T
    return
  turned = ref.at[:, piece].T
  turned[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def _add(wg: Warpgroup, acc: jax.Array, values: Any, weights: Any) -> jax.Array:
  """acc + v^T w^T; acc (V, rows), v (block, V) and w (rows, block) in swizzled shared memory."""
  if wg.interpret:
    return acc + dot(values[...], weights[...], (0, 1))
  turn = lambda ref: ref.T
  return pl.run_state(lambda sums: plgpu.wgmma(sums, turn(values), turn(weights)))(
    plgpu.ACC.init(acc)
  )
