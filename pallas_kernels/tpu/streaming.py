"""Streaming attention on TPU: a fold over tiles of keys; backward.py is its reverse.

The grid walks over a list of the tiles that a mask leaves to visit, so that keys of any length
stream from HBM while the sums of a block of queries stay in VMEM. Within a tile, pieces of some
rows and columns are computed at once; the products of the pieces ahead are started before the
weights of the present one are needed, so that the matrix units work while the vector units do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.algebra import LANES, Algebra
from pallas_kernels.tpu.walk import (
  SUBLANES, Blocks, Call, Place, ahead, asks, by_kind, dot, doubled, eight, eights, facts_of,
  inputs_of, lanes, leading, parts, rise, run, sides_of, stand, statistics, upright, weigh, wide,
)  # fmt: skip
from pallas_kernels.visits import FIRST, LAST, Operand, occurring, visits

F32 = jnp.float32
SIZE, COUNT = range(2)  # rows of the statistics that `forward` returns
PACKED = 16  # rows of a register of 16-bit numbers


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
    is float32 and SIZE the mass. Where sums lie, the mass is that of the weights as they read
    values, rounded to the dtype of v, unless they are edited or signed.
  """
  call, plan = Call.of(q, k, v, blocks), visits(kinds)
  where = lambda b, n, t, batch, line, at, flags: Place(b + batch[t], n, line[t], at[t])
  operand_specs, row, column = inputs_of(call, blocks, where, operands, layout)
  whole, some = occurring(kinds)
  divided = algebra.height is not None
  sums: _Sums = (_Lying if blocks.lying and algebra.turns else _Standing)(
    call, blocks, algebra, v.dtype
  )

  def kernel(batch, line, at, flags, *refs):
    facts_refs, rest = refs[: 2 + len(operands)], refs[2 + len(operands) :]
    q_ref, k_ref, v_ref, out_ref, stats_ref, full, side, *own = rest
    t = pl.program_id(2)
    b, n = pl.program_id(0) + batch[t], pl.program_id(1)
    facts = facts_of(facts_refs, side, blocks, b, n, turned=sums.turned)
    given = leading(algebra, facts(0, 0), blocks, call.H, q.dtype) if sums.turned else 1.0
    held = sums.Held(*own)

    @pl.when((flags[t] & FIRST) > 0)
    def _():
      held.acc[...] = jnp.zeros(held.acc.shape, F32)
      held.count[...] = jnp.zeros(held.count.shape, F32)
      held.peak[...] = jnp.full(held.peak.shape, -jnp.inf if divided else 0.0, F32)
      full[0] = 0
      if not sums.turned:
        stand(facts_refs[0], side)
      sums.begin(held, given, q_ref)

    def visit(masked: bool):
      if algebra.counts and not masked:
        full[0] += blocks.k
      if sums.turned and (masked or asks(algebra, facts(0, 0), blocks)):
        stand(facts_refs[1], side)
      sums.add(held, facts, masked, given, q_ref, k_ref, v_ref)

    by_kind(flags[t], visit, whole, some)

    @pl.when((flags[t] & LAST) > 0)
    def _():
      stats_ref[...] = jnp.zeros(stats_ref.shape, F32)
      sums.write(held, out_ref, stats_ref)
      stats_ref[COUNT : COUNT + 1] += full[0].astype(F32)

  return run(
    kernel, plan, (call.B if plan.shared else 1, call.N, plan.count),
    [*sides_of(q_side, k_side, blocks, where), *operand_specs,
     row(call.H), column(call.H), column(call.V)],
    [row(call.V), statistics(blocks, where)],
    [((call.B, call.N, call.T, call.V), q.dtype if divided else F32),
     ((call.B, call.N, SUBLANES, call.T), F32)],
    [pltpu.SMEM((1,), jnp.int32), upright(blocks.k if sums.turned else blocks.q),
     *sums.scratch()],
    (eight(q_side), eight(k_side), *operands, q, k, v),
    interpret, "attnx_forward",
  )  # fmt: skip


class _Sums:
  """What a block of queries sums up while tiles of keys are visited.

  Attributes:
    turned: whether tiles are (K, Q).
    Held: the arrays that hold it, of which there are always `acc`, `peak` and `count`.
  """

  turned: bool
  Held: Callable[..., Any]

  def __init__(self, call: Call, blocks: Blocks, algebra: Algebra, dtype: Any):
    self.call, self.blocks, self.algebra, self.dtype = call, blocks, algebra, dtype

  def scratch(self) -> list:
    """What holds the arrays of `Held`."""
    raise NotImplementedError

  def begin(self, held, given: float, q_ref) -> None:
    """Before the first tile, when there is nothing yet; `given` is as for `add`."""

  def add(self, held, facts, masked: bool, given: float, q_ref, k_ref, v_ref) -> None:
    """merge(seen, visit(piece)) for every piece of a tile.

    Queries are to be multiplied by `given` ahead of products, which then leave that out.
    """
    raise NotImplementedError

  def write(self, held, out_ref, stats_ref) -> None:
    """Output and statistics, after the last tile."""
    raise NotImplementedError


class _Standing(_Sums):
  """Tokens upright: sums (Q, V), and statistics (Q, 128), alike in all lanes but for the mass."""

  turned = False

  class Held(NamedTuple):
    acc: Any
    mass: Any
    peak: Any
    count: Any

  def scratch(self):
    statistic = pltpu.VMEM((self.blocks.q, LANES), F32)
    return [pltpu.VMEM((self.blocks.q, self.call.V), F32), *[statistic] * 3]

  def begin(self, held, given, q_ref):
    held.mass[...] = jnp.zeros(held.mass.shape, F32)

  def add(self, held, facts, masked, given, q_ref, k_ref, v_ref):
    R, C, algebra = self.blocks.rows, self.blocks.columns, self.algebra
    products = lambda r, c: dot(q_ref[pl.ds(r, R)], k_ref[pl.ds(c, C)], (1, 1))
    for (r, c), product in ahead(self.blocks.pieces(), products, self.blocks.ahead):
      rows, of = pl.ds(r, R), facts(r, c)
      scores, visible, told = algebra.masked(product, of, masked)
      weights, factor = weigh(algebra, scores, told, held.peak, held.mass, rows)
      edited = algebra.edited(weights, of).astype(v_ref.dtype)
      read = dot(edited, v_ref[pl.ds(c, C)], (1, 0))
      seen = held.acc[rows]
      held.acc[rows] = (seen if factor is None else seen * wide(factor, read.shape[1])) + read
      if algebra.counts and masked:
        held.count[rows] += lanes(jnp.where(visible, 1.0, 0.0))

  def write(self, held, out_ref, stats_ref):
    algebra, rows = self.algebra, self.blocks.rows
    stats_ref[COUNT : COUNT + 1] = jnp.sum(held.count[...].T, axis=0, keepdims=True)
    if algebra.height is None:
      out_ref[...] = held.acc[...]
      stats_ref[SIZE : SIZE + 1] = jnp.sum(held.mass[...].T, axis=0, keepdims=True)
      return

    @pl.loop(0, self.blocks.q // rows)  # unrolled, it spills registers
    def _(at):
      here = pl.ds(pl.multiple_of(at * rows, rows), rows)
      total = jnp.sum(held.mass[here], axis=1, keepdims=True)
      out_ref[here] = (held.acc[here] / jnp.where(total > 0.0, total, 1.0)).astype(out_ref.dtype)
      size = held.peak[here] + jnp.log(total) * (1 / algebra.base)
      stats_ref[SIZE : SIZE + 1, here] = size.T[:1]


class _Lying(_Sums):
  """Tokens along lanes: sums (V, Q), and statistics (1, Q).

  Weights are (K, Q) where v^T reads them, so that tokens fill the columns of the matrix units, and
  a row of ones below v^T adds the weights up. Heads that leave half of the rows of a unit empty
  have the factor that scores begin with on the queries, in two parts, which keys meet twice.
  """

  turned = True

  class Held(NamedTuple):
    acc: Any
    peak: Any
    count: Any
    values: Any
    queries: Any = None

  def __init__(self, call, blocks, algebra, dtype):
    super().__init__(call, blocks, algebra, dtype)
    self.up = -(-call.V // PACKED) * PACKED  # rows of v^T; what adds up to the mass comes after
    self.adds = algebra.edit is None and not algebra.signed  # the mass, by a product

  def scratch(self):
    blocks, held = self.blocks, pltpu.VMEM
    H, dtype = self.call.H, self.dtype
    queries = [held((blocks.q, 2 * H), dtype)] if doubled(H, dtype) else []
    return [
      held((self.up + PACKED, blocks.q), F32), held((1, blocks.q), F32),
      held((SUBLANES, blocks.q), F32), held((self.up + PACKED, blocks.k), dtype), *queries,
    ]  # fmt: skip

  def begin(self, held, given, q_ref):
    rows = lax.broadcasted_iota(jnp.int32, held.values.shape, 0)
    held.values[...] = jnp.where(rows == self.up, 1.0, 0.0).astype(self.dtype)
    if given != 1:
      held.queries[...] = parts(q_ref[...], given)

  def add(self, held, facts, masked, given, q_ref, k_ref, v_ref):
    R, C, algebra = self.blocks.rows, self.blocks.columns, self.algebra
    held.values[: self.call.V] = v_ref[...].T
    top = self.up + (PACKED if self.adds else 0)

    def products(r, c):
      rows, keys = pl.ds(r, R), k_ref[pl.ds(c, C)]
      if given == 1:
        return dot(keys, q_ref[rows], (1, 1))
      return dot(jnp.concatenate([keys, keys], axis=1), held.queries[rows], (1, 1))

    for (r, c), product in ahead(self.blocks.pieces(), products, self.blocks.ahead):
      rows, of = pl.ds(r, R), facts(r, c)
      scores, visible, told = algebra.masked(product, of, masked, given=given)
      origin, shrunk = jnp.zeros((1, R), F32), 1.0
      if algebra.height is not None:
        at = (slice(None), rows)
        origin, shrunk = rise(algebra, scores, told, held.peak, at, axis=0)
      weights = algebra.weigh(scores, told, origin)
      edited = algebra.edited(weights, of).astype(self.dtype)
      read = dot(held.values[:top, pl.ds(c, C)], edited, (1, 0))
      held.acc[:top, rows] = held.acc[:top, rows] * shrunk + read
      if not self.adds:
        added = eights(jnp.abs(weights) if algebra.signed else weights)
        mass = (slice(top, top + SUBLANES), rows)
        held.acc[mass] = held.acc[mass] * shrunk + added
      if algebra.counts and masked:
        held.count[:, rows] += eights(jnp.where(visible, 1.0, 0.0))

  def write(self, held, out_ref, stats_ref):
    algebra, V = self.algebra, self.call.V
    stats_ref[COUNT : COUNT + 1] = jnp.sum(held.count[...], axis=0, keepdims=True)

    @pl.loop(0, self.blocks.q // LANES)
    def _(at):
      here = pl.ds(pl.multiple_of(at * LANES, LANES), LANES)
      total, out = jnp.sum(held.acc[self.up :, here], axis=0, keepdims=True), held.acc[:V, here]
      if algebra.height is not None:
        out = out / jnp.where(total > 0.0, total, 1.0)
        total = held.peak[:, here] + jnp.log(total) * (1 / algebra.base)
      out_ref[here] = out.T.astype(out_ref.dtype)
      stats_ref[SIZE : SIZE + 1, here] = total
