"""A call of `decode`: its sizes and what they may be, its plan, and how its arrays lie."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.algebra import LANES
from pallas_kernels.decoding import GROUP, Call, expect
from pallas_kernels.tpu.walk import SUBLANES
from pallas_kernels.visits import EMPTY

TILE_BYTES = 2**21  # of keys and values in a step: its time must hide the overhead of a step
MOST_KEYS = 2048  # of a tile
SCALARS = 2**20 - 2**16  # bytes of scalar memory for lists and tables; every chip has 1 MiB


def call_of(q, k, v, pages, splits, block_k, block_heads, by_token: bool) -> Call:
  """Of the arguments of `decode`; `by_token` tells whether there are scales of tokens."""
  for name, x in dict(q=q, k=k, v=v).items():
    if x.ndim != 4:
      raise ValueError(f"{name} must have four axes, and has the shape {x.shape}")
  (B, N, T, H), K, V = q.shape, k.shape[1], v.shape[3]
  page = 0 if pages is None else k.shape[2]
  S = pages.shape[-1] * page if page else k.shape[2]
  heads = heads_of(K) if block_heads is None else block_heads
  if heads < 1 or K % heads:
    raise ValueError(f"block_heads={heads} does not divide the {K} heads of keys")
  if by_token and heads % SUBLANES and block_heads is None:
    heads = K  # a block of their scales is whole registers, or the whole array
  block = block_of(k, v, S, page or 1, heads) if block_k is None else block_k
  rows = pl.cdiv(N // K * T, SUBLANES) * SUBLANES
  return Call(B, N, K, T, S, H, V, rows, block, heads, splits, page)


def heads_of(K: int) -> int:
  """Key heads of a step if nobody says."""
  return max(n for n in range(1, 9) if K % n == 0)


def block_of(k: jax.Array, v: jax.Array, slots: int, page: int = 1, heads: int = 8) -> int:
  """Slots of a tile if nobody says: about 2 MiB of keys and values, in whole pages."""
  unit = math.lcm(page, LANES)
  lanes = lambda x: pl.cdiv(x.shape[3], LANES) * LANES  # in memory, rows are whole registers
  of_one = lanes(k) * k.dtype.itemsize + lanes(v) * v.dtype.itemsize
  size = min(TILE_BYTES // (heads * of_one), MOST_KEYS, slots + unit - 1) // unit * unit
  return max(size, unit)


def check(call: Call, q, k, v, by_token: bool) -> None:
  """Raises ValueError or NotImplementedError where queries, keys, values or sizes do not fit."""
  if call.page:
    expect("k", k, k.shape[0], call.K, call.page, call.H)
  else:
    expect("k", k, call.B, call.K, call.S, call.H)
  expect("v", v, *k.shape[:3], call.V)
  _check_dtypes(call, q, k, v)
  _check_sizes(call, by_token)


def _check_dtypes(call: Call, q, k, v) -> None:
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"q is {q.dtype}; expected float32 or bfloat16")
  for name, x in dict(k=k, v=v).items():
    if x.dtype not in (q.dtype, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
      raise ValueError(f"{name} is {x.dtype}; {q.dtype} queries read {q.dtype}, bfloat16, int8 or "
                       "float8_e4m3fn")  # fmt: skip
    least = SUBLANES * 4 // x.dtype.itemsize
    if call.page % least:
      raise NotImplementedError(
        f"pages of {call.page} slots cut registers of {x.dtype}; take a multiple of {least}"
      )


def _check_sizes(call: Call, by_token: bool) -> None:
  if call.N % call.K:
    raise ValueError(f"{call.N} heads of queries cannot share {call.K} heads of keys evenly")
  if call.splits < 1:
    raise ValueError(f"splits={call.splits} must be at least 1")
  if by_token and call.heads % SUBLANES and call.heads != call.K:
    raise ValueError(
      f"block_heads={call.heads} must be {call.K} or a multiple of {SUBLANES} with scales of tokens"
    )
  unit = math.lcm(LANES, call.page or 1)
  if call.block < 1 or call.block % unit:
    raise ValueError(f"block_k={call.block} must be a multiple of {unit}, of lanes and of pages")
  table = 4 * call.B * call.S // call.page if call.page else 0
  listed = 16 * call.B * call.splits * pl.cdiv(call.tiles, call.splits)
  if table + listed > SCALARS:
    raise ValueError(
      f"a table of pages of {table} bytes and lists of tiles of {listed} exceed the {SCALARS} that "
      "fit scalar memory: call with fewer rows at once, or take larger pages or block_k"
    )


class Visits(NamedTuple):
  """The tiles that each split visits, row after row, int32 (splits * n,) each.

  A row without tiles has one EMPTY visit, so that its sums are written; EMPTY visits fetch nothing.

  Attributes:
    row: whose sums are made.
    source, tile: row and tile that lie in fast memory during the visit.
    kind: EMPTY, PARTIAL or FULL.
  """

  row: jax.Array
  source: jax.Array
  tile: jax.Array
  kind: jax.Array


def visits(kinds: jax.Array, splits: int, *, prefix: bool = False) -> tuple[Visits, jax.Array]:
  """Deals the tiles of each row that are not EMPTY out to `splits` parts as even as can be.

  It depends on lengths and plans only: layers that share those share one list, which XLA computes
  once. It is a few operations on integers, since a short cache is read in microseconds.

  Args:
    kinds: (B, tiles) int32.
    splits: number of parts.
    prefix: promises that no tile comes after an EMPTY one, so that nothing need be sorted.

  Returns:
    The lists, and how many steps the longest of them takes: known at run time only.
  """
  B, tiles = kinds.shape
  wanted = kinds > EMPTY
  count = wanted.sum(1)
  order = None if prefix else jnp.argsort(~wanted, axis=1, stable=True)

  def part(s: int):
    low, high = count * s // splits, count * (s + 1) // splits
    size = jnp.maximum(high - low, 1)
    after = size.cumsum()
    step = jnp.arange(B * pl.cdiv(tiles, splits))
    row = jnp.minimum((step[:, None] >= after).sum(1), B - 1)
    low, high, begin = jnp.stack([low, high, after - size])[:, row]
    at = low + step - begin
    tile = jnp.minimum(at, tiles - 1)
    tile = tile if order is None else order[row, tile]
    kind = jnp.where(at < high, kinds[row, tile], EMPTY)
    fetched = lax.cummax(jnp.where(kind > EMPTY, step, 0))
    return Visits(row, row[fetched], tile[fetched], kind), size.sum()

  parts, steps = zip(*map(part, range(splits)))
  lists = (jnp.concatenate(x).astype(jnp.int32) for x in zip(*parts))
  return Visits(*lists), functools.reduce(jnp.maximum, steps)


def standing(call: Call, q_side: jax.Array) -> jax.Array:
  """(#B, 3, T) to (#B, rows, 4): the fields of `Side` of each row, and its head in the group."""
  head = jnp.broadcast_to(jnp.arange(call.group)[:, None, None], (call.group, call.T, 1))
  side = jnp.broadcast_to(
    q_side.swapaxes(1, 2)[:, None], (q_side.shape[0], call.group, call.T, GROUP)
  )
  head = jnp.broadcast_to(head, (*side.shape[:3], 1)).astype(jnp.int32)
  flat = jnp.concatenate([side, head], axis=3).reshape(side.shape[0], -1, GROUP + 1)
  return jnp.pad(flat, ((0, 0), (0, call.rows - flat.shape[1]), (0, 0)))
