"""A scan over chunks on TPU whose state stays in fast memory, and its reverse.

The kernels know no recurrence. They are handed `step`, which takes the states of some heads before
a chunk and the tiles of the chunk to their states after it and tiles of outputs. It is plain `jnp`
on matrices and is traced into the kernel. The backward kernel visits the chunks in reverse,
computes each again from the states that entered it, and differentiates `step` in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

Tiles = Mapping[str, jax.Array]
Step = Callable[[list[jax.Array], list[Tiles]], list[tuple[jax.Array, jax.Array]]]


class Plan(NamedTuple):
  """What is static of a scan.

  Attributes:
    step: of one chunk, a list of (V, H) and a list of {name: (rows, lanes)} to a list of
      ((V, H), (C, V)), an item for each head and all of it float32.
    heads: handled in one program, whose chains of matrix products fill each other's gaps. Divides
      the number of heads, and for every array divides its group of heads or is a multiple of it.
    dtype: of the outputs.
    interpret: emulate on CPU, for tests.
  """

  step: Step
  heads: int
  dtype: jnp.dtype
  interpret: bool = False


def heads_together(num_heads: int, shared: list[int], most: int) -> int:
  """The most heads, at most `most`, that one program can take: see `Plan.heads`.

  Args:
    num_heads: N.
    shared: the number of heads of each array, which divide N.
    most: a bound.
  """
  groups = [num_heads // heads for heads in shared]
  fits = lambda n: num_heads % n == 0 and all(n % g == 0 or g % n == 0 for g in groups)
  return max(n for n in range(1, max(1, most) + 1) if fits(n))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
  plan: Plan, state: jax.Array, tiles: Tiles, facts: Tiles
) -> tuple[jax.Array, jax.Array]:
  """out_c, S_c = step(S_{c-1}, the tiles of chunk c), for all heads of all rows.

  Args:
    plan: what is static.
    state: (B, N, V, H) float32, before the first chunk.
    tiles: (#B, K, #chunks, rows, lanes) each, K dividing N: N / K heads share a head. An axis
      marked # may be 1, which is then shared.
    facts: as `tiles`, without gradients.

  Returns:
    out (B, N, chunks, C, V) in `plan.dtype`, and the state after the last chunk.
  """
  out, last = _forward(plan, state, tiles, facts, keep=False)
  return out, last


def _scan_fwd(plan: Plan, state, tiles, facts):
  out, last, kept = _forward(plan, state, tiles, facts, keep=True)
  return (out, last), (kept, tiles, facts)


def _scan_bwd(plan: Plan, residuals, cotangents):
  kept, tiles, facts = residuals
  d_state, d_tiles = _backward(plan, kept, tiles, facts, *cotangents)
  return d_state, d_tiles, None


scan.defvjp(_scan_fwd, _scan_bwd)


class _Share(NamedTuple):
  """How the `heads` heads of a program read an array of K heads.

  Attributes:
    local: how many of its heads a program holds.
    programs: how many programs in a row hold the same.
  """

  local: int
  programs: int

  @classmethod
  def of(cls, heads: int, num_heads: int, shared: int) -> _Share:
    group = num_heads // shared
    return cls(max(1, heads // group), max(1, group // heads))


def _sizes(plan: Plan, state, tiles) -> tuple[tuple[int, int, int], dict[str, _Share]]:
  """The grid (B, N / heads, chunks), and how programs share the arrays."""
  B, N = state.shape[:2]
  chunks = max(x.shape[2] for x in tiles.values())
  for name, x in tiles.items():
    assert x.ndim == 5 and x.shape[0] in (1, B) and x.shape[2] in (1, chunks), (name, x.shape)
  assert N % plan.heads == 0, (N, plan.heads)
  return (B, N // plan.heads, chunks), {
    name: _Share.of(plan.heads, N, x.shape[1]) for name, x in tiles.items()
  }


def _tile_spec(x, share: _Share, chunk_of: Callable) -> pl.BlockSpec:
  """Heads of one chunk of one row, of an array that may have 1 for the rows or for the chunks."""
  batch, _, chunks, rows, lanes = x.shape
  return pl.BlockSpec(
    (None, share.local, None, rows, lanes),
    lambda b, n, c: (
      b if batch > 1 else 0, n // share.programs, chunk_of(c) if chunks > 1 else 0, 0, 0
    ),
  )  # fmt: skip


def _grad_spec(x, share: _Share, chunk_of: Callable) -> pl.BlockSpec:
  return pl.BlockSpec(
    (None, share.local, None, *x.shape[3:]), lambda b, n, c: (b, n, chunk_of(c), 0, 0)
  )


def _state_spec(heads: int, shape: tuple[int, int]) -> pl.BlockSpec:
  return pl.BlockSpec((None, heads, *shape), lambda b, n, c: (b, n, 0, 0))


def _kept_spec(heads: int, shape: tuple[int, int], chunk_of: Callable) -> pl.BlockSpec:
  return pl.BlockSpec((None, heads, None, *shape), lambda b, n, c: (b, n, chunk_of(c), 0, 0))


def _shape(shape, dtype, like) -> jax.ShapeDtypeStruct:
  """An output that varies over the mesh axes of `jax.shard_map` that `like` varies on."""
  kind = jax.typeof(like).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


# The state is carried along the chunks, which therefore go in order. The default limit, 16 MiB on
# some chips, is below what the backward pass of 8 heads spills; every chip since v5e has 64 MiB.
_COMPILER = pltpu.CompilerParams(
  dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 << 20
)


def _forward(plan: Plan, state, tiles, facts, *, keep: bool) -> list[jax.Array]:
  """The outputs, the last state and, to `keep` them, the states that enter the chunks."""
  inputs = {**tiles, **facts}
  (B, programs, chunks), shares = _sizes(plan, state, inputs)
  heads, size, N = plan.heads, state.shape[2:], state.shape[1]
  rows, lanes = tiles["v"].shape[3:]

  def kernel(start_ref, *refs):
    tile_refs, (out_ref, last_ref, *kept_ref, state_ref) = refs[: len(inputs)], refs[len(inputs) :]
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
      state_ref[...] = start_ref[...]

    states = [state_ref[j] for j in range(heads)]
    done = plan.step(states, _by_head(_load(inputs, tile_refs, shares), heads))
    for j, (after, out) in enumerate(done):
      for ref in kept_ref:
        ref[j] = states[j]
      out_ref[j] = out.astype(plan.dtype)
      state_ref[j] = after

    @pl.when(c == chunks - 1)
    def _():
      last_ref[...] = state_ref[...]

  same = lambda c: c
  out = _shape((B, N, chunks, rows, lanes), plan.dtype, state)
  kept = _shape((B, N, chunks, *size), jnp.float32, state)
  share = _Share(heads, 1)
  return pl.pallas_call(
    kernel,
    grid=(B, programs, chunks),
    in_specs=[
      _state_spec(heads, size), *(_tile_spec(x, shares[n], same) for n, x in inputs.items())
    ],
    out_specs=[
      _grad_spec(out, share, same), _state_spec(heads, size),
      *[_kept_spec(heads, size, same)] * keep,
    ],
    out_shape=[out, _shape(state.shape, jnp.float32, state), *[kept] * keep],
    scratch_shapes=[pltpu.VMEM((heads, *size), jnp.float32)],
    compiler_params=_COMPILER,
    interpret=plan.interpret,
    name=f"attnx_{_name(plan)}_forward",
  )(state, *inputs.values())  # fmt: skip


def _backward(plan: Plan, kept, tiles, facts, d_out, d_last):
  """Cotangents of the first state and of the tiles, given those of the results."""
  inputs = {**tiles, **facts}
  (B, programs, chunks), shares = _sizes(plan, d_last, inputs)
  heads, size = plan.heads, d_last.shape[2:]

  def kernel(d_last_ref, kept_ref, d_out_ref, *refs):
    tile_refs, refs = refs[: len(inputs)], refs[len(inputs) :]
    d_first_ref, *d_tile_refs, d_state_ref = refs
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
      d_state_ref[...] = d_last_ref[...]

    held = _load(inputs, tile_refs, shares)
    known = {name: held[name] for name in facts}

    chunk = lambda states, moving: plan.step(states, _by_head(moving | known, heads))
    states = [kept_ref[j] for j in range(heads)]
    _, pull = jax.vjp(chunk, states, {name: held[name] for name in tiles})
    d_done = [(d_state_ref[j], d_out_ref[j].astype(jnp.float32)) for j in range(heads)]
    d_states, d_tiles = pull(d_done)
    for name, ref in zip(tiles, d_tile_refs, strict=True):
      for i, d_tile in enumerate(d_tiles[name]):
        ref[i] = d_tile.astype(ref.dtype)
    for j in range(heads):
      d_state_ref[j] = d_states[j]

    @pl.when(c == chunks - 1)
    def _():
      d_first_ref[...] = d_state_ref[...]

  back = lambda c: chunks - 1 - c
  share = _Share(heads, 1)
  d_shapes = {n: _grad_shape(x, shares[n], (B, programs, chunks), d_last) for n, x in tiles.items()}
  d_first, *d_tiles = pl.pallas_call(
    kernel,
    grid=(B, programs, chunks),
    in_specs=[
      _state_spec(heads, size), _kept_spec(heads, size, back), _grad_spec(d_out, share, back),
      *(_tile_spec(x, shares[name], back) for name, x in inputs.items()),
    ],
    out_specs=[
      _state_spec(heads, size), *(_grad_spec(x, shares[name], back) for name, x in tiles.items())
    ],
    out_shape=[_shape(d_last.shape, jnp.float32, d_last), *d_shapes.values()],
    scratch_shapes=[pltpu.VMEM((heads, *size), jnp.float32)],
    compiler_params=_COMPILER,
    interpret=plan.interpret,
    name=f"attnx_{_name(plan)}_backward",
  )(d_last, kept, d_out, *inputs.values())  # fmt: skip
  summed = zip(tiles.items(), d_tiles, strict=True)
  return d_first, {name: _sum_shared(d_tile, x) for (name, x), d_tile in summed}


def _name(plan: Plan) -> str:
  return getattr(plan.step, "func", plan.step).__name__


def _load(inputs: Tiles, refs, shares: dict[str, _Share]) -> dict[str, list[jax.Array]]:
  """The tiles of the heads that a program holds, in float32."""
  return {
    name: [ref[i].astype(jnp.float32) for i in range(shares[name].local)]
    for name, ref in zip(inputs, refs, strict=True)
  }


def _by_head(held: dict[str, list[jax.Array]], heads: int) -> list[dict[str, jax.Array]]:
  """The tiles that each head reads, of those that a program holds."""
  read = lambda head: {name: tiles[head * len(tiles) // heads] for name, tiles in held.items()}
  return [read(head) for head in range(heads)]


def _grad_shape(x, share: _Share, grid: tuple[int, int, int], like) -> jax.ShapeDtypeStruct:
  """A gradient before it is summed over what shares its array: in float32 if anything does."""
  B, programs, chunks = grid
  shape = (B, programs * share.local, chunks, *x.shape[3:])
  return _shape(shape, x.dtype if shape == x.shape else jnp.float32, like)


def _sum_shared(grad: jax.Array, x: jax.Array) -> jax.Array:
  """A gradient summed over the rows, programs and chunks that shared an array shaped as `x`."""
  grad = grad.reshape(grad.shape[0], x.shape[1], -1, *grad.shape[2:]).sum(2)
  for axis in (0, 2):
    if x.shape[axis] == 1:
      grad = grad.sum(axis, keepdims=True)
  return grad.astype(x.dtype)
