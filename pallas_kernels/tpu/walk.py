"""How kernels walk over tiles: lists of visits, blocks of arrays, pieces of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import products
from pallas_kernels.algebra import FLOOR, LANES, Algebra, Facts, Side
from pallas_kernels.visits import FULL, PARTIAL, Operand

SUBLANES = 8
DEPTH = 256  # of the matrix units that sums lie for


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a kernel cuts its work.

  Attributes:
    q, k: queries and keys of a tile, which move from HBM at once; multiples of 128.
    rows, columns: of a piece of a tile, which is computed at once; they divide q and k.
    ahead: pieces whose products are started before they are needed.
    lying: whether sums are (V, Q) and (H, K), tokens along lanes, in the forward kernel only if the
      algebra turns: a head of 128 fills but half of the columns of a matrix unit of 256.
  """

  q: int = 512
  k: int = 1024
  rows: int = 256
  columns: int = 512
  ahead: int = 1
  lying: bool = False

  def __post_init__(self):
    sizes = (self.q, self.k, self.rows, self.columns)
    if min(sizes) < LANES or any(size % LANES for size in sizes):
      raise ValueError(f"{self} must have sizes that are multiples of {LANES}")
    if self.q % self.rows or self.k % self.columns or self.ahead < 0:
      raise ValueError(f"{self}: rows must divide q and columns k, and ahead not be negative")

  def pieces(self) -> list[tuple[int, int]]:
    """(first row, first column) of every piece of a tile."""
    return [(r, c) for r in range(0, self.q, self.rows) for c in range(0, self.k, self.columns)]


class Call(NamedTuple):
  """The sizes that all kernels of a call share."""

  B: int
  N: int
  K: int
  T: int
  S: int
  H: int
  V: int

  @classmethod
  def of(cls, q, k, v, blocks: Blocks) -> Call:
    (B, N, T, H), (_, K, S, V) = q.shape, v.shape
    assert k.shape == (B, K, S, H) and N % K == 0, (q.shape, k.shape, v.shape)
    assert T % blocks.q == 0 and S % blocks.k == 0, (T, S, blocks)
    return cls(B, N, K, T, S, H, V)


class Place(NamedTuple):
  """Which block of each kind a grid step is at, from its indices and the list of visits."""

  b: Any
  n: Any
  i: Any
  j: Any


def block_of(
  shape: tuple[Any, ...], at: Callable[[Place], tuple], where: Callable
) -> pl.BlockSpec:
  """A block of an array (B, N, L, X) or (B, C, L), its leading axes squeezed."""
  return pl.BlockSpec(shape, lambda *grid: at(where(*grid)))


def inputs_of(call: Call, blocks: Blocks, where: Callable, operands, kinds_of: Sequence[Operand]):
  """Block specs of the operands, and functions of a width that give those of rows and columns."""
  bq, bk, group = blocks.q, blocks.k, call.N // call.K
  row = lambda width: block_of((None, None, bq, width), lambda p: (p.b, p.n, p.i, 0), where)
  column = lambda width: block_of(
    (None, None, bk, width), lambda p: (p.b, lax.div(p.n, group), p.j, 0), where
  )

  def operand(x, kind: Operand):
    sizes = (bq, bk) if kind.pairs else (bq, x.shape[3])
    block: Any = tuple(1 if n == 1 else size for n, size in zip(x.shape[2:], sizes))

    def at(p: Place):
      index = (p.b, p.n, p.i, p.j if kind.pairs else 0)
      return tuple(0 if n == 1 else i for n, i in zip(x.shape, index))

    return block_of((None, None, *block), at, where)

  return [operand(x, kind) for x, kind in zip(operands, kinds_of, strict=True)], row, column


def sides_of(q_side, k_side, blocks: Blocks, where: Callable) -> list[pl.BlockSpec]:
  many = lambda x, b: 0 if x.shape[0] == 1 else b
  return [
    block_of((None, SUBLANES, blocks.q), lambda p: (many(q_side, p.b), 0, p.i), where),
    block_of((None, SUBLANES, blocks.k), lambda p: (many(k_side, p.b), 0, p.j), where),
  ]


def statistics(blocks: Blocks, where) -> pl.BlockSpec:
  """Of what rows are told, or tell."""
  return block_of((None, None, SUBLANES, blocks.q), lambda p: (p.b, p.n, 0, p.i), where)


def eight(side: jax.Array) -> jax.Array:
  """(#B, 3, L) as (#B, 8, L): whole registers turn."""
  assert side.ndim == 3 and side.shape[1] == len(Side._fields), side.shape
  return jnp.pad(side, ((0, 0), (0, SUBLANES - side.shape[1]), (0, 0)))


def upright(length: int):
  """Scratch for what `stand` writes."""
  return pltpu.VMEM((len(Side._fields), length, LANES), jnp.int32)


def stand(rows_ref, standing) -> None:
  """Writes the first rows of (8, L) upright, every number in all 128 lanes: (n, L, 128)."""
  up = rows_ref[...].T
  for c in range(standing.shape[0]):
    standing[c] = jnp.broadcast_to(up[:, c : c + 1], standing.shape[1:])


def facts_of(
  refs, standing, blocks: Blocks, b, n, *, turned: bool = False
) -> Callable[[int, int], Facts]:
  """(first row, first column) of a piece to its facts.

  Args:
    refs: both sides and the operands.
    standing: what `stand` wrote of the queries, or of the keys where tiles are turned.
    blocks: how the work is cut.
    b, n: row of the batch and head.
    turned: whether tiles are (K, Q).
  """
  q_ref, k_ref, *operand_refs = refs
  R, C = blocks.rows, blocks.columns
  lying = lambda ref, at, size: Side(*(ref[c : c + 1, at : at + size] for c in range(3)))
  standing_up = lambda at, size, width: Side(*(
    wide(standing[c, at : at + size], width) for c in range(3)
  ))  # fmt: skip

  def piece(ref, r: int, c: int):
    whole, sizes = (pl.ds(r, R), pl.ds(c, C)), (blocks.q, blocks.k)
    return ref[tuple(at if n == size else slice(None)
                     for at, n, size in zip(whole, ref.shape, sizes, strict=True))]  # fmt: skip

  def at(r: int, c: int) -> Facts:
    operands = tuple(piece(ref, r, c) for ref in operand_refs)
    if turned:
      return Facts(lying(q_ref, r, R), standing_up(c, C, R), b, n, operands, True)
    return Facts(standing_up(r, R, C), lying(k_ref, c, C), b, n, operands)

  return at


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
  """Sum over axis axes[0] of a and axes[1] of b, in float32 and, of float32, in full precision."""
  return products.dot(a, b, axes, lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def ahead(pieces: list, start: Callable, count: int) -> Iterator[tuple]:
  """Each piece with what `start` gave for it, started `count` pieces before."""
  queue = [start(*piece) for piece in pieces[:count]]
  for n, piece in enumerate(pieces):
    if n + count < len(pieces):
      queue.append(start(*pieces[n + count]))
    yield piece, queue.pop(0)


def piece_of(blocks: Blocks, turned: bool) -> jax.ShapeDtypeStruct:
  """A piece of a tile of (Q, K), or (K, Q)."""
  shape = (blocks.columns, blocks.rows) if turned else (blocks.rows, blocks.columns)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def doubled(H: int, dtype: Any) -> bool:
  """Whether the rows of a matrix unit of 256 have room for two parts of what is H wide."""
  return dtype == jnp.bfloat16 and H % LANES == 0 and 2 * H <= DEPTH


def leading(algebra: Algebra, facts: Facts, blocks: Blocks, H: int, dtype: Any) -> float:
  """What one side of products is multiplied by ahead of them, in `parts`; 1 if it is not.

  It is the factor that scores begin with, which each pair would else be multiplied by.
  """
  return algebra.leading(piece_of(blocks, facts.turned), facts) if doubled(H, dtype) else 1.0


def parts(x: jax.Array, factor: float) -> jax.Array:
  """factor x as the sum of two numbers, (rows, H) to (rows, 2 H): all first ones, then the others.

  Of bfloat16, the sum is exact to 16 bits.
  """
  scaled = x.astype(jnp.float32) * factor
  first = scaled.astype(x.dtype)
  rest = scaled - first.astype(jnp.float32)
  return jnp.concatenate([first, rest.astype(x.dtype)], axis=1)


def wide(statistic: jax.Array, width: int) -> jax.Array:
  """A number of each row, (rows, 128) alike in all lanes, to (rows, width)."""
  return jnp.tile(statistic, (1, -(-width // LANES)))[:, :width]


def lanes(x: jax.Array) -> jax.Array:
  """(rows, columns) summed to (rows, 128): the lanes are summed once, at the end of a row."""
  return functools.reduce(
    jnp.add, [x[:, c : c + LANES] for c in range(0, x.shape[1], LANES)]
  )


def eights(x: jax.Array) -> jax.Array:
  """(rows, columns) summed to (8, columns)."""
  return functools.reduce(
    jnp.add, [x[r : r + SUBLANES] for r in range(0, x.shape[0], SUBLANES)]
  )


def rise(algebra: Algebra, scores, visible, peak, at, axis: int) -> tuple[jax.Array, jax.Array]:
  """What weights of a piece are measured from, and by how much what was summed before shrinks.

  Args:
    algebra: one that has peaks.
    scores: of the piece.
    visible: what `Algebra.masked` told of them.
    peak: those of rows; `at` of it belongs to this piece, and moves on.
    at: an index.
    axis: along which the keys of the piece lie.
  """
  before = peak[at]
  after = jnp.maximum(before, algebra.peak(scores, visible, axis=axis))
  peak[at] = after
  origin = jnp.maximum(after, FLOOR)  # finite where nothing was seen
  return origin, algebra.exp(before - origin)


def weigh(algebra: Algebra, scores, visible, peak, mass, at) -> tuple[jax.Array, Any]:
  """Weights of a piece, and the factor by which what its rows have summed shrinks, or None.

  Args:
    algebra: what weighs.
    scores: (rows, columns).
    visible: what `Algebra.masked` told of them.
    peak, mass: statistics of rows, (.., 128); `at` of them belongs to these rows, and moves on.
    at: an index.
  """
  origin, factor = jnp.zeros((scores.shape[0], LANES), jnp.float32), None
  if algebra.height is not None:
    origin, factor = rise(algebra, scores, visible, peak, at, axis=1)
  weights = algebra.weigh(scores, visible, wide(origin, scores.shape[1]))
  added = lanes(jnp.abs(weights) if algebra.signed else weights)
  mass[at] = (mass[at] if factor is None else mass[at] * factor) + added
  return weights, factor


def asks(algebra: Algebra, of: Facts, blocks: Blocks) -> bool:
  """Whether scores or edits of a tile that no mask crosses read where the side that stands is."""

  def read(tile, side):
    here = of._replace(**{"k" if of.turned else "q": side})
    return algebra.score(tile, here), algebra.edited(tile, here)

  tile, side = piece_of(blocks, of.turned), of.k if of.turned else of.q
  traced = jax.make_jaxpr(read)(tile, side).jaxpr
  atoms = [atom for eqn in traced.eqns for atom in eqn.invars] + traced.outvars
  return any(field is atom for field in traced.invars[1:] for atom in atoms)


def by_kind(flags, body: Callable[[bool], None], whole: bool, some: bool) -> None:
  """Runs the body with masks on PARTIAL tiles and without on FULL ones; nothing on EMPTY ones.

  `whole` and `some` tell which of the two can occur, so that no code is made for the other.
  """
  kind = flags & 3
  if whole:
    pl.when(kind == FULL)(lambda: body(False))
  if some:
    pl.when(kind == PARTIAL)(lambda: body(True))


def run(
  kernel, plan, grid, in_specs, out_specs, kinds, scratch, inputs, interpret, name, aliases=None,
  apart=2,
):  # fmt: skip
  """The call of a kernel that follows a list of visits; `kinds` are (shape, dtype) of outputs.

  The steps of the first `apart` axes of the grid share no sums.
  """
  vary = jax.typeof(inputs[-1]).manual_axis_type  # inside of `jax.shard_map`: as the last input
  semantics = ["parallel"] * apart + ["arbitrary"] * (len(grid) - apart)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4, grid=grid, in_specs=in_specs, out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=[jax.ShapeDtypeStruct(*kind, manual_axis_type=vary) for kind in kinds],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=tuple(semantics)
    ),
    input_output_aliases=aliases or {},
    interpret=interpret,
    name=name,
  )(*(jnp.asarray(x) for x in plan[:4]), *inputs)  # fmt: skip
