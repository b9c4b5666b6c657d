"""A scan over chunks of 64 tokens on Hopper GPUs, and its reverse.

A chunk takes the state S (H, V) before it and its own tokens to the state after it and outputs:

  Y = U + P S (or X as it is, where there is no such correction),
  O = r (Q S) + A Y,   S' = diag(total) S + K^T (w Y),

where r and w are numbers of tokens, what queries have decayed by since the chunk began and keys
until it ends, and A (C, C) the scores inside of it: given, or weights of Q K^T. A program of
`_walk` holds some columns of the state of a head in registers, in float32, goes from chunk to
chunk, takes tokens from a ring of tiles that TMA fills ahead, and makes outputs as it goes. For a
gradient it also leaves in bfloat16 the states that enter chunks. The reverse is the same walk from
the last chunk to the first, with keys for queries, A^T for A and the gradient of O for Y. What is
left are products of the tiles of a chunk, of all chunks at once, in `_gradients`.

Why one kernel walks and makes outputs: at H = V = 128 a chunk of a head moves 72 KiB then, and 64
more where states are written for another kernel to read. A walk waits for its products one after
the other, 5 a chunk, on V / 64 multiprocessors for each head of each row of the batch.
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

from pallas_kernels.gpu.tiles import COLUMN, COMPILER, ROW, TILE, Warpgroup, smem
from pallas_kernels.products import AXES, dot
from pallas_kernels.varying import varying

C = 64  # tokens of a chunk: the rows of an instruction that multiplies
COLUMNS = 64  # of a state that a program of the walk holds, and of all tiles of tokens
SHARED = 200 << 10  # bytes of shared memory that a walk may fill
WALKED = "attnx_walked"  # names what a gradient would have to walk for again
DTYPE = jnp.bfloat16  # of all that is multiplied; a state may be too large for float16
SHAPE = jax.ShapeDtypeStruct


class Pair(NamedTuple):
  """Two tiles, factors of a b ("nn"), a b^T ("nt") or a^T b ("tn")."""

  a: Any
  b: Any
  kind: str


class Plan(NamedTuple):
  """What is static of a call.

  Attributes:
    heads: N.
    interpret: parameters of the interpreter, to run on the CPU; False compiles.
    weighs: whether scores are given as weights of the products of queries and keys.
  """

  heads: int
  interpret: Any = False
  weighs: bool = False


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
    turned = lambda x, how: x.T if how == "t" else x
    for a, b, kind in pairs:
      plgpu.wgmma(sums, turned(a, kind[0]), turned(b, kind[1]))

  def anew(sums):
    run(sums)
    return sums[...]

  if acc is None:
    return pl.run_scoped(anew, plgpu.ACC(_result(pairs[0]), jnp.float32))
  return pl.run_state(run)(plgpu.ACC.init(acc))


def in_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x in float32 as a sum of two in bfloat16, good to 2^-16."""
  high = x.astype(DTYPE)
  return high, (x - high.astype(jnp.float32)).astype(DTYPE)


def _result(pair: Pair) -> tuple[int, int]:
  """The shape of a product of tiles."""
  i, j = (1 - axis for axis in AXES[pair.kind])
  return pair.a.shape[i], pair.b.shape[j]


def tile_at(
  ref: Any, plan: Plan, b: Any, n: Any, c: Any, columns: Any = slice(None), rows: Any = slice(None)
) -> Any:
  """What an array in global memory holds of a row, a head and a chunk.

  Args:
    ref: of tokens (#B, T, K, X), a tile (C, X) each, K dividing the number of heads; matrices
      (#B, #chunks, K, R, X); or where `rows` is None vectors (#B, #chunks, K, X).
    plan: what is static.
    b, n, c: the row, the head and the chunk.
    columns, rows: of the tile; tokens give all rows.
  """
  group = plan.heads // ref.shape[2]
  n = n if group == 1 else lax.div(n, jnp.int32(group))
  b = 0 if ref.shape[0] == 1 else b
  if rows is not None and len(ref.shape) == 4:
    return ref.at[b, pl.ds(c * C, C), n, columns]
  c = 0 if ref.shape[1] == 1 else c
  return ref.at[b, c, n, columns] if rows is None else ref.at[b, c, n, rows, columns]


class Span(NamedTuple):
  """Tokens of a chunk for each of its tokens, from the first to before the last.

  Attributes:
    first, last: (C,) int32.
  """

  first: jax.Array
  last: jax.Array


def tokens_of(wg: Warpgroup) -> jax.Array:
  """The tokens of a chunk, (C,), a number of each row of a tile."""
  return wg.cast(lax.iota(jnp.int32, C), ROW)


def mask(span: Span, wg: Warpgroup) -> jax.Array:
  """A tile (C, C) that is true where a column is in the span of its row."""
  first, last = (wg.wide(end, (C, C)) for end in span)
  column = wg.wide(wg.cast(lax.iota(jnp.int32, C), COLUMN), (C, C), 1)
  return (column >= first) & (column < last)


def halves(m: Any, wg: Warpgroup) -> jax.Array:
  """Which pairs (C, C) are a row of the late and a column of the early half of a block of 2 m."""
  t = tokens_of(wg)
  start = t & (-2 * m)
  return mask(Span(start, start + (t & m)), wg)


def diagonal(wg: Warpgroup) -> jax.Array:
  """Which pairs (C, C) are a token and itself."""
  t = tokens_of(wg)
  return mask(Span(t, t + 1), wg)


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
    compiler_params=COMPILER,
    kernel_name=f"attnx_{name}",
    interpret=plan.interpret,
  )(*arrays)
  return varying(out, arrays)


def shared(grad: jax.Array, x: jax.Array) -> jax.Array:
  """A gradient for every row, head and chunk, summed over those that share an array like x."""
  if grad.shape == x.shape:
    return grad.astype(x.dtype)
  grad = grad.astype(jnp.float32)
  for axis in range(2):
    if x.shape[axis] < grad.shape[axis]:
      grad = grad.sum(axis, keepdims=True)
  heads = grad.reshape(*grad.shape[:2], x.shape[2], -1, *grad.shape[3:])
  return heads.sum(3).astype(x.dtype)


class Correction(NamedTuple):
  """Y = U + P S: u (B, T, N, V) and p (B, T, N, H)."""

  u: jax.Array
  p: jax.Array


class Tokens(NamedTuple):
  """What is known of all tokens and chunks but for their values.

  Attributes:
    queries, keys: Q and K, (B, T, K, H) each.
    inside: A, or of `Plan.weighs` the weights of Q K^T that make it, (#B, #chunks, #N, C, C).
    total: (#B, chunks, N, H) float32, what a chunk leaves of a state; None leaves all.
    read, write: r and w, (#B, #chunks, #N, C) float32; None are ones.
  """

  queries: jax.Array
  keys: jax.Array
  inside: jax.Array
  total: jax.Array | None = None
  read: jax.Array | None = None
  write: jax.Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scan(
  tokens: Tokens, values: jax.Array | Correction, state: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """O_c = r Q_c S_{c-1} + A_c Y_c with S_c = diag(total_c) S_{c-1} + K_c^T w Y_c, chunk by chunk.

  Args:
    tokens: of T tokens, a multiple of 64; bfloat16 where not said otherwise.
    values: Y (B, T, K, V), or what makes it of the state; bfloat16.
    state: (B, N, H, V) float32, before the first chunk.
    plan: what is static.

  Returns:
    O (B, T, N, V) bfloat16, and the state after the last chunk.
  """
  out, last = _walk(tokens, values, state, plan, keep=False)
  return out, last


def _scan_fwd(tokens, values, state, plan):
  out, last, kept, *y = _walk(tokens, values, state, plan)
  kept = checkpoint_name(kept, WALKED)
  y = checkpoint_name(y[0], WALKED) if y else values
  return (out, last), (tokens, values, kept, y)


def _scan_bwd(plan, residuals, cotangents):
  tokens, values, kept, y = residuals
  d_out, d_last = cotangents
  key = values.p if isinstance(values, Correction) else None
  d_y, d_first, d_after = _walk(tokens, d_out, d_last, plan, reverse=True, key=key)
  d_tokens, d_p = _gradients(tokens, plan, kept, d_after, y, d_out, None if key is None else d_y)
  if key is None:
    return d_tokens, shared(d_y, values), d_first
  return d_tokens, Correction(d_y, shared(d_p, key)), d_first


scan.defvjp(_scan_fwd, _scan_bwd)


def _walk(
  tokens: Tokens,
  values: jax.Array | Correction,
  state: jax.Array,
  plan: Plan,
  *,
  keep: bool = True,
  reverse: bool = False,
  key: jax.Array | None = None,
) -> list[jax.Array]:
  """The walk of `scan`, or its reverse.

  Args:
    tokens, values, state, plan: as those of `scan`; in reverse, the gradients of O and of the last
      state.
    keep: whether to leave the states that enter chunks.
    reverse: from the last chunk to the first: O = w (K S) + A^T Y and
      S' = diag(total) S + Q^T (r Y) + P^T O.
    key: P, in reverse only, where there is such.

  Returns:
    O; the last state, float32; where they are to be kept, the states that enter the chunks,
    (B, chunks, N, H, V) bfloat16, and Y where there is a correction.
  """
  B, N, H, V = state.shape
  corrected = isinstance(values, Correction)
  wide = dict(q=tokens.queries, k=tokens.keys)
  key = values.p if isinstance(values, Correction) else key
  wide |= {} if key is None else dict(p=key)
  narrow = values.u if isinstance(values, Correction) else values
  tiles = wide | dict(x=narrow, inside=tokens.inside)
  tiles = {name: x.astype(DTYPE) for name, x in tiles.items()}
  vectors = {name: x for name, x in tokens._asdict().items() if x is not None and x.ndim == 4}
  vectors = {name: vectors[name] for name in ("total", "read", "write") if name in vectors}
  chunks, block = tiles["q"].shape[1] // C, COLUMNS
  size = 2 * C * (H * len(wide) + block + C)  # bytes of a stage
  stages = max(1, min(4, chunks, (SHARED - 2 * (block * (H + 3 * C) + C * C)) // size))
  wg = Warpgroup(plan.interpret)
  ask, give, read, write = ("k", "q", "write", "read") if reverse else ("q", "k", "read", "write")

  tile, widths = smem(C, block, dtype=DTYPE), dict.fromkeys(wide, H) | dict(x=block, inside=C)
  scratch: dict[str, Any] = dict(
    ring={name: smem(stages, C, width, dtype=DTYPE) for name, width in widths.items()},
    rows={name: plgpu.SMEM((stages, x.shape[3]), jnp.float32) for name, x in vectors.items()},
    kept=smem(H, block, dtype=DTYPE),
    out=tile,
    own={"y": tile} if corrected else {},
    scaled={"y": tile} if write in vectors else {},
    scores={"a": smem(C, C, dtype=DTYPE)} if reverse and plan.weighs else {},
    barriers=plgpu.Barrier(num_arrivals=len(tiles) + len(vectors), num_barriers=stages),
  )
  shapes = [SHAPE((B, chunks * C, N, V), DTYPE), SHAPE(state.shape, jnp.float32)]
  if keep:
    shapes.append(SHAPE((B, chunks, N, H, V), DTYPE))
    shapes += [shapes[0]] * corrected
  leaving = len(shapes) - 2  # copies of a chunk before that of its output

  def kernel(state_ref, *refs, ring, rows, kept, out, own, scaled, scores, barriers):
    b, n, j = (lax.axis_index(name) for name in "bnj")
    columns = pl.ds(j * block, block)
    out_ref, last_ref, *kept_refs = refs[-len(shapes) :]
    at = lambda step: (plan, b, n, chunks - 1 - step if reverse else step)

    def fetch(step):
      slot = lax.rem(step, jnp.int32(stages))
      for name, ref in zip(tiles, refs):
        source = tile_at(ref, *at(step), columns if name == "x" else slice(None))
        plgpu.copy_gmem_to_smem(source, ring[name].at[slot], barriers.at[slot])
      for name, ref in zip(vectors, refs[len(tiles) :]):
        source = tile_at(ref, *at(step), rows=None)
        plgpu.copy_gmem_to_smem(source, rows[name].at[slot], barriers.at[slot])

    def walk(step, held):
      slot = lax.rem(step, jnp.int32(stages))
      tile = {name: ref.at[slot] for name, ref in ring.items()}
      along = lambda x, name: (
        x * wg.wide(wg.load(rows[name].at[slot], ROW), x.shape) if name in rows else x
      )
      plgpu.barrier_wait(barriers.at[slot])
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      kept[...] = held.astype(DTYPE)
      plgpu.commit_smem()
      if keep:
        plgpu.copy_smem_to_gmem(kept, tile_at(kept_refs[0], *at(step), columns))

      y, inside = tile["x"], tile["inside"]
      if corrected:
        y = multiply([Pair(tile["p"], kept, "nn")], plan, y[...].astype(jnp.float32))
        own["y"][...] = y.astype(DTYPE)
        scaled_y, y = y, own["y"]
      elif scaled:
        scaled_y = y[...].astype(jnp.float32)
      if scaled:
        scaled["y"][...] = along(scaled_y, write).astype(DTYPE)
      if plan.weighs:
        found = multiply([Pair(tile["q"], tile["k"], "nt")], plan)
        found = (found * inside[...].astype(jnp.float32)).astype(DTYPE)
        if reverse:
          scores["a"][...] = found
        inside = scores["a"] if reverse else found
      plgpu.commit_smem()
      if keep and corrected:
        plgpu.copy_smem_to_gmem(y, tile_at(kept_refs[1], *at(step), columns))

      result = along(multiply([Pair(tile[ask], kept, "nn")], plan), read)
      result = multiply([Pair(inside, y, "tn" if reverse else "nn")], plan, result)
      plgpu.wait_smem_to_gmem(leaving, wait_read_only=True)
      out[...] = result.astype(DTYPE)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(out, tile_at(out_ref, *at(step), columns))
      pairs = [Pair(tile[give], scaled.get("y", y), "tn")]
      if reverse and "p" in tile:
        pairs.append(Pair(tile["p"], out, "tn"))
      held = multiply(pairs, plan, along(held, "total"))
      plgpu.commit_smem()  # all threads have read the tiles
      pl.when(step + stages < chunks)(lambda: fetch(step + stages))
      return held

    for step in range(stages):
      fetch(jnp.int32(step))
    # Sums of products vary over no mesh axes, as the first state does: the loop is of sums.
    held = walk(jnp.int32(0), wg.load(state_ref.at[b, n, :, columns], TILE))
    last_ref.at[b, n, :, columns][...] = lax.fori_loop(1, chunks, walk, held)
    plgpu.wait_smem_to_gmem(0)

  return launch(
    kernel, [state, *tiles.values(), *vectors.values()], shapes, plan,
    name=f"chunk_{'reverse' if reverse else 'forward'}", grid=dict(b=B, n=N, j=V // block),
    scratch=scratch,
  )  # fmt: skip


def _gradients(
  tokens: Tokens,
  plan: Plan,
  states: jax.Array,
  d_states: jax.Array,
  y: jax.Array,
  d_out: jax.Array,
  d_y: jax.Array | None,
) -> tuple[Tokens, jax.Array | None]:
  """Gradients of what `scan` is given, and of P where there is such.

  Args:
    tokens, plan: as those of `scan`.
    states, d_states: those that enter chunks, and the gradients of those that leave them.
    y, d_out: Y, and the gradient of O.
    d_y: that of Y, where there is a correction.
  """
  B, chunks, N, H, V = states.shape
  wg, blocks = Warpgroup(plan.interpret), H // COLUMNS
  wholes = [x.astype(DTYPE) for x in (d_out, y, d_y) if x is not None]
  vectors = [x for x in (tokens.read, tokens.write) if x is not None]
  assert len(vectors) != 1
  needed = plan.weighs or bool(vectors)
  cut = [tokens.queries, tokens.keys] if needed else []
  names = ["q", "k"] + ["p"] * (d_y is not None)
  weights = [tokens.inside] * plan.weighs
  arrays = [*wholes, states, d_states, *cut, *weights, *vectors]

  shapes = [SHAPE((B, chunks * C, N, H), DTYPE)] * len(names)
  shapes += [SHAPE((B, chunks, N, C, C), DTYPE)]
  lines = ["total"] * (tokens.total is not None) + ["read", "write"] * bool(vectors)
  shapes += [SHAPE((B, chunks, N, H if x == "total" else C), jnp.float32) for x in lines]
  tile, across = smem(C, COLUMNS, dtype=DTYPE), range(V // COLUMNS)
  scratch = dict(
    whole=smem(len(wholes), len(across), C, COLUMNS, dtype=DTYPE),
    state=smem(2, len(across), COLUMNS, COLUMNS, dtype=DTYPE),
    parts=[tile] * len(cut),
    given=tile,
    room=[tile] * (len(names) - 1 - len(across)),
    line={x: plgpu.SMEM((H if x == "total" else C,), jnp.float32) for x in lines},
    first=plgpu.Barrier(num_arrivals=len(wholes) * len(across) + len(weights)),
    barrier=plgpu.Barrier(num_arrivals=2 * len(across) + len(cut)),
  )

  def kernel(*refs, whole, state, parts, given, room, line, first, barrier):
    b, n, c = (lax.axis_index(name) for name in "bnc")
    at = (plan, b, n, c)
    refs, outs = refs[: len(arrays)], refs[len(arrays) :]
    whole_refs, refs = refs[: len(wholes)], refs[len(wholes) :]
    state_refs, cut_refs, rest = refs[:2], refs[2 : 2 + len(cut)], refs[2 + len(cut) :]

    block = lambda i: pl.ds(i * COLUMNS, COLUMNS)
    times = lambda x, y: multiply([Pair(x.at[v], y.at[v], "nt") for v in across], plan)

    def fetch(i):
      for x, ref in enumerate(state_refs):
        for v in across:
          source = tile_at(ref, *at, block(v), rows=block(i))
          plgpu.copy_gmem_to_smem(source, state.at[x, v], barrier)
      for x, ref in enumerate(cut_refs):
        plgpu.copy_gmem_to_smem(tile_at(ref, *at, block(i)), parts[x], barrier)

    for x, ref in enumerate(whole_refs):
      for v in across:
        plgpu.copy_gmem_to_smem(tile_at(ref, *at, block(v)), whole.at[x, v], first)
    if weights:
      plgpu.copy_gmem_to_smem(tile_at(rest[0], *at), given, first)
    fetch(0)
    scale = [wg.load(tile_at(ref, *at, rows=None), ROW) for ref in rest[len(weights) :]]
    plgpu.barrier_wait(first)
    d_inside = lambda: times(whole.at[0], whole.at[1])
    if plan.weighs:
      given[...] = (d_inside() * given[...].astype(jnp.float32)).astype(DTYPE)
      plgpu.commit_smem()
    zero = lambda *shape: wg.full(shape, 0.0, TILE if len(shape) == 2 else ROW)

    lengths = [zero(C)] * len(vectors)
    scores = zero(C, C) if plan.weighs else None
    # The gradient of K is done first: then the gradients of states make room for others.
    order = [1, 0, 2][: len(names)]
    tiles = [*(state.at[1, v] for v in across), *room][: len(names) - 1] + [state.at[0, 0]]
    for i in range(blocks):  # a loop that is compiled as such holds too many addresses
      plgpu.barrier_wait(barrier)
      if plan.weighs:
        scores = multiply([Pair(parts[0], parts[1], "nt")], plan, scores)
      if "total" in line:
        both = jnp.where(diagonal(wg), times(state.at[0], state.at[1]), 0.0)
        line["total"].at[block(i)][...] = jnp.sum(both, axis=1)
      for x, tile in zip(order, tiles):
        grad = times(whole.at[x], state.at[int(x == 1)])
        if vectors and x < 2:
          lengths[x] += jnp.sum(grad * parts[x][...].astype(jnp.float32), axis=1)
          grad *= wg.wide(scale[x], grad.shape)
        if plan.weighs and x < 2:
          grad = multiply([Pair(given, parts[1 - x], ("nn", "tn")[x])], plan, grad)
        plgpu.commit_smem()  # all threads have read the tile
        tile[...] = grad.astype(DTYPE)
      plgpu.commit_smem()
      for x, tile in zip(order, tiles):
        plgpu.copy_smem_to_gmem(tile, tile_at(outs[x], *at, block(i)))
      if i + 1 < blocks:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        fetch(i + 1)

    given[...] = (d_inside() if scores is None else d_inside() * scores).astype(DTYPE)
    for name, x in zip(("read", "write"), lengths):
      line[name][...] = x
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(given, tile_at(outs[len(names)], *at))
    for name, ref in zip(lines, outs[len(names) + 1 :]):
      plgpu.copy_smem_to_gmem(line[name], tile_at(ref, *at, rows=None))
    plgpu.wait_smem_to_gmem(0)

  d_q, d_k, *rest = launch(
    kernel, arrays, shapes, plan, name="chunk_gradients", grid=dict(b=B, n=N, c=chunks),
    scratch=scratch,
  )  # fmt: skip
  d_p, rest = (None, rest) if d_y is None else (rest[0], rest[1:])
  found = dict(zip(["queries", "keys", "inside", *lines], [d_q, d_k, *rest], strict=True))
  return Tokens(**{name: shared(x, getattr(tokens, name)) for name, x in found.items()}), d_p
