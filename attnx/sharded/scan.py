"""Recurrences over sequences that are sharded: a scan over devices carries the state."""

from __future__ import annotations

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

from attnx.core.varying import varying
from attnx.recurrence import chunks, convolution, delta, diagonal, linear

Summary = tuple[jax.Array, jax.Array]  # (A, b) of a shard, whose state goes S -> A S + b
Run = Callable[[jax.Array | None], tuple[jax.Array, jax.Array]]  # state to outputs and state


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  axis_name: str,
  bonus: jax.Array | None = None,
  state: jax.Array | None = None,
  segment: jax.Array | None = None,
  chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
  """`recurrence.linear.linear_attention`, inside `jax.shard_map`, of a shard of the tokens.

  Arguments and results are those of the function on one device, arrays (B, T / P, ...) being shards
  in their order; `state` is that before the first token of all, and the state that comes back is
  the one after the shard. States (B, N, H, V) travel, in log2 P steps.
  """
  N, (B, T, _, H) = chunks.check(q, k, v, chunk), q.shape
  run = lambda state: linear.linear_attention(
    q, k, v, log_decay, bonus=bonus, state=state, segment=segment, chunk=chunk
  )
  decay = jnp.ones((B, N, H, 1))
  if log_decay is not None:
    sums = linear.along(log_decay, (B, T, N, H)).astype(jnp.promote_types(v.dtype, jnp.float32))
    decay = jnp.broadcast_to(jnp.exp(sums.sum(1))[..., None], (B, N, H, 1))
  return carried(run, decay, state, segment, axis_name, jnp.multiply)


def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  axis_name: str,
  state: jax.Array | None = None,
  segment: jax.Array | None = None,
  chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
  """`recurrence.delta.delta_rule`, inside `jax.shard_map`, of a shard of the tokens.

  As `linear_attention`; what a shard does to the state is a matrix, so that (B, N, H, H + V)
  numbers travel. The matrix is the state that the identity becomes where all values are zero.
  """
  (B, T, N), H = beta.shape, q.shape[3]
  run = lambda state, v=v: delta.delta_rule(
    q, k, v, beta, log_decay, state=state, segment=segment, chunk=chunk
  )
  one = jnp.broadcast_to(jnp.eye(H, dtype=jnp.promote_types(v.dtype, jnp.float32)), (B, N, H, H))
  matrix = run(one, jnp.zeros((B, T, N, H), v.dtype))[1]
  return carried(run, matrix, state, segment, axis_name, jnp.matmul)


def diagonal_scan(
  a: jax.Array,
  b: jax.Array,
  *,
  axis_name: str,
  state: jax.Array | None = None,
  segment: jax.Array | None = None,
  chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """`recurrence.diagonal.diagonal_scan`, inside `jax.shard_map`, of a shard of the tokens.

  As `linear_attention`; twice the state (B, ...) travels.
  """
  run = lambda state: diagonal.diagonal_scan(a, b, state=state, segment=segment, chunk=chunk)
  dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
  a = a.reshape((1,) * (b.ndim - a.ndim) + a.shape).astype(dtype)
  decay = jnp.broadcast_to(a, (a.shape[0], b.shape[1], *a.shape[2:])).prod(1)
  decay = jnp.broadcast_to(decay, (b.shape[0], *b.shape[2:]))
  return carried(run, decay, state, segment, axis_name, jnp.multiply)


def long_convolution(
  x: jax.Array, kernel: jax.Array, *, axis_name: str, segment: jax.Array | None = None
) -> jax.Array:
  """`recurrence.convolution.long_convolution`, inside `jax.shard_map`, of a shard of the tokens.

  Tokens are exchanged for channels, all to all, and back: x is (B, T / P, D) where P divides D; the
  kernel, (L, D) or (L, 1), is whole on every device.
  """
  size, D = jax.lax.axis_size(axis_name), x.shape[2]
  if D % size:
    raise ValueError(f"x has {D} channels, which cannot be dealt out to {size} devices evenly")
  mine = jax.lax.axis_index(axis_name) * (D // size)
  if kernel.shape[1] > 1:
    kernel = jax.lax.dynamic_slice_in_dim(kernel, mine, D // size, axis=1)
  if segment is not None:
    segment = jax.lax.all_gather(jnp.asarray(segment), axis_name, axis=1, tiled=True)
  x = jax.lax.all_to_all(x, axis_name, 2, 1, tiled=True)
  y = convolution.long_convolution(x, kernel, segment=segment)
  return jax.lax.all_to_all(y, axis_name, 1, 2, tiled=True)


def carried(
  run: Run,
  decay: jax.Array,
  state: jax.Array | None,
  segment: jax.Array | None,
  axis_name: str,
  times: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """What `run` makes of a shard once the state of the shards before has arrived.

  Args:
    run: of the shard, from a state.
    decay: what the shard does to a state, to be applied by `times`.
    state: before the first token of all; zero if None.
    segment: (#B, T / P) integers; None is one document.
    axis_name: the mesh axis that tokens are sharded over.
    times: decay and state, or decay and decay, to their product.
  """
  _, added = run(None)
  state = jnp.zeros_like(added) if state is None else state
  same = jnp.ones(())  # whether the document of the state before goes on at the first token
  if segment is not None:
    segment = jnp.asarray(segment)
    size = jax.lax.axis_size(axis_name)
    onward = [(i, i + 1) for i in range(size - 1)]
    last = jax.lax.ppermute(segment[:, -1], axis_name, onward)
    first = jax.lax.axis_index(axis_name) == 0
    tall = lambda x: x.reshape(-1, *[1] * (state.ndim - 1))
    same = tall((segment[:, 0] == last) | first).astype(decay.dtype)
    through = tall((segment == segment[:, :1]).all(1)).astype(decay.dtype)
    decay = decay * (same * through)
  before, arrived = exclusive((decay, added.astype(state.dtype)), axis_name, times)
  return run(same * (times(before, state) + arrived))


def exclusive(
  own: Summary, axis_name: str, times: Callable[[jax.Array, jax.Array], jax.Array]
) -> Summary:
  """What all devices before this one do to a state, in log2 P steps.

  Before step j a device knows the 2^j - 1 devices before it; with its own part it tells the device
  2^j further on.
  """
  size, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  A, b = own
  one = jnp.broadcast_to(1.0 if times is jnp.multiply else jnp.eye(A.shape[-1]), A.shape)
  nothing = (one.astype(A.dtype), jnp.zeros_like(b))
  then = lambda early, late: (times(late[0], early[0]), times(late[0], early[1]) + late[1])
  before = varying(nothing, own)
  for j in range(math.ceil(math.log2(size))):
    step = [(i, i + 2**j) for i in range(size - 2**j)]
    heard = jax.lax.ppermute(then(before, own), axis_name, step)
    heard = jax.tree.map(lambda x, y: jnp.where(rank >= 2**j, x, y), heard, nothing)
    before = then(heard, before)
  return before
