"""A scan over chunks of 64 tokens on Hopper GPUs, and its reverse.

A chunk takes the state S (H, V) before it and its own tokens to the state after it and outputs:

  Y = U + P S (or X as it is, where there is no such correction),
  S' = diag(total) S + K^T Y,   O = Q S + A Y,

where Q, K, P (C, H) are queries and keys with their decay, and A (C, C) the scores inside of it.
Only the states depend on other chunks. `_walk` carries them: a program holds some columns of the
state of a head in registers, in float32, takes what a chunk adds to it from a ring of tiles that
TMA fills ahead, and leaves in bfloat16 the state that enters each chunk. All else are sums of
products of tiles, `products`, of all chunks at once. The reverse is the same walk from the last
chunk to the first, with Q in place of K and the gradient of O in place of Y.

Why two kernels: at H = V = 128 a chunk of a head is 6 MFLOP, 6 ns of an H100, and moves 152 KiB,
46 ns: 64 in the walk, 88 for outputs. One kernel that made outputs as it walks would move 72, or
104 where states are kept for the reverse. But its products would wait for each other, 3 or 4 in a
row a chunk, about 1 us, on one multiprocessor for each head and block of columns: slower for less
than some 20 heads in all rows of the batch, and long sequences in few rows are what recurrences
are for. What the walk is left with is one product of (64, 64, 64) a chunk, on (H / 64) (V / 64)
multiprocessors a head. This was reckoned and not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.gpu.tiles import ROW, TILE, Warpgroup, smem
from pallas_kernels.products import AXES, PULL, dot
from pallas_kernels.varying import varying

C = 64  # tokens of a chunk: the rows of an instruction that multiplies
COLUMNS = 64  # of a state that a program of the walk holds
SHARED = 200 << 10  # bytes of shared memory that the ring of a walk may fill
WALKED = "attnx_walked"  # names what a gradient would have to walk for again
DTYPE = jnp.bfloat16  # of all that is multiplied; a state may be too large for float16


class Pair(NamedTuple):
  """Two factors, tiles or arrays of tiles, of a b ("nn"), a b^T ("nt") or a^T b ("tn").

  Arrays are tokens (B, T, K, X), K dividing the number of heads N, whose tiles are (C, X), or
  matrices (B, chunks, N, R, X), whose tiles are (R, X).
  """

  a: Any
  b: Any
  kind: str


class Plan(NamedTuple):
  """What is static of a call.

  Attributes:
    heads: N.
    interpret: parameters of the interpreter, to run on the CPU; False compiles.
  """

  heads: int
  interpret: Any = False


def multiply(pairs: Sequence[Pair], plan: Plan, acc: jax.Array | None = None) -> jax.Array:
  """The sum of the products of tiles, and of `acc`, in float32.

  Args:
    pairs: of tiles in swizzled shared memory; an `a` that is not transposed may be in registers.
    plan: what is static.
    acc: what to add to, in registers.
  """
  if plan.interpret:
    start = jnp.zeros(_result(pairs[0]), jnp.float32) if acc is None else acc
    return sum((dot(a[...], b[...], AXES[kind]) for a, b, kind in pairs), start)

  def run(sums):
    turned = lambda x, how: plgpu.transpose_ref(x, (1, 0)) if how == "t" else x
    for a, b, kind in pairs:
      plgpu.wgmma(sums, turned(a, kind[0]), turned(b, kind[1]))

  def anew(sums):
    run(sums)
    return sums[...]

  if acc is None:
    return pl.run_scoped(anew, plgpu.ACC(_result(pairs[0]), jnp.float32))
  return pl.run_state(run)(plgpu.ACC.init(acc))


def _result(pair: Pair) -> tuple[int, int]:
  """The shape of a product of tiles."""
  i, j = (1 - axis for axis in AXES[pair.kind])
  return pair.a.shape[i], pair.b.shape[j]


def shape_of(x: Any) -> tuple[int, int]:
  """The shape of the tiles of tokens or matrices."""
  return (C, x.shape[3]) if x.ndim == 4 else x.shape[3:]


def tile_at(
  ref: Any, plan: Plan, b: Any, n: Any, c: Any, columns: Any = slice(None), rows: Any = slice(None)
) -> Any:
  """A piece of the tile of a row, a head and a chunk, of tokens or matrices in global memory.

  Args:
    ref: of an array whose rows and heads may be shared.
    plan: what is static.
    b, n, c: the row, the head and the chunk.
    columns, rows: of the tile; tokens give all rows.
  """
  group = plan.heads // ref.shape[2]
  n = n if group == 1 else lax.div(n, jnp.int32(group))
  b = 0 if ref.shape[0] == 1 else b
  return ref.at[b, pl.ds(c * C, C), n, columns] if len(ref.shape) == 4 else (
    ref.at[b, c, n, rows, columns]
  )  # fmt: skip


def chunks_of(x: Any) -> int:
  """How many chunks tokens or matrices have."""
  return x.shape[1] // C if x.ndim == 4 else x.shape[1]


def launch(
  kernel: Callable[..., None],
  arrays: Sequence[jax.Array],
  shapes: Sequence[jax.ShapeDtypeStruct],
  plan: Plan,
  *,
  name: str,
  grid: Mapping[str, int],
  scratch: Mapping[str, Any],
) -> list[jax.Array]:
  """Results of a kernel, varying over the mesh axes of `jax.shard_map` that any array varies on.

  Args:
    kernel: of references to the arrays and the results, and of what `scratch` names.
    arrays: its arguments.
    shapes: of its results.
    plan: what is static.
    name: of the kernel, after "attnx_".
    grid: how many programs along each axis, the last of which neighbours share.
    scratch: shared memory and barriers.
  """
  out = plgpu.kernel(
    kernel,
    out_type=list(shapes),
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name=f"attnx_{name}",
    interpret=plan.interpret,
  )(*arrays)
  return varying(out, arrays)


def products(
  pairs: Sequence[Pair], plan: Plan, *, matrix: bool = False, dtype: Any = DTYPE
) -> jax.Array:
  """The sum of the products of all pairs, for every row, head and chunk.

  Args:
    pairs: of bfloat16 arrays, as `Pair` says; not of tokens with tokens "tn".
    plan: what is static.
    matrix: whether the result are matrices, (C, X) each, or tokens (B, T, N, X).
    dtype: of the result.
  """
  first = pairs[0]
  B, N, chunks = first.a.shape[0], plan.heads, chunks_of(first.a)
  tile = lambda x: jax.ShapeDtypeStruct(shape_of(x), DTYPE)
  tiles = [Pair(tile(a), tile(b), kind) for a, b, kind in pairs]
  rows, width = _result(tiles[0])
  block = min(width, 2 * COLUMNS)
  cut = lambda tile, kind: (block, tile.shape[1]) if kind[1] == "t" else (tile.shape[0], block)
  shapes = [shape for a, b, kind in tiles for shape in (a.shape, cut(b, kind))]

  def kernel(*refs, held, done, barrier):
    b, n, c, j = (lax.axis_index(name) for name in "bncj")
    *refs, out = refs
    columns, at = pl.ds(j * block, block), (plan, b, n, c)
    for i, (_, _, kind) in enumerate(pairs):
      part = dict(rows=columns) if kind[1] == "t" else dict(columns=columns)
      plgpu.copy_gmem_to_smem(tile_at(refs[2 * i], *at), held[2 * i], barrier)
      plgpu.copy_gmem_to_smem(tile_at(refs[2 * i + 1], *at, **part), held[2 * i + 1], barrier)
    plgpu.barrier_wait(barrier)
    factors = zip(held[::2], held[1::2], pairs, strict=True)
    done[...] = multiply([Pair(x, y, p.kind) for x, y, p in factors], plan).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(done, tile_at(out, *at, columns))
    plgpu.wait_smem_to_gmem(0)

  shape = (B, chunks, N, rows, width) if matrix else (B, chunks * C, N, width)
  (out,) = launch(
    kernel, [x.astype(DTYPE) for p in pairs for x in p[:2]], [jax.ShapeDtypeStruct(shape, dtype)],
    plan, name="chunk_products", grid=dict(b=B, n=N, c=chunks, j=width // block),
    scratch=dict(
      held=[smem(*shape, dtype=DTYPE) for shape in shapes],
      done=smem(rows, block, dtype=dtype),
      barrier=plgpu.Barrier(num_arrivals=len(shapes)),
    ),
  )  # fmt: skip
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def product(
  a: jax.Array, b: jax.Array, kind: str, plan: Plan, matrix: bool = False, dtype: Any = DTYPE
) -> jax.Array:
  """`products` of one pair, with gradients."""
  return products([Pair(a, b, kind)], plan, matrix=matrix, dtype=dtype)


def _product_fwd(a, b, kind, plan, matrix, dtype):
  return product(a, b, kind, plan, matrix, dtype), (a, b)


def _product_bwd(kind, plan, matrix, dtype, residuals, g):
  given = dict(zip("ab", residuals)) | {"g": g.astype(DTYPE)}
  return tuple(
    gradient([Pair(given[pair[0]], given[pair[1]], how)], plan, x)
    for x, (pair, how) in zip(residuals, PULL[kind], strict=True)
  )


product.defvjp(_product_fwd, _product_bwd)


def gradient(pairs: Sequence[Pair], plan: Plan, x: jax.Array) -> jax.Array:
  """`products` that are the gradient of x, summed over the heads that share it."""
  return shared(products(pairs, plan, matrix=x.ndim == 5), x)


def shared(grad: jax.Array, x: jax.Array) -> jax.Array:
  """A gradient for every row and head, summed over those that share an array like x."""
  if grad.shape == x.shape:
    return grad.astype(x.dtype)
  grad = grad.astype(jnp.float32)
  if x.shape[0] < grad.shape[0]:
    grad = grad.sum(0, keepdims=True)
  heads = grad.reshape(*grad.shape[:2], x.shape[2], -1, *grad.shape[3:])
  return heads.sum(3).astype(x.dtype)


class Correction(NamedTuple):
  """Y = U + P S: u (B, T, N, V) and p (B, T, N, H)."""

  u: jax.Array
  p: jax.Array


class Tokens(NamedTuple):
  """What is known of all tokens and chunks but for their values.

  Attributes:
    into: (B, T, K, H), queries as they read the state that enters their chunk.
    onto: (B, T, K, H), keys as they reach the end of it.
    inside: (B, chunks, N, C, C), scores of the queries and keys of a chunk.
    total: (#B, chunks, N, H) float32, what a chunk leaves of a state; None leaves all.
  """

  into: jax.Array
  onto: jax.Array
  inside: jax.Array
  total: jax.Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scan(
  tokens: Tokens, values: jax.Array | Correction, state: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """O_c = Q_c S_{c-1} + A_c Y_c with S_c = diag(total_c) S_{c-1} + K_c^T Y_c, chunk by chunk.

  Args:
    tokens: bfloat16 but for `total`, of T tokens, a multiple of 64.
    values: Y (B, T, K, V), or what makes it of the state; bfloat16.
    state: (B, N, H, V) float32, before the first chunk.
    plan: what is static.

  Returns:
    O (B, T, N, V) bfloat16, and the state after the last chunk.
  """
  out, last, _ = _forward(tokens, values, state, plan)
  return out, last


def _forward(tokens: Tokens, values, state, plan: Plan):
  into, onto, inside, total = tokens
  if isinstance(values, Correction):
    kept, last, y = _walk(state, total, plan, correction=values, key=onto)
  else:
    (kept, last), y = _walk(state, total, plan, added=Pair(onto, values, "tn")), values
  out = products([Pair(into, kept, "nn"), Pair(inside, y, "nn")], plan)
  return out, last, (kept, y)


def _scan_fwd(tokens, values, state, plan):
  out, last, (kept, y) = _forward(tokens, values, state, plan)
  kept = checkpoint_name(kept, WALKED)
  y = checkpoint_name(y, WALKED) if isinstance(values, Correction) else y
  return (out, last), (tokens, values, kept, y)


def _scan_bwd(plan, residuals, cotangents):
  # The states that the reverse walk leaves are gradients of the states after each chunk.
  tokens, values, kept, y = residuals
  (into, onto, inside, total), (d_out, d_last) = tokens, cotangents
  walk = functools.partial(_walk, d_last, total, plan, added=Pair(into, d_out, "tn"), reverse=True)
  if isinstance(values, Correction):
    d_y = products([Pair(inside, d_out, "tn")], plan)
    d_after, d_first, d_y = walk(correction=Correction(d_y, onto), key=values.p)
    d_values = Correction(d_y, gradient([Pair(d_y, kept, "nt")], plan, values.p))
  else:
    d_after, d_first = walk()
    d_values = gradient([Pair(inside, d_out, "tn"), Pair(onto, d_after, "nn")], plan, values)
  d_tokens = Tokens(
    into=gradient([Pair(d_out, kept, "nt")], plan, into),
    onto=gradient([Pair(y, d_after, "nt")], plan, onto),
    inside=gradient([Pair(d_out, y, "nt")], plan, inside),
    total=None if total is None else shared(_sum_of_products(d_after, kept), total),
  )
  return d_tokens, d_values, d_first


scan.defvjp(_scan_fwd, _scan_bwd)


def _sum_of_products(a: jax.Array, b: jax.Array) -> jax.Array:
  """sum_v a_hv b_hv of matrices (.., H, V): (.., H) float32."""
  return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def _walk(
  state: jax.Array,
  total: jax.Array | None,
  plan: Plan,
  *,
  added: Pair | None = None,
  correction: Correction | None = None,
  key: jax.Array | None = None,
  reverse: bool = False,
) -> list[jax.Array]:
  """S' = diag(total) S + A^T X + K^T Y, Y = U + P S, from chunk to chunk.

  Args:
    state: (B, N, H, V) float32, which enters the first chunk.
    total: as that of `Tokens`.
    plan: what is static.
    added: A (B, T, K, H) and X (B, T, K, V), "tn", where there are such.
    correction, key: U, P and K, where there are such.
    reverse: from the last chunk to the first.

  Returns:
    The states that enter the chunks, (B, chunks, N, H, V) bfloat16; the last state, float32; and
    Y (B, T, N, V) bfloat16 where there is a correction.
  """
  B, N, H, V = state.shape
  block = H if correction is not None else min(H, COLUMNS)  # Y wants the whole of a column
  wide: dict[str, Any] = {} if added is None else {"a": added.a}
  narrow: dict[str, Any] = {} if added is None else {"x": added.b}
  if correction is not None:
    wide |= {"p": correction.p, "key": key}
    narrow |= {"u": correction.u}
  tokens = {name: x.astype(DTYPE) for name, x in {**wide, **narrow}.items()}
  chunks = chunks_of(next(iter(tokens.values())))
  size = 2 * C * (block * len(wide) + COLUMNS * len(narrow))  # bytes of a stage
  own = 4 * COLUMNS * (block + C)  # of the tiles on their way out
  stages = max(1, min(4, chunks, (SHARED - own) // size))
  leaving, copies = (1 if correction is None else 2), len(tokens) + (total is not None)
  wg = Warpgroup(plan.interpret)

  widths = {name: block if name in wide else COLUMNS for name in tokens}
  scratch: dict[str, Any] = dict(
    ring={name: smem(stages, C, width, dtype=DTYPE) for name, width in widths.items()},
    kept=smem(2, block, COLUMNS, dtype=DTYPE),
    barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
  )
  shape = jax.ShapeDtypeStruct
  shapes = [shape((B, chunks, N, H, V), DTYPE), shape(state.shape, jnp.float32)]
  if total is not None:
    scratch |= dict(decays=plgpu.SMEM((stages, block), jnp.float32))
  if correction is not None:
    scratch |= dict(corrected=smem(2, C, COLUMNS, dtype=DTYPE))
    shapes.append(shape((B, chunks * C, N, V), DTYPE))

  def kernel(state_ref, *refs, ring, kept, barriers, decays=None, corrected=None):
    b, n, i, j = (lax.axis_index(name) for name in "bnij")
    rows, columns = pl.ds(i * block, block), pl.ds(j * COLUMNS, COLUMNS)
    kept_ref, last_ref, *y_ref = refs[-len(shapes) :]
    at = lambda step: chunks - 1 - step if reverse else step

    def fetch(step):
      slot = lax.rem(step, jnp.int32(stages))
      for name, ref in zip(tokens, refs):
        source = tile_at(ref, plan, b, n, at(step), columns if name in narrow else rows)
        plgpu.copy_gmem_to_smem(source, ring[name].at[slot], barriers.at[slot])
      if total is not None:
        source = refs[len(tokens)].at[0 if total.shape[0] == 1 else b, at(step), n, rows]
        plgpu.copy_gmem_to_smem(source, decays.at[slot], barriers.at[slot])

    def walk(step, held):
      slot, side = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(2))
      tile = {name: ref.at[slot] for name, ref in ring.items()}
      plgpu.barrier_wait(barriers.at[slot])
      plgpu.wait_smem_to_gmem(leaving, wait_read_only=True)
      kept.at[side][...] = held.astype(DTYPE)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(kept.at[side], kept_ref.at[b, at(step), n, rows, columns])
      if total is not None:
        held *= wg.wide(wg.load(decays.at[slot], ROW), held.shape)
      pairs = [] if added is None else [Pair(tile["a"], tile["x"], "tn")]
      if correction is not None:
        y = multiply([Pair(tile["p"], kept.at[side], "nn")], plan)
        corrected.at[side][...] = (y + tile["u"][...].astype(jnp.float32)).astype(DTYPE)
        plgpu.commit_smem()
        place = tile_at(y_ref[0], plan, b, n, at(step), columns)
        plgpu.copy_smem_to_gmem(corrected.at[side], place)
        pairs.append(Pair(tile["key"], corrected.at[side], "tn"))
      held = multiply(pairs, plan, held)
      plgpu.commit_smem()  # all threads have read the tiles
      pl.when(step + stages < chunks)(lambda: fetch(step + stages))
      return held

    for step in range(stages):
      fetch(jnp.int32(step))
    # Sums of products vary over no mesh axes, as the first state does: the loop is of sums.
    held = walk(jnp.int32(0), wg.load(state_ref.at[b, n, rows, columns], TILE))
    last_ref.at[b, n, rows, columns][...] = lax.fori_loop(1, chunks, walk, held)
    plgpu.wait_smem_to_gmem(0)

  return launch(
    kernel, [state, *tokens.values(), *([] if total is None else [total])], shapes, plan,
    name=f"chunk_{'reverse' if reverse else 'forward'}",
    grid=dict(b=B, n=N, i=H // block, j=V // COLUMNS), scratch=scratch,
  )  # fmt: skip
