"""A call of `decode` on a GPU: its sizes and what they may be, and how its arrays lie."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels.algebra import Side
from pallas_kernels.decoding import Call
from pallas_kernels.visits import EMPTY, FULL, Operand

FIELDS = len(Side._fields)
PIECE = 64  # keys that one instruction multiplies, and least width of a head
MOST_ROWS = 32  # queries that a block serves: more would spill registers
PAIR_ROWS = 16  # with fewer than 128 registers, so that two blocks share a processor
TILE_NUMBERS = 2**14  # of keys and values that travel together
MOST_KEYS = 256  # of a tile: TMA moves no longer box
PROCESSORS = 132  # of an H100
SHARED = 226 * 1024  # bytes of shared memory of a processor that one block may have
HALF = 112 * 1024  # that each of two may have
STORED = ("int8", "float8_e4m3fn")  # dtypes that are widened before they are multiplied


class Operands(NamedTuple):
  """What the kernel is handed, arrays and then references in global memory.

  Attributes:
    lengths: (B,) int32.
    counts: (B, 2) int32, tiles that are FULL, and those that are not EMPTY.
    order: (B, tiles) int32, in which tiles are visited, or None.
    pages: (B, S / P) int32, or None.
    k_head: (B, K) float32, what the products of a head are multiplied by, or None.
    q_rows: (#B, 4, rows) int32, of `standing`.
    k_side: (#B, 3, S) int32, or None.
    beside: the operands of the caller, of `beside`.
    k_token, v_token: (B, K, S) float32 or None.
    q: (B, K, rows, H).
    k, v: as for `decode`.
  """

  lengths: Any
  counts: Any
  order: Any
  pages: Any
  k_head: Any
  q_rows: Any
  k_side: Any
  beside: Any
  k_token: Any
  v_token: Any
  q: Any
  k: Any
  v: Any


class Cut(NamedTuple):
  """How a call is cut.

  Attributes:
    rows: queries of a block, a multiple of 8.
    lines: blocks of queries, each of which reads the keys of its head.
    stages: tiles in shared memory, those in flight included.
  """

  rows: int
  lines: int
  stages: int


def call_of(q, k, v, pages, splits: int | None, block_k: int | None) -> Call:
  """Sizes of the arguments of `decode`, checked."""
  for name, x in dict(q=q, k=k, v=v).items():
    if x.ndim != 4:
      raise ValueError(f"{name} must have four axes, and has the shape {x.shape}")
  (B, N, T, H), K, V = q.shape, k.shape[2], v.shape[3]
  page = 0 if pages is None else k.shape[1]
  S = pages.shape[-1] * page if page else k.shape[1]
  _check_arrays(q, k, v, B, S, page)
  lines = pl.cdiv(N // K * T, MOST_ROWS)
  rows = 8 * pl.cdiv(N // K * T, 8 * lines)
  block = block_of(k, v, S, page) if block_k is None else block_k
  _check_block(block, page)
  if splits is None:
    at_once = PROCESSORS * (1 + (rows <= PAIR_ROWS))
    splits = max(1, min(at_once // (B * K * lines), pl.cdiv(S, block)))
  if splits < 1:
    raise ValueError(f"splits={splits} must be at least 1")
  return Call(B, N, K, T, S, H, V, lines * rows, block, 1, splits, page)


def block_of(k: jax.Array, v: jax.Array, slots: int, page: int = 0) -> int:
  """Slots of a tile if nobody says: 64 of width 128, in whole pages or in one."""
  block = TILE_NUMBERS // (k.shape[3] + v.shape[3]) // PIECE * PIECE
  block = max(PIECE, min(MOST_KEYS, block))
  block = min(block, pl.cdiv(slots, PIECE) * PIECE)
  fits = lambda size: not page or size % page == 0 or page % size == 0
  while block > PIECE and not fits(block):
    block -= PIECE
  return block


def _check_arrays(q, k, v, B: int, S: int, page: int) -> None:
  H, K, V = q.shape[3], k.shape[2], v.shape[3]
  lead = (k.shape[0], page) if page else (B, S)
  for name, x, last in (("k", k, H), ("v", v, V)):
    if x.shape != (*lead, K, last):
      raise ValueError(f"{name} has the shape {x.shape}; expected {(*lead, K, last)}")
    if x.shape[1] % 8:
      raise NotImplementedError(
        f"{'pages' if page else 'rows'} of {x.shape[1]} slots cut what TMA moves at once; make "
        "room for a multiple of 8"
      )
    if x.shape[3] % PIECE or x.shape[3] > MOST_KEYS:
      raise NotImplementedError(
        f"{name} has heads of width {x.shape[3]}; expected 64, 128, 192 or 256: pad the cache, or "
        "decode without a kernel"
      )
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f"q is {q.dtype}; expected bfloat16 or float16: cast it")
  if k.dtype != v.dtype or k.dtype.name not in (q.dtype.name, *STORED):
    raise NotImplementedError(
      f"k is {k.dtype} and v {v.dtype}; {q.dtype} queries read {q.dtype}, int8 or float8_e4m3fn, "
      "both alike"
    )
  if q.shape[1] % K:
    raise ValueError(f"{q.shape[1]} heads of queries cannot share {K} heads of keys evenly")


def _check_block(block: int, page: int) -> None:
  if block < PIECE or block % PIECE or block > MOST_KEYS:
    raise ValueError(f"block_k={block} must be a multiple of {PIECE}, at most {MOST_KEYS}")
  if page and block % page and page % block:
    raise NotImplementedError(
      f"pages of {page} slots and tiles of {block} do not divide each other; take pages of a power "
      f"of two, or block_k={math.lcm(page, PIECE)}"
    )


def cut_of(call: Call, q: jax.Array, k: jax.Array, beside: int) -> Cut:
  """Room for stages: those of two blocks share a processor where three of each fit.

  Args:
    call: the sizes.
    q, k: as for `decode`.
    beside: numbers of 4 bytes that travel with each key.
  """
  lines = pl.cdiv(call.rows, MOST_ROWS)
  rows = call.rows // lines
  up = lambda size: pl.cdiv(size, 1024) * 1024  # where the next array may begin
  stage = call.block * ((call.H + call.V) * k.dtype.itemsize + 4 * beside)
  fixed = up(rows * call.H * 2) + up(rows * call.block * 2)
  fixed += 7 * 1024  # facts of queries, scratch of reductions, barriers, and up to three gaps
  if k.dtype.name in STORED:
    fixed += call.block * (call.H + call.V) * 2
  stages = (HALF - fixed) // stage
  if stages < 3 or rows > PAIR_ROWS:
    stages = (SHARED - fixed) // stage
  if stages < 2:
    raise NotImplementedError(
      f"two tiles of {call.block} slots of {stage} bytes do not fit {SHARED} bytes of shared "
      f"memory; take a smaller block_k, of at least {PIECE}"
    )
  return Cut(rows, lines, min(stages, 8))


def dealt(kinds: Any, in_order: bool) -> tuple[Any, Any]:
  """The tiles of each row in the order of their visits, and how many are FULL and not EMPTY.

  Args:
    kinds: (B, tiles) int32, NumPy or traced.
    in_order: promises that tiles are PARTIAL up to some, and EMPTY from there on.

  Returns:
    (B, tiles) int32, FULL ones first, or None if they come in order; (B, 2) int32.
  """
  xp: Any = np if isinstance(kinds, np.ndarray) else jnp
  order = None if in_order else xp.argsort(-kinds, axis=1, stable=True).astype(np.int32)
  counts = xp.stack([(kinds == FULL).sum(1), (kinds > EMPTY).sum(1)], axis=1)
  return order, counts.astype(np.int32)


def standing(call: Call, q_side: jax.Array) -> jax.Array:
  """(#B, 3, T) to (#B, 4, rows): the fields of `Side` of each row, and its head in the group."""
  size = call.group * call.T
  side = jnp.tile(q_side, (1, 1, call.group))
  head = jnp.broadcast_to(jnp.arange(size) // call.T, (q_side.shape[0], 1, size))
  side = jnp.concatenate([side, head], axis=1).astype(jnp.int32)
  return jnp.pad(side, ((0, 0), (0, 0), (0, call.rows - size)))


def beside(call: Call, x: jax.Array, kind: Operand, packed: jax.Array) -> jax.Array:
  """An operand as the kernel reads it: (#B,), (#B, #K, rows) or (#B, #K, slots, rows).

  Args:
    call: the sizes.
    x: (#B, #N, #T, X), the operand.
    kind: how it lies.
    packed: (#B, #K, rows, X), its heads that share keys below each other.
  """
  if x.shape[1:] == (1, 1, 1):
    return x[:, 0, 0, 0]
  if x.shape[3] == 1:
    return packed[..., 0]
  if not kind.pairs:
    raise NotImplementedError(
      f"an operand has rows of {x.shape[3]} numbers; no table is looked up in on a GPU: hand over "
      "what was looked up, as an operand of pairs, or decode without a kernel"
    )
  missing = call.tiles * call.block - x.shape[3]
  return jnp.pad(packed.swapaxes(2, 3), ((0, 0), (0, 0), (0, missing), (0, 0)))


def aligned(x: jax.Array | None, length: int, interpret: Any) -> jax.Array | None:
  """An array whose last axis runs along slots, 4 bytes each, as TMA can read it.

  Lines begin at multiples of 16 bytes. The interpreter reads no further than an array goes.
  """
  if x is None:
    return None
  missing = length - x.shape[-1] if interpret else -x.shape[-1] % 4
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
