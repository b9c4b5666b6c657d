"""How kernels on Hopper GPUs walk over tiles: blocks, lists of tiles, facts, products.

A tile lives in the registers of one warpgroup, spread as WGMMA leaves its sums. A number of each
row or column is 1-d and spread as what is left of a tile when the other axis is summed away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import heapq
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import Literal
from jax.extend.core.primitives import add_jaxvals_p
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels.algebra import Facts, Side
from pallas_kernels.blocks import table
from pallas_kernels.products import dot
from pallas_kernels.scaled import evaluated
from pallas_kernels.visits import EMPTY, FULL, PARTIAL, Operand

ROWS = 64  # of an instruction that multiplies
WIDTH = 256  # columns of one, at most
CACHE = 32 * 2**20  # bytes of keys and values to be read by blocks that run at once
PROCESSORS = 132  # of an H100 or H200, each of which runs one block
SHARED = 225 * 1024  # bytes of shared memory that tiles may take
CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}  # and where their programs are


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a kernel cuts its work.

  Attributes:
    q: queries of a warpgroup, 64 or 128.
    k: keys of a tile, a multiple of 64 up to 256.
    warpgroups: that multiply, 1 to 3; one more moves tiles.
    stages: tiles that are held in shared memory at once, those in flight included.
    beside: whether gradients find weights while the product with values is in flight, for which
      some widths leave too few registers.
  """

  q: int = 64
  k: int = 128
  warpgroups: int = 2
  stages: int = 2
  beside: bool = True

  def __post_init__(self):
    if self.q not in (ROWS, 2 * ROWS):
      raise ValueError(f"{self} must have q of {ROWS} or {2 * ROWS}")
    if not 0 < self.k <= WIDTH or self.k % ROWS:
      raise ValueError(f"{self} must have k that is a multiple of {ROWS}, at most {WIDTH}")
    if not 0 < self.warpgroups < 4 or self.stages < 2:
      raise ValueError(f"{self} must have 1 to 3 warpgroups and at least 2 stages")

  @property
  def line(self) -> int:
    """Queries of a block: those of all its warpgroups."""
    return self.q * self.warpgroups


class Chosen(NamedTuple):
  """The blocks of the kernels of a call; `keys` are those of its tiles that lie (K, Q)."""

  forward: Blocks
  queries: Blocks
  keys: Blocks


def choose(H: int, V: int, dtype: Any, chip: str = "h100") -> Chosen:
  """How the kernels cut keys of width H and values of width V: by the table of a chip.

  The entry of the smallest widths that are not below these, since its tiles fit.

  Raises:
    ValueError: the chip has no table, or the table no such entry.
  """
  name = jnp.dtype(dtype).name
  fitting = [e for e in table(chip) if e["H"] >= H and e["V"] >= V and e["dtype"] == name]
  if not fitting:
    raise ValueError(f"H={H}, V={V} and {name} are beyond the table of blocks of {chip}")
  best = min(fitting, key=lambda entry: entry["H"] + entry["V"])
  fields = [field.name for field in dataclasses.fields(Blocks)]
  return Chosen(*(Blocks(**{f: best[name][f] for f in fields}) for name in Chosen._fields))


class Order(NamedTuple):
  """In what order the lines of all heads are worked on: `together` heads, then their lines.

  The last lines, which see most where masks are causal, come first, and heads whose keys fit in
  the cache of the chip at once run side by side.
  """

  heads: int
  lines: int
  together: int

  @property
  def blocks(self) -> int:
    """Of a grid each of which works on one line after the other."""
    return min(self.heads * self.lines, PROCESSORS)

  @classmethod
  def of(cls, heads: int, lines: int, size: int) -> Order:
    """For so many heads, each of which reads `size` bytes of keys and values."""
    most = max(1, CACHE // max(1, size))
    together = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
    return cls(heads, lines, together)

  def at(self, number: Any) -> tuple[Any, Any]:
    """The head, over the batch too, and the line of a number in this order."""
    known = isinstance(number, np.ndarray)
    div, rem = (np.floor_divide, np.remainder) if known else (lax.div, lax.rem)
    together, chunk = np.int32(self.together), np.int32(self.together * self.lines)
    within = rem(number, chunk)
    head = div(number, chunk) * together + rem(within, together)
    return head, self.lines - 1 - div(within, together)

  def shares(self, visits: Any) -> tuple[Any, Any]:
    """The numbers that each block works on, (blocks, most), and how many they are, (blocks,).

    Where visits are known, a line goes to the block that is done first with its others. Else two
    lines for each block at a time are sorted by what they visit, and dealt out there and back.

    Args:
      visits: (#B, lines) of each line; NumPy or traced.
    """
    count, hand = self.heads * self.lines, 2 * self.blocks
    head, line = self.at(np.arange(count, dtype=np.int32))
    costs = visits[head * visits.shape[0] // self.heads, line]
    if isinstance(costs, np.ndarray):
      loads = [(0, block) for block in range(self.blocks)]
      found: list[list[int]] = [[] for _ in loads]
      for number, cost in enumerate(costs.tolist()):
        load, block = loads[0]
        heapq.heapreplace(loads, (load + cost + 1, block))  # 1: to begin and to end
        found[block].append(number)
      own = np.array([len(mine) for mine in found], np.int32)
      return np.array([mine + [0] * (own.max() - len(mine)) for mine in found], np.int32), own
    hands = jnp.pad(costs, (0, -count % hand), constant_values=-1).reshape(-1, hand)  # -1: none
    dealt = jnp.argsort(-hands, axis=1, stable=True) + hand * np.arange(len(hands))[:, None]
    dealt = dealt.reshape(-1, 2, self.blocks)
    dealt = jnp.stack([dealt[:, 0], dealt[:, 1, ::-1]], 1).reshape(-1, self.blocks).T
    return dealt.astype(np.int32), (dealt < count).sum(1).astype(np.int32)


class Lists(NamedTuple):
  """The tiles that each line visits: those that are FULL first, then those that are PARTIAL.

  Attributes:
    at: (#B, lines, length) int32, the tiles of a line in order; those after them are EMPTY.
    counts: (#B, lines, 2) int32, how many are FULL and how many PARTIAL.
  """

  at: Any
  counts: Any


def lists(kinds: Any, *, by_key: bool = False) -> Lists:
  """What `kinds` (#B, nq, nk), NumPy or traced, leaves to visit, line by line.

  Args:
    kinds: EMPTY, PARTIAL or FULL, int32.
    by_key: lines are blocks of keys and not of queries.
  """
  xp: Any = np if isinstance(kinds, np.ndarray) else jnp
  kinds = xp.swapaxes(kinds, 1, 2) if by_key else kinds
  order = xp.argsort(-kinds, axis=-1, stable=True)
  full = (kinds == FULL).sum(-1)
  some = (kinds > EMPTY).sum(-1) - full
  return Lists(order.astype(np.int32), xp.stack([full, some], -1).astype(np.int32))


def somewhere(kinds: Any, axis: int = -1) -> Any:
  """The same, but that a line without visible pairs visits its first tile, where all is masked.

  Args:
    kinds: (#B, nq, nk).
    axis: -1 where lines are of queries, -2 where they are of keys.
  """
  xp: Any = np if isinstance(kinds, np.ndarray) else jnp
  first = xp.expand_dims(xp.arange(kinds.shape[axis]) == 0, -1 - axis)
  return xp.where((kinds == EMPTY).all(axis, keepdims=True) & first, PARTIAL, kinds)


def swizzle_of(width: int, dtype: Any = jnp.bfloat16) -> int:
  """Bytes after which rows of so many elements are permuted in shared memory: 128, 64 or 32."""
  size = width * jnp.dtype(dtype).itemsize
  return next(n for n in (128, 64, 32) if size % n == 0)


def smem(*shape: int, dtype: Any) -> Any:
  """Shared memory (.., rows, width) in the order in which WGMMA reads and TMA writes it."""
  swizzle = swizzle_of(shape[-1], dtype)
  tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
  return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


TILE = plgpu.Layout.WGMMA  # (M, N)
SINGLY = plgpu.Layout._WGMMA_ACC_32BIT  # a tile, none of whose elements lie together
ALONG = ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)  # (M,), a number of each row, and (N,)
COMPILER = plgpu.CompilerParams(
  approx_math=True,
  lowering_semantics=plgpu.LoweringSemantics.Lane,  # layouts are those told; JAX's default varies
)


@dataclasses.dataclass(frozen=True)
class Warpgroup:
  """What a warpgroup does with tiles; the CPU, where `interpret` is set, has no layouts."""

  interpret: Any = False

  def cast(self, x: jax.Array, layout: Any) -> jax.Array:
    """The array spread over the threads as `layout` says."""
    return x if self.interpret else plgpu.layout_cast(x, layout)

  def full(self, shape: tuple[int, ...], value: float | jax.Array, layout: Any) -> jax.Array:
    """A float32 array of one number, which may be known at run time only."""
    return self.cast(jnp.full(shape, value, jnp.float32), layout)

  def load(self, ref: Any, layout: Any) -> jax.Array:
    """All of a piece of global memory or of shared memory that is not swizzled."""
    return ref[...] if self.interpret else plgpu.load(ref, (), layout=layout, optimized=False)

  def wide(self, x: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """A number of each row, or of each column if `axis` is 1, as a tile of (rows, columns)."""
    return self.cast(lax.broadcast_in_dim(x, shape, (axis,)), TILE)

  def product(
    self, a: Any, b: Any, *, meanwhile: Callable[[], Any] | None = None
  ) -> jax.Array:
    """a b^T in float32; a (M, H) and b (N, H) in swizzled shared memory."""
    return self.products([(a, b)], meanwhile=meanwhile)[0]

  def product_beside(
    self, a: Any, b: Any, work: Callable[[], Any], beside: bool = True
  ) -> tuple[jax.Array, Any]:
    """a b^T as in `product`, and what `work` returns, done while it is in flight or before it."""
    if self.interpret or not beside:
      done = work()
      return self.product(a, b), done

    def run(acc):
      plgpu.wgmma(acc, a, b.T)
      done = work()
      return acc[...], done

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

  def products(
    self, pairs: Sequence[tuple[Any, Any]], *, meanwhile: Callable[[], Any] | None = None
  ) -> list[jax.Array]:
    """a b^T of every pair (a, b), started one after the other; `meanwhile` runs once all are.

    Registers are set to zero for each product while those before it are in flight.
    """
    if self.interpret:
      if meanwhile is not None:
        meanwhile()
      return [dot(a[...], b[...], (1, 1)) for a, b in pairs]

    def start(pairs, sums):
      if not pairs:
        if meanwhile is not None:
          meanwhile()
        return [acc[...] for acc in sums]
      (a, b), *rest = pairs

      def run(acc):
        plgpu.wgmma(acc, a, b.T)
        return start(rest, [*sums, acc])

      return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    return start(pairs, [])

  def add(
    self, acc: jax.Array, a: jax.Array, b: Any, *, meanwhile: Callable[[], Any] | None = None
  ) -> jax.Array:
    """acc + a b in float32; a (M, K) in registers, b (K, N) in swizzled shared memory."""
    if self.interpret:
      if meanwhile is not None:
        meanwhile()
      return acc + dot(a, b[...], (1, 0))

    def run(sums):
      plgpu.wgmma(sums, a, b)
      if meanwhile is not None:
        meanwhile()

    return pl.run_state(run)(plgpu.ACC.init(acc))

  def sums(
    self, terms: Sequence[tuple[jax.Array, jax.Array, Any]], pair: tuple[Any, Any], *,
    meanwhile: Callable[[], Any],
  ) -> tuple[list[jax.Array], jax.Array]:  # fmt: skip
    """acc + a b of every (acc, a, b) as in `add`, and c d^T of the pair (c, d) as in `product`.

    All are started one after the other, without a pause between; `meanwhile` runs once all are.
    """
    if self.interpret:
      return [self.add(*term) for term in terms], self.product(*pair, meanwhile=meanwhile)
    (c, d), shape = pair, (pair[0].shape[0], pair[1].shape[0])

    def run(refs):
      *sums, found = refs
      for acc, (_, a, b) in zip(sums, terms, strict=True):
        plgpu.wgmma(acc, a, b)

      def multiply(acc):
        plgpu.wgmma(acc, c, d.T)
        meanwhile()
        found[...] = acc[...]

      pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    accs = [plgpu.ACC.init(acc) for acc, _, _ in terms]
    *sums, found = pl.run_state(run)((*accs, self.full(shape, 0.0, TILE)))
    return sums, found

  def side(self, ref: Any, layout: Any) -> Side:
    """The fields of tokens from (3, L) in global or shared memory, (L,) each in ROW or COLUMN."""
    return Side(*(self.load(ref.at[c], layout) for c in range(len(Side._fields))))

  def origin(self, ref: Any) -> jax.Array:
    """(1, 1), the position of the first of the tokens in (3, L)."""
    return jnp.full((1, 1), ref[Side._fields.index("position"), 0])

  def facts(
    self, q: Side, k: Side, b: Any, n: Any, operands: tuple[jax.Array, ...] = (),
    *, turned: bool = False, origin: Any = None,
  ) -> Facts:  # fmt: skip
    """Facts whose sides are whole tiles.

    Args:
      q, k: (Q,) and (K,) each; queries in ROW and keys in COLUMN, or the other way round if turned.
      b, n: row of the batch and head of the queries.
      operands: as `operands_at` gives them.
      turned: whether tiles are (K, Q).
      origin: of the queries, as `origin` gives it.
    """
    rows, columns = (k, q) if turned else (q, k)
    shape = rows.index.shape[0], columns.index.shape[0]
    spread = lambda side, axis: Side(*(self.wide(x, shape, axis) for x in side))
    rows, columns = spread(rows, 0), spread(columns, 1)
    q, k = (columns, rows) if turned else (rows, columns)
    return Facts(q, k, b, n, operands, turned, origin)

  def numbers(self, refs: Sequence[Any], b: Any, n: Any) -> tuple[jax.Array | None, ...]:
    """(1, 1) of each operand that is one number of a head, None for others; see `operands_at`."""
    one = lambda ref: jnp.full((1, 1), ref[*_head(ref, b, n), 0, 0])
    return tuple(one(ref) if ref.shape[2:] == (1, 1) else None for ref in refs)

  def operands_at(
    self, refs: Sequence[Any], layout: Sequence[Operand], b: Any, n: Any, rows: Any, columns: Any,
    numbers: Sequence[jax.Array | None] | None = None, *, turned: bool = False,
  ) -> tuple[jax.Array, ...]:  # fmt: skip
    """A tile of each operand (#B, #N, #T, #S) in global memory; of one number (1, 1).

    Args:
      refs, layout: the operands, one for one; all are of pairs, or one number of a head.
      b, n: row of the batch and head.
      rows, columns: `pl.ds` of the queries and the keys of the tile.
      numbers: what `numbers` gave, where it was called before, to be loaded once.
      turned: whether tiles are (K, Q).
    """
    numbers = self.numbers(refs, b, n) if numbers is None else numbers
    tile = lambda ref: self._operand(ref, _head(ref, b, n), rows, columns, turned)
    known = zip(refs, numbers, layout, strict=True)
    return tuple(tile(ref) if one is None else one for ref, one, _ in known)

  def _operand(self, ref, head, rows, columns, turned: bool) -> jax.Array:
    T, S = ref.shape[2:]
    queries, keys = (1, 0) if turned else (0, 1)  # axes of the tile
    shape = (columns.size, rows.size) if turned else (rows.size, columns.size)
    if T == 1:
      return self.wide(self.load(ref.at[*head, 0, columns], ALONG[keys]), shape, keys)
    if S == 1:
      return self.wide(self.load(ref.at[*head, rows, 0], ALONG[queries]), shape, queries)
    ref = ref.at[*head, rows, columns]
    if not turned:
      return self.load(ref, TILE)
    if self.interpret:
      return ref[...].T
    return self.cast(self.load(ref.T, SINGLY), TILE)


def _head(ref, b, n) -> tuple:
  return 0 if ref.shape[0] == 1 else b, 0 if ref.shape[1] == 1 else n


def inlined(f: Callable) -> Callable:
  """The function in what Mosaic GPU lowers: without calls, among them those of `jax.custom_jvp`,

  with powers of 2 and more only, and with cotangents added by `+`.
  """

  def evaluate(jaxpr, consts, args):
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else known[x]
    for eqn in jaxpr.eqns:
      values = [read(x) for x in eqn.invars]
      inner = eqn.params.get(CALLS.get(eqn.primitive.name))
      if inner is not None:
        outs = evaluate(inner.jaxpr, inner.consts, values)
      elif eqn.primitive is add_jaxvals_p:
        outs = [values[0] + values[1]]
      elif eqn.primitive is lax.integer_pow_p:
        outs = [_power(values[0], eqn.params["y"])]
      else:
        outs = evaluated(jaxpr, eqn, values)
      known.update(zip(eqn.outvars, outs, strict=True))
    return [read(x) for x in jaxpr.outvars]

  def run(*args):
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    outs = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), outs)

  return run


def _power(x: jax.Array, y: int) -> jax.Array:
  """x to the power y; Mosaic GPU lowers those of 2 and more."""
  if abs(y) < 2:
    return (jnp.ones_like(x), x, 1 / x)[y]
  return lax.integer_pow(x, y) if y > 0 else 1 / lax.integer_pow(x, -y)


def eights(length: int) -> int:
  """The multiple of 8 that so many tokens need: TMA moves as many rows of a swizzled tile."""
  return -(-length // 8) * 8


def whole(x: jax.Array, length: int, axis: int, interpret: Any) -> jax.Array:
  """The array with enough tokens along an axis for tiles that cover `length`, zeros at the end.

  TMA reads zeros past the end of a multiple of 8 by itself, so that mostly nothing is copied; the
  interpreter cannot, and wants them all.
  """
  missing = (length if interpret else eights(x.shape[axis])) - x.shape[axis]
  if not missing:
    return x
  return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])
