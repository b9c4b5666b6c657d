"""Decoding on TPU: few queries of each row against a long cache, which is split over its keys.

Decoding reads every key once, so that the bandwidth of HBM bounds it. The queries of all heads that
share a key head lie in one matrix of rows, (G T, H), and one product serves them. The grid walks
over a list of the tiles that masks and lengths leave to visit, and spends nothing on others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.algebra import LANES, Algebra, Facts, Side
from pallas_kernels.decoding import GROUP, Call, Partials, check_beside, packed, planned, scales
from pallas_kernels.tpu import decode_call
from pallas_kernels.tpu.walk import dot, lanes, weigh, wide
from pallas_kernels.visits import EMPTY, FULL, PARTIAL, Operand

MASS, PEAK, COUNT = range(3)  # rows of the statistics
SENT = 4  # copies of pages that are started in one turn of a loop


def decode(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_side: jax.Array,
  k_side: jax.Array,
  operands: Sequence[jax.Array] = (),
  kinds: jax.Array | None = None,
  *,
  algebra: Algebra,
  layout: Sequence[Operand] = (),
  pages: jax.Array | None = None,
  lengths: jax.Array | None = None,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  splits: int = 1,
  block_k: int | None = None,
  block_heads: int | None = None,
  interpret: Any = False,
) -> Partials:
  """sum_j w_j v_j of every query over the visible slots of its row's cache, in parts.

  Slots of a row come in the order of its cache; tiles are runs of `block_k` slots.

  Args:
    q: (B, N, T, H), float32 or bfloat16, few rows T.
    k, v: (B, K, S, H) and (B, K, S, V), of the dtype of `q`, int8 or float8_e4m3fn; or pools of
      pages, (M, K, P, H) and (M, K, P, V). K divides N.
    q_side, k_side: (#B, 3, T) and (#B, 3, S) int32, the fields of `Side`.
    operands: (#B, #N, #T, X) arrays that `layout` describes, one for one.
    kinds: (#B, tiles) int32, EMPTY, PARTIAL or FULL, for all queries of a row; None: all PARTIAL.
    algebra: what becomes of products.
    layout: how the operands lie.
    pages: (B, S / P) int32, the pages of each row in order; those beyond its length are not read.
    lengths: (B,) int32, slots of each row that are filled; None: all, if there are no pages.
    k_scale, v_scale: what stored keys and values are multiplied by, float32: of each head, (K,) or
      (B, K), or of each token in the order of slots, (B, K, S). None: 1.
    splits: parts to deal the tiles out to; one is best on a single core. Two cores of one device
      (v4, v5p) want two parts, or `block_heads` of K / 2, which leaves nothing to merge.
    block_k: slots of a tile; None: what makes a step large enough, see `decode_call.block_of`.
    block_heads: key heads of a step, a divisor of K; None: at most 8.
    interpret: emulate on CPU, for tests: True, or `pltpu.InterpretParams`.

  Raises:
    ValueError: shapes, dtypes or sizes do not fit each other, or a table not into scalar memory.
    NotImplementedError: pages too short for the dtype.
  """
  by_token = any(x is not None and x.ndim == 3 for x in (k_scale, v_scale))
  call = decode_call.call_of(q, k, v, pages, splits, block_k, block_heads, by_token)
  decode_call.check(call, q, k, v, by_token)
  check_beside(call, q_side, k_side, operands, layout, kinds, pages, lengths)
  (k_head, k_token), (v_head, v_token) = (scales(call, x) for x in (k_scale, v_scale))
  lengths = jnp.full(call.B, call.S) if lengths is None else jnp.clip(lengths, 0, call.S)
  plan = planned(call, kinds, lengths)
  listed, steps = decode_call.visits(plan, splits, prefix=kinds is None)
  lies = functools.partial(packed, call)
  given = Operands(
    *listed, lengths.astype(jnp.int32),
    table=None if pages is None else jnp.clip(pages, 0, k.shape[0] - 1).reshape(-1),
    k_head=None if k_head is None else k_head.reshape(-1),
    q_rows=decode_call.standing(call, q_side), k_side=k_side,
    beside=tuple(x if x.shape[1:3] == (1, 1) else lies(x) for x in operands),
    k_token=k_token, v_token=v_token, q=lies(q), k=k, v=v,
  )  # fmt: skip
  body = functools.partial(_kernel, call=call, algebra=algebra, full=kinds is not None)
  out, stats = _run(call, given, steps, body, layout, interpret)
  out = out if v_head is None else out * v_head[:, :, None, None]
  return _unpacked(call, out, stats)


def _unpacked(call: Call, out: jax.Array, stats: jax.Array) -> Partials:
  """(splits, B, K, rows, X) to (splits, B, N, T, X)."""
  shape = (call.splits, call.B, call.N, call.T, -1)
  out, stats = (x[:, :, :, : call.group * call.T].reshape(shape) for x in (out, stats))
  return Partials(out, stats[..., MASS], stats[..., PEAK], stats[..., COUNT])


class Operands(NamedTuple):
  """What a kernel is handed, arrays and then references, in the order of its arguments.

  Attributes:
    row, source, tile, kind: the lists of `Visits`.
    lengths: (B,) int32.
    table: (B S / P,) int32 pages, or None.
    k_head: (B K,) float32, what the products of a head are multiplied by, or None.
    q_rows: (#B, rows, 4) int32, of `decode_call.standing`.
    k_side: (#B, 3, S) int32.
    beside: (#B, #K, #rows, X) each, the operands of the caller.
    k_token, v_token: (B, K, S) float32 or None.
    q: (B, K, rows, H).
    k, v: as for `decode`.
  """

  row: Any
  source: Any
  tile: Any
  kind: Any
  lengths: Any
  table: Any
  k_head: Any
  q_rows: Any
  k_side: Any
  beside: Any
  k_token: Any
  v_token: Any
  q: Any
  k: Any
  v: Any


KNOWN = Operands._fields.index("q_rows")  # those before it are scalars


class Scratch(NamedTuple):
  """Sums of a row while its tiles pass, (heads, rows, X) float32 each, and tiles of pages.

  Attributes:
    acc: X = V.
    mass, count: spread over lanes, which are summed once, at the end of a row.
    peak: alike in all lanes.
    k_pages, v_pages: (2, heads, block, H or V), the tile at hand and the next one.
    arrived: (2, 2) semaphores, of the two tiles of keys and of values.
  """

  acc: Any
  mass: Any
  count: Any
  peak: Any
  k_pages: Any = None
  v_pages: Any = None
  arrived: Any = None


def _scratch(call: Call, given: Operands) -> Scratch:
  sums = lambda width: pltpu.VMEM((call.heads, call.rows, width), jnp.float32)
  held = Scratch(sums(call.V), *[sums(LANES)] * 3)
  if not call.page:
    return held
  tiles = lambda x: pltpu.VMEM((2, call.heads, call.block, x.shape[3]), x.dtype)
  return held._replace(
    k_pages=tiles(given.k), v_pages=tiles(given.v), arrived=pltpu.SemaphoreType.DMA((2, 2))
  )


def _specs(call: Call, given: Operands, layout: Sequence[Operand]) -> Operands:
  """A block spec of every array that is not a scalar."""
  length = given.row.shape[0] // call.splits

  def spec(block: tuple, at: Callable) -> pl.BlockSpec:
    """`at` takes the head block, the row whose sums are made, and what lies in fast memory."""

    def index(h, s, i, row, source, tile, *_):
      step = s * length + i
      return at(h, row[step], source[step], tile[step])

    return pl.BlockSpec(block, index)

  many = lambda x, b: 0 if x.shape[0] == 1 else b

  def beside(x, kind: Operand):
    block = (
      None, *(1 if n == 1 else size for n, size in zip(x.shape[1:3], (call.heads, call.rows))),
      call.block if kind.pairs and x.shape[3] > 1 else x.shape[3],
    )  # fmt: skip
    over = kind.pairs and x.shape[3] > 1
    return spec(
      block, lambda h, b, c, t: (many(x, c), 0 if x.shape[1] == 1 else h, 0, t if over else 0)
    )

  token = lambda x: None if x is None else spec(
    (None, call.heads, call.block), lambda h, b, c, t: (c, h, t)
  )
  tile = lambda x: pl.BlockSpec(memory_space=pl.ANY) if call.page else spec(
    (None, call.heads, call.block, x.shape[3]), lambda h, b, c, t: (c, h, t, 0)
  )
  return given._replace(
    **dict.fromkeys(Operands._fields[:KNOWN]),
    q_rows=spec((None, call.rows, GROUP + 1), lambda h, b, c, t: (many(given.q_rows, b), 0, 0)),
    k_side=spec((None, GROUP, call.block), lambda h, b, c, t: (many(given.k_side, c), 0, t)),
    beside=tuple(beside(x, kind) for x, kind in zip(given.beside, layout, strict=True)),
    k_token=token(given.k_token), v_token=token(given.v_token),
    q=spec((None, call.heads, call.rows, call.H), lambda h, b, c, t: (b, h, 0, 0)),
    k=tile(given.k), v=tile(given.v),
  )  # fmt: skip


def _run(call: Call, given: Operands, steps: jax.Array, body: Callable, layout, interpret):
  """The call of the kernel: sums (splits, B, K, rows, V), and statistics (..., LANES)."""
  length = given.row.shape[0] // call.splits
  scratch = _scratch(call, given)
  vary = jax.typeof(given.q).manual_axis_type  # inside of `jax.shard_map`: as queries do

  def result(width: int):
    at = lambda h, s, i, row, *_: (s, row[s * length + i], h, 0, 0)
    shape = (call.splits, call.B, call.K, call.rows, width)
    return pl.BlockSpec((None, None, call.heads, call.rows, width), at), jax.ShapeDtypeStruct(
      shape, jnp.float32, manual_axis_type=vary
    )

  out_specs, out_shape = zip(result(call.V), result(LANES))
  inputs, tree = jax.tree.flatten(given)

  def kernel(*refs):
    given, rest = tree.unflatten(refs[: len(inputs)]), refs[len(inputs) :]
    body(given, *rest[:2], Scratch(*rest[2:]))

  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(jax.tree.leaves(given[:KNOWN])),
      grid=(call.K // call.heads, call.splits, steps),
      in_specs=jax.tree.leaves(_specs(call, given, layout)),
      out_specs=out_specs,
      scratch_shapes=[x for x in scratch if x is not None],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      disable_bounds_checks=True,  # they take half the bundles that send for a page
    ),
    interpret=interpret,
    name="attnx_decode",
  )(*inputs)  # fmt: skip


class Step(NamedTuple):
  """Where the grid is; scalars.

  Attributes:
    head: the first key head.
    number, at: the place on the last axis of the grid, and in the lists of visits.
    row, tile, kind: whose sums are made, and what is added to them.
    filled: slots that hold a token from the first of the tile on.
  """

  head: Any
  number: Any
  at: Any
  row: Any
  tile: Any
  kind: Any
  filled: Any


def _step(call: Call, given: Operands) -> Step:
  number, part = pl.program_id(2), given.row.shape[0] // call.splits
  at = pl.program_id(1) * part + number
  row, tile, kind = given.row[at], given.tile[at], given.kind[at]
  head, filled = pl.program_id(0) * call.heads, given.lengths[row] - tile * call.block
  return Step(head, number, at, row, tile, kind, filled)


def _kernel(given: Operands, out_ref, stats_ref, sums: Scratch, *, call, algebra, full: bool):
  """One step of the grid: a visit of a tile, from the first to the last of a row."""
  step, steps, final = _step(call, given), pl.num_programs(2), given.row.shape[0] - 1
  before, after = jnp.maximum(step.at - 1, 0), jnp.minimum(step.at + 1, final)

  @pl.when((step.number == 0) | (given.row[before] != step.row))
  def begin():
    for ref in (sums.acc, sums.mass, sums.count):
      ref[...] = jnp.zeros(ref.shape, jnp.float32)
    least = 0.0 if algebra.height is None else -jnp.inf
    sums.peak[...] = jnp.full(sums.peak.shape, least, jnp.float32)

  k_tile, v_tile = given.k, given.v
  if call.page:
    slot = lax.rem(step.number, 2)
    _exchange(call, given, sums, step, slot, after, step.number + 1 < steps)
    k_tile, v_tile = sums.k_pages.at[slot], sums.v_pages.at[slot]

  pl.when((step.kind > EMPTY) & (step.filled < call.block))(lambda: _clean(v_tile, step.filled))
  for kind, masked in ((PARTIAL, True), (FULL, False)):
    if masked or full:
      pl.when(step.kind == kind)(
        functools.partial(_visit, call, algebra, given, sums, step, k_tile, v_tile, masked)
      )

  @pl.when((step.number == steps - 1) | (given.row[after] != step.row))
  def finish():
    out_ref[...] = sums.acc[...]
    total = lambda ref: jnp.sum(ref[...], axis=-1, keepdims=True)
    lane = lax.broadcasted_iota(jnp.int32, stats_ref.shape, 2)
    counted = jnp.where(lane == COUNT, total(sums.count), sums.peak[...])
    stats_ref[...] = jnp.where(lane == MASS, total(sums.mass), counted)


def _exchange(call, given, sums, step: Step, slot, after, more) -> None:
  """Sends for the pages of the next tile, and waits for those of this one."""
  wanted = lambda at: given.kind[at] > EMPTY
  send = functools.partial(_send, call, given, sums, step.head)
  pl.when((step.number == 0) & wanted(step.at))(lambda: send(step.at, slot))
  pl.when(more & wanted(after))(lambda: send(after, 1 - slot))
  pl.when(wanted(step.at))(lambda: _wait(call, given, sums, step.at, slot))


def _pages(call: Call, given: Operands, at):
  """How many pages of a tile its row has filled, and where the table lists them."""
  row, first = given.source[at], given.tile[at] * call.block
  filled = lax.div(given.lengths[row] - first + (call.page - 1), call.page)
  listed = row * (call.S // call.page) + given.tile[at] * (call.block // call.page)
  return jnp.minimum(filled, call.block // call.page), listed


def _send(call: Call, given: Operands, sums: Scratch, head, at, slot) -> None:
  """Starts the copies of the pages of a tile, of the key heads from `head` on."""
  (some, listed), page = _pages(call, given, at), call.page
  rounds = lax.div(some, SENT)

  def send(n):
    pool, slots = given.table[listed + n], pl.ds(pl.multiple_of(n * page, page), page)
    for which, (x, tile) in enumerate(((given.k, sums.k_pages), (given.v, sums.v_pages))):
      source, target = x.at[pool, pl.ds(head, call.heads)], tile.at[slot, :, slots]
      pltpu.make_async_copy(source, target, sums.arrived.at[slot, which]).start()

  @pl.loop(0, rounds)
  def send_some(group):
    for n in range(SENT):  # the addresses of one are computed while another is sent
      send(group * SENT + n)

  pl.loop(rounds * SENT, some)(send)


def _wait(call: Call, given: Operands, sums: Scratch, at, slot) -> None:
  """Waits for what `_send` sent for: semaphores count bytes, whichever copies they come from."""
  (some, _), page = _pages(call, given, at), call.page

  def wait(first, size: int):
    for which, tile in enumerate((sums.k_pages, sums.v_pages)):
      arrived = tile.at[slot, :, pl.ds(first, size)]
      pltpu.make_async_copy(arrived, arrived, sums.arrived.at[slot, which]).wait()

  whole = some == call.block // page
  pl.when(whole)(lambda: wait(0, call.block))
  count = jnp.where(whole, 0, some)
  pl.loop(0, count)(lambda n: wait(pl.multiple_of(n * page, page), page))


def _clean(v_tile, filled) -> None:
  """Zeroes the values of slots that hold no token: they may be anything, and 0 NaN is not 0."""
  if not jnp.issubdtype(v_tile.dtype, jnp.floating):
    return
  heads, block, _ = v_tile.shape
  kept = lax.broadcasted_iota(jnp.int32, (block, 1), 0) < filled

  @pl.loop(0, heads)
  def clean(j):
    v_tile[j] = jnp.where(kept, v_tile[j].astype(jnp.float32), 0.0).astype(v_tile.dtype)


def _visit(call, algebra, given, sums, step: Step, k_tile, v_tile, masked: bool) -> None:
  """merge(seen, visit(tile)) for every head of a step.

  All heads go through a stage before any goes through the next: product, peak, weights and product
  are a chain of latencies, which the units only fill with the work of other heads.
  """
  heads, dtype = range(call.heads), given.q.dtype
  products = [dot(given.q[j], k_tile[j].astype(dtype), (1, 1)) for j in heads]
  facts = [_facts(call, given, step, j) for j in heads]
  filled = lax.broadcasted_iota(jnp.int32, (1, call.block), 1) < step.filled if masked else True
  scaled = [_scaled(call, given, step, j, products[j]) for j in heads]
  scores = [algebra.masked(scaled[j], facts[j], masked, filled) for j in heads]
  weighed = [_weigh(call, algebra, sums, j, *scores[j]) for j in heads]
  for j, (weights, factor) in enumerate(weighed):
    weights = algebra.edited(weights, facts[j])
    if given.v_token is not None:
      weights *= given.v_token[j : j + 1]
    if masked:  # of what lies beyond, not even zero times it may be read
      weights = jnp.where(filled, weights, 0.0)
    read = dot(weights.astype(dtype), v_tile[j].astype(dtype), (1, 0))
    sums.acc[j] = read + (sums.acc[j] if factor is None else sums.acc[j] * wide(factor, call.V))


def _facts(call: Call, given: Operands, step: Step, j: int) -> Facts:
  rows, columns = given.q_rows[...], given.k_side[...]
  return Facts(
    q=Side(*(rows[:, c : c + 1] for c in range(GROUP))),
    k=Side(*(columns[c : c + 1] for c in range(GROUP))),
    batch=step.row,
    head=(step.head + j) * call.group + rows[:, GROUP:],
    operands=tuple(ref[j if ref.shape[0] > 1 else 0] for ref in given.beside),
  )


def _scaled(call: Call, given: Operands, step: Step, j: int, product: jax.Array) -> jax.Array:
  """Products with keys as they were before they were stored."""
  if given.k_head is not None:
    product *= given.k_head[step.row * call.K + step.head + j]
  if given.k_token is not None:
    product *= given.k_token[j : j + 1]
  return product


def _weigh(call: Call, algebra: Algebra, sums: Scratch, j: int, scores, visible, told):
  """Weights, and what the sums of values shrink by, or None; adds up mass, count and peak."""
  if algebra.counts:
    sums.count[j] += call.block // LANES if visible is True else lanes(jnp.where(visible, 1.0, 0.0))
  return weigh(algebra, scores, told, sums.peak, sums.mass, j)
