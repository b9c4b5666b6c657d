"""Elementwise linear recurrences by a parallel scan within chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.core.instead import replaceable
from attnx.recurrence import chunks


@replaceable
def diagonal_scan(
  a: jax.Array,
  b: jax.Array,
  *,
  state: jax.Array | None = None,
  segment: jax.Array | None = None,
  chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """h_t = a_t h_{t-1} + b_t, elementwise, real or complex.

  The recurrence of LRU (arXiv:2303.06349), RG-LRU (arXiv:2402.19427) and Mamba (arXiv:2312.00752).
  Chunks follow each other, and within one the steps are combined in pairs; the backward pass keeps
  one state a chunk.

  Args:
    a: broadcasts to (B, T, ...), constant over time with a 1 there. Only products of it are formed,
      so 0 is allowed.
    b: (B, T, ...).
    state: h_0, (B, ...); zero if None. It belongs to the segment of the first token.
    segment: (#B, T) integers; where the id changes, the state starts at zero again.
    chunk: tokens handled at once.

  Returns:
    h (B, T, ...) in the dtype of `b` (a complex one if any input is complex), and h_T (B, ...) in
    float32 or complex64 (float64 or complex128 if an input is of 64 bits).

  Raises:
    ValueError: shapes do not fit each other.
  """
  if b.ndim < 2 or 0 in b.shape:
    raise ValueError(f"b has shape {b.shape}; expected (B, T, ...), none of them 0")
  (B, T), given = b.shape[:2], (1,) * (b.ndim - a.ndim) + a.shape
  if len(given) > b.ndim or any(n not in (1, m) for n, m in zip(given, b.shape, strict=True)):
    raise ValueError(f"a has shape {a.shape}; expected what broadcasts to {b.shape}, as b has")
  chunks.check_state(state, (B, *b.shape[2:]))
  if chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1")
  arrays = [a, b] if state is None else [a, b, state]
  dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
  out = dtype if jnp.issubdtype(dtype, jnp.complexfloating) else b.dtype
  chunk = min(chunk, T)
  a = jnp.broadcast_to(a.reshape(given), (given[0], T, *given[2:]))
  xs = chunks.cut(a, chunk, fill=1.0), chunks.cut(b, chunk), chunks.runs(segment, B, T, chunk)
  state = jnp.zeros_like(b[:, 0], dtype) if state is None else state.astype(dtype)
  state, h = chunks.scan(lambda state, xs: _step(state, xs, out), state, xs)
  return chunks.join(h, T), state


def _step(state, xs, out):
  """One chunk: the state before it to the state after it and all of its states."""
  a, b, runs = xs
  a, b = a.astype(state.dtype), b.astype(state.dtype)
  if runs is not None:
    previous = jnp.concatenate([runs.before, runs.own[:, :-1]], axis=1)
    starts = (runs.own != previous).reshape(*runs.own.shape, *[1] * (b.ndim - 2))
    a = jnp.where(starts, 0.0, a)

  def combine(early, late):
    return early[0] * late[0], late[0] * early[1] + late[1]

  decay, h = jax.lax.associative_scan(combine, (a, b), axis=1)
  h = h + decay * state[:, None]
  return h[:, -1], h.astype(out)
