"""A spec as the algebra of tiles that kernels are handed, and why some specs have none."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np

from attnx.attention.handed import Handed, outlined
from attnx.attention.normalisers import Softmax
from attnx.attention.spec import AttentionSpec
from attnx.attention.transforms import Transform
from attnx.core.lookup import Table
from attnx.core.tokens import Tokens
from pallas_kernels.algebra import Algebra, Facts, Side, softmax
from pallas_kernels.tpu import lookup

FEW = 16  # queries that are decoding and not training


@dataclasses.dataclass(frozen=True)
class _Table(Table):
  """A `Table` in a kernel, its rows filled up to whole registers."""

  length: int

  @property
  def size(self) -> int:
    return self.length

  def at(self, index: jax.Array) -> jax.Array:
    lines = max(self.rows.shape[0], index.shape[0])
    return lookup.lookup(self.rows, jnp.broadcast_to(index, (lines, index.shape[1])))


def algebra(
  spec: AttentionSpec, handed: Handed, H: int, dtype: Any, exist: bool = False, **how: bool
) -> Algebra:
  """What the kernels are handed: the spec, read at tiles. Base 2 is for inputs below float32.

  Where all tokens `exist`, what is visible is what the mask says. `how` is for `softmax`.
  """
  one = all(operand.array.shape[2:] == (1, 1) for operand in handed.operands)
  normaliser, factor = spec.normaliser, spec.factor(H)
  soft = type(normaliser).weigh is Softmax.weigh and type(normaliser).height is Softmax.height

  def read(facts: Facts):
    here, tables = handed.build(facts.operands, _Table)
    one_pair = lambda x: x if jnp.ndim(x) else jnp.full((1, 1), x, jnp.int32)
    pair = dict(batch=one_pair(facts.batch), head=one_pair(facts.head), origin=facts.origin)
    q = Tokens(*facts.q, **pair)
    return here, tables, q, Tokens(*facts.k)

  def score(scaled, facts: Facts):
    here, tables, q, k = read(facts)
    return here.score(scaled, q, k, tables)

  def visible(facts: Facts):
    here, _, q, k = read(facts)
    return here.mask(q, k) if exist else here.visible(q, k)

  def edit(weights, facts: Facts):
    here, _, q, k = read(facts)
    return here.edit(weights, q, k)

  edits = edit if spec.edits else None
  if soft and jnp.dtype(dtype).itemsize < 4:
    between = score if spec.transforms else None
    return softmax(
      factor, score=between, visible=visible, edit=edits, turns=one, counts=normaliser.counts, **how
    )
  height: Any = normaliser.height
  has_peak = height(jnp.zeros((1, 1))) is not None
  return Algebra(
    lambda products, facts: score(products * factor, facts), visible, normaliser.weigh, edits,
    height=height if has_peak else None, signed=not soft, turns=one, counts=normaliser.counts,
  )  # fmt: skip


def widened(spec: AttentionSpec, q: jax.Array, k: jax.Array, *tokens: Tokens) -> tuple:
  """`Transform.widened` of the first transform; of shapes of q and k, if there are no tokens."""
  first, found = next(iter(spec.transforms), Transform()), []
  if tokens:
    return first.widened(spec, q, k, *tokens)

  def wide(q, k):
    *both, rest = first.widened(spec, q, k, *(Tokens.of_length(x.shape[1]) for x in (q, k)))
    found.append(rest)
    return both

  return (*jax.eval_shape(wide, q, k), *found)


def unalike(q: jax.Array, k: jax.Array, v: jax.Array, wanted: tuple[str, str]) -> str | None:
  """Why arrays are not of one of two dtypes, all alike; None if they are."""
  dtypes = {jnp.dtype(x.dtype).name for x in (q, k, v)}
  if len(dtypes) == 1 and dtypes <= set(wanted):
    return None
  return f"wants q, k and v alike, {' or '.join(wanted)}, got {', '.join(sorted(dtypes))}"


def besides(spec: AttentionSpec) -> str | None:
  """Why a kernel that reads values alone is not enough; None if it is."""
  names = ", ".join(type(readout).__name__ for readout in spec.readouts)
  return f"reads values alone, and {names} besides" if names else None


def unlisted(q: jax.Array, k: jax.Array, size: tuple[int, int], most: int) -> str | None:
  """Why a plan has more tiles of a size than a kernel can be told of; None if it has not."""
  tiles = q.shape[0] * -(-q.shape[1] // size[0]) * -(-k.shape[1] // size[1])
  if tiles <= most:
    return None
  told = f"lists up to {most} tiles of {size[0]} x {size[1]}"
  return f"{told}, got {tiles}: split tokens or rows over devices"


def untraceable(spec: AttentionSpec, q: jax.Array, k: jax.Array) -> str | None:
  """Why a spec cannot be read in tiles; None if it can. It is traced, and nothing is computed."""
  try:
    jaxpr = jax.make_jaxpr(functools.partial(_tile, spec, q, k))()
  except (TypeError, ValueError, NotImplementedError, IndexError) as error:
    return f"cannot read the spec in tiles: {str(error).splitlines()[0]}"
  if jaxpr.consts and any(np.size(x) > 1 for x in jaxpr.consts):
    return "cannot read arrays that a function of the spec closes over: make them fields of a part"
  if found := sorted(_primitives(jaxpr.jaxpr) & FORBIDDEN):
    return f"cannot {', '.join(found)} inside of a tile; use `Table.at` or an array of places"
  return None


FORBIDDEN = {
  "gather", "scatter", "scatter-add", "sort", "cumsum", "cumprod", "cumlogsumexp", "top_k",
  "dynamic_slice", "dynamic_update_slice", "argmax", "argmin", "dot_general", "fft", "while",
}  # fmt: skip


def _tile(spec: AttentionSpec, q, k):
  """What a kernel traces, of one tile of 128 x 128, with operands of any value."""
  size = 128
  tokens = (Tokens.of_length(x.shape[1]) for x in (q, k))
  handed, shapes = outlined(spec, q, *tokens)
  side = lambda *shape: Side(*[jnp.zeros(shape, jnp.int32)] * 3)
  tiles = []
  for x, operand in zip(shapes, handed.operands, strict=True):
    lanes = size if operand.pairs else -(-x.shape[3] // 128) * 128
    cut = (1 if x.shape[2] == 1 else size, 1 if x.shape[3] == 1 else lanes)
    tiles.append(jnp.zeros(cut, x.dtype))
  facts = Facts(side(size, 1), side(1, size), 0, 0, tuple(tiles))
  how = algebra(spec, handed, q.shape[3], q.dtype)
  scores, _, told = how.masked(jnp.zeros((size, size), jnp.float32), facts, True)
  weights = how.weigh(scores, told, jnp.zeros_like(scores))
  if not weights.shape == scores.shape == (size, size):
    raise ValueError(f"a tile of {(size, size)} became {scores.shape}, then {weights.shape}")
  return how.edited(weights, facts)


def _primitives(jaxpr) -> set[str]:
  """Names of what a program does, but for what is a function of the kernels' own."""
  names: set[str] = set()
  for eqn in jaxpr.eqns:
    names.add(eqn.primitive.name)
    if eqn.primitive.name != "custom_vjp_call":
      for inner in jaxprs_in_params(eqn.params):
        names |= _primitives(inner)
  return names
