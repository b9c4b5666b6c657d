"""What a spec holds in arrays, as kernels are handed it: operands, and the spec around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import plan as plans
from attnx.attention.masks import Mask, pick
from attnx.attention.partial import Partial, from_lse
from attnx.attention.spec import AttentionSpec
from attnx.attention.transforms import Dropout
from attnx.core import random
from attnx.core.lookup import Table, Tile
from attnx.core.tokens import Tokens
from pallas_kernels.algebra import Algebra


class Operand(NamedTuple):
  """An array (#B, #N, #T, X), and whether X runs along the keys; otherwise a row is whole."""

  array: jax.Array
  pairs: bool


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where an array was: its operands by number, and what a part makes of their tiles.

  No `wrap`: it was a `Table`.
  """

  numbers: tuple[int, ...]
  wrap: Callable[..., Any] | None


@dataclasses.dataclass(frozen=True)
class Unavailable:
  """An array that no door leads to: a part that reads it in a kernel fails to trace."""

  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Handed:
  """A spec whose arrays are operands.

  Attributes:
    operands: what to hand to the kernel.
    build: tiles of the operands to the spec and the tables of its transforms.
  """

  operands: tuple[Operand, ...]
  build: Callable[[Sequence[jax.Array], Callable], tuple[AttentionSpec, tuple]]


def hand_over(spec: AttentionSpec, q: jax.Array, q_tokens: Tokens, k_tokens: Tokens) -> Handed:
  """The spec for queries (B, T, N, H) and these tokens, with what it reads of arrays as operands.

  Arrays of places become tiles of pairs, tables of transforms and masks rows, keys of dropout and
  whatever is one number scalars. Everything else is `Unavailable`: parameters that only `finish`
  reads, or those that a table was made of.
  """
  operands: list[Operand] = []

  def add(array: jax.Array, wrap: Callable | None, pairs: bool = False) -> Slot:
    operands.append(Operand(array, pairs))
    return Slot((len(operands) - 1,), wrap)

  def by_place(array: jax.Array) -> Slot:
    array = jnp.asarray(array)
    if not (_in_order(q_tokens) and _in_order(k_tokens)):
      array = pick(array, q_tokens.rows(*q.shape[:3:2]), k_tokens.columns())
      array = array.reshape(*[1] * (4 - array.ndim), *array.shape)  # one number has no axes left
    truth = array.dtype == bool
    wrap = lambda tile: Tile(tile.astype(jnp.int32) > 0 if truth else tile)
    return add(array.astype(jnp.int8) if truth else array, wrap, pairs=True)

  def leaf(x: Any) -> Any:
    if np.size(x) != 1:
      return Unavailable(np.shape(x))
    return add(jnp.reshape(x, (1, 1, 1, 1)), lambda tile: tile)

  def part(x: Any) -> Any:
    if isinstance(x, Table):
      return add(x.rows, None)
    if isinstance(x, Dropout):
      words = [jnp.reshape(w, (1, 1, 1, 1)).astype(jnp.int32) for w in random.words(x.key)]
      numbers = [number for w in words for number in add(w, None).numbers]
      unsigned = lambda *tiles: tuple(tile.astype(jnp.uint32) for tile in tiles)
      key: Any = Slot(tuple(numbers), unsigned)
      return dataclasses.replace(x, key=key)
    if hasattr(x, "by_place"):
      if x.by_place is None:  # numbers of a larger call around arrays of that call
        return jax.tree.map(lambda y: part(y) if isinstance(y, Dropout) else leaf(y), x,
                            is_leaf=lambda y: isinstance(y, Dropout))  # fmt: skip
      _, structure = jax.tree.flatten(x)  # type: tuple[list, Any]
      return structure.unflatten([by_place(x.by_place[1])])
    return leaf(x)

  doors = lambda x: isinstance(x, Table | Dropout) or hasattr(x, "by_place")
  laid = lambda x: isinstance(x, Mask) and type(x).beside is not Mask.beside
  beside = jax.tree.map(lambda m: m.beside(q_tokens) if laid(m) else m, spec.mask, is_leaf=laid)
  bare = jax.tree.map(part, dataclasses.replace(spec, mask=beside), is_leaf=doors)
  tables = [None if t is None else part(t) for t in spec.tables(_wide(q))]

  def build(tiles: Sequence[jax.Array], table: Callable) -> tuple[AttentionSpec, tuple]:
    def fill(slot):
      if not isinstance(slot, Slot):
        return slot
      given = [tiles[n] for n in slot.numbers]
      if slot.wrap is None:
        return table(given[0], operands[slot.numbers[0]].array.shape[-1])
      return slot.wrap(*given)

    whole = lambda x: x is None or isinstance(x, Slot | Unavailable)
    return (jax.tree.map(fill, bare, is_leaf=whole),
            tuple(jax.tree.map(fill, t, is_leaf=whole) for t in tables))  # fmt: skip

  return Handed(tuple(operands), build)


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _in_order(tokens: Tokens) -> bool:
  """Whether tokens lie at places 0, 1, 2, .., as far as is known before anything runs."""
  index = tokens.index
  return isinstance(index, np.ndarray) and np.array_equal(index[0], np.arange(index.shape[1]))


def padded(operand: Operand, T: int, S: int) -> jax.Array:
  """The array for T queries and S keys; rows to whole registers of 128 lanes."""
  x = operand.array
  rows = 0 if x.shape[2] == 1 else T - x.shape[2]
  lanes = (S if operand.pairs else -(-x.shape[3] // 128) * 128) - x.shape[3]
  lanes = 0 if x.shape[3] == 1 else lanes
  return jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, lanes)))


def sides(tokens: Tokens, length: int) -> jax.Array:
  """(#B, 3, length) int32: index, position and segment, padded with tokens that do not exist."""
  tokens = plans.pad(tokens, length)
  fields = (tokens.index, tokens.position, tokens.segment)
  batch = max(x.shape[0] for x in fields)
  return jnp.stack(
    [jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, length)) for x in fields], axis=1
  )


def of_kernel(algebra: Algebra, out: jax.Array, size: jax.Array, count: jax.Array) -> Partial:
  """The partial of out (B, T, N, V) and its mass, or out / mass and the logarithm of the mass."""
  if algebra.height is None:
    return Partial(out, mass=size, peak=jnp.zeros_like(size), count=count)
  return from_lse(out, size * algebra.base, count)


def all_exist(tokens: Tokens) -> bool:
  """Whether every token is known to exist before anything runs."""
  return isinstance(tokens.position, np.ndarray) and bool((tokens.position >= 0).all())


def _summed(grad: jax.Array, like: jax.Array) -> jax.Array:
  """A gradient summed over the axes along which an operand is one."""
  axes = [axis for axis, n in enumerate(like.shape) if n == 1 and grad.shape[axis] != 1]
  return grad.sum(axes, keepdims=True).astype(like.dtype)


def outlined(
  spec: AttentionSpec, q: jax.Array, q_tokens: Tokens, k_tokens: Tokens
) -> tuple[Handed, list[jax.ShapeDtypeStruct]]:
  """What `hand_over` gives, and the shapes of its operands; q may be a shape only."""
  found: list[Handed] = []

  def hand(q):
    found.append(hand_over(spec, q, q_tokens, k_tokens))
    return [operand.array for operand in found[0].operands]

  shapes = jax.eval_shape(hand, jax.ShapeDtypeStruct(q.shape, q.dtype))
  return found[0], shapes


def cotangents(
  operands: Sequence[jax.Array], pairs: Sequence[bool], by_row: Iterable[jax.Array],
  of_pairs: Callable[..., jax.Array],
) -> list[jax.Array | None]:  # fmt: skip
  """Those of operands, None for what is not floating.

  Args:
    operands: as kernels were handed them.
    pairs: whether each is of pairs.
    by_row: the cotangents of the floating ones that are not, in order; they are summed here.
    of_pairs: the number of one of pairs to its cotangent, which may lack what tokens are padded to.
  """
  rest = iter(by_row)
  moved: list[jax.Array | None] = []
  for number, (x, paired) in enumerate(zip(operands, pairs, strict=True)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      moved.append(None)
    elif paired:
      found = of_pairs(number=number)
      more = [(0, n - size) for size, n in zip(found.shape, x.shape, strict=True)]
      moved.append(jnp.pad(found, more).astype(x.dtype))
    else:
      moved.append(_summed(next(rest), x))
  return moved
