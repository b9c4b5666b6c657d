"""Decoding, apart from a chip: what a call is, what is asked of its arguments, how parts merge."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels.algebra import FLOOR, Algebra, Side
from pallas_kernels.visits import EMPTY, PARTIAL

GROUP = len(Side._fields)  # the column beside those of `Side` that tells a row's head in its group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partials:
  """Unfinished attention over a part of the keys each, float32; `combined` adds them up.

  Attributes:
    out: (splits, B, N, T, V), sums of weight * value.
    mass: (splits, B, N, T), sums of |weight|.
    peak: (splits, B, N, T), what weights are measured from: -inf where nothing was seen, 0 where
      the algebra has no peak.
    count: (splits, B, N, T), visible keys.
  """

  out: jax.Array
  mass: jax.Array
  peak: jax.Array
  count: jax.Array


def combined(parts: Partials, algebra: Algebra) -> Partials:
  """The partial over the keys of all splits: the same without its first axis."""
  peak = parts.peak.max(0)
  factor = algebra.exp(parts.peak - jnp.maximum(peak, FLOOR))
  out = (parts.out * factor[..., None]).sum(0)
  return Partials(out, (parts.mass * factor).sum(0), peak, parts.count.sum(0))


def finished(parts: Partials, algebra: Algebra) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Over the keys of all splits: out, mass and count, each without the first axis.

  Where the algebra has peaks, out / mass, the logarithm of the mass in their unit, and the count.
  """
  seen = combined(parts, algebra)
  if algebra.height is None:
    return seen.out, seen.mass, seen.count
  out = seen.out / jnp.where(seen.mass > 0, seen.mass, 1.0)[..., None]
  return out, seen.peak + jnp.log(seen.mass) * (1 / algebra.base), seen.count


class Call(NamedTuple):
  """The sizes of a call.

  Attributes:
    B, N, K, T, S, H, V: rows of the batch, heads, key heads, queries, slots, widths.
    rows: the G T queries that share a key head, padded.
    block, heads: keys and key heads of a step.
    splits: parts of the keys that are summed apart.
    page: slots of a page; 0 where the cache is not paged.
  """

  B: int
  N: int
  K: int
  T: int
  S: int
  H: int
  V: int
  rows: int
  block: int
  heads: int
  splits: int
  page: int

  @property
  def group(self) -> int:
    return self.N // self.K

  @property
  def tiles(self) -> int:
    return pl.cdiv(self.S, self.block)


def expect(name: str, x: Any, *sizes: Any) -> None:
  """Raises ValueError unless the array has these sizes; a pair allows either."""
  options = [size if isinstance(size, tuple) else (size,) for size in sizes]
  if x.ndim != len(sizes) or any(n not in option for n, option in zip(x.shape, options)):
    raise ValueError(f"{name} has the shape {x.shape}; expected {sizes}, of a pair either")


def check_beside(call: Call, q_side, k_side, operands, layout, kinds, pages, lengths) -> None:
  """Raises ValueError where the shapes of all other arguments do not fit."""
  some = (1, call.B)
  expect("q_side", q_side, some, GROUP, call.T)
  expect("k_side", k_side, some, GROUP, call.S)
  if kinds is not None:
    expect("kinds", kinds, some, call.tiles)
  if lengths is not None:
    expect("lengths", lengths, call.B)
  if pages is not None:
    expect("pages", pages, call.B, call.S // call.page)
    if lengths is None:
      raise ValueError("pages need lengths: the table of a row does not tell where it ends")
  if len(operands) != len(layout):
    raise ValueError(f"{len(operands)} operands need a layout each; there are {len(layout)}")
  for x, kind in zip(operands, layout):
    last = (1, call.S) if kind.pairs else x.shape[-1]
    expect("an operand", x, some, (1, call.N), (1, call.T), last)


def planned(call: Call, kinds: Any, lengths: Any) -> Any:
  """The kinds of tiles (B, tiles) with lengths (B,) in them: nothing is FULL that ends early."""
  first = np.arange(call.tiles) * call.block
  kinds = np.full((1, call.tiles), PARTIAL) if kinds is None else kinds
  xp: Any = np if isinstance(kinds, np.ndarray) and isinstance(lengths, np.ndarray) else jnp
  whole = first + call.block <= lengths[:, None]
  kinds = xp.where(whole, kinds, xp.minimum(kinds, PARTIAL))
  return xp.where(first < lengths[:, None], kinds, EMPTY).astype(np.int32)


def scales(call: Call, scale: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
  """Scales of heads (B, K), and of tokens (B, K, S), of which at least one is None."""
  if scale is None:
    return None, None
  if scale.shape == (call.B, call.K, call.S):
    return None, scale.astype(jnp.float32)
  if scale.shape not in ((call.K,), (call.B, call.K)):
    shapes = f"{(call.K,)}, {(call.B, call.K)} or {(call.B, call.K, call.S)}"
    raise ValueError(f"a scale has the shape {scale.shape}; expected {shapes}")
  return jnp.broadcast_to(scale, (call.B, call.K)).astype(jnp.float32), None


def packed(call: Call, x: jax.Array) -> jax.Array:
  """(#B, #N, #T, X) to (#B, #K, #rows, X): heads that share keys lie below each other."""
  heads = call.group if x.shape[1] == 1 else call.N
  x = jnp.broadcast_to(x, (x.shape[0], heads, call.T, x.shape[3]))
  x = x.reshape(x.shape[0], heads // call.group, call.group * call.T, x.shape[3])
  return jnp.pad(x, ((0, 0), (0, 0), (0, call.rows - x.shape[2]), (0, 0)))
