"""What every recurrence shares: cutting into chunks, documents, sums of log decays, the scan."""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnx.core.varying import varying


class Runs(NamedTuple):
  """Which document each token of a chunk belongs to; run 0 is the one that the state is of.

  Attributes:
    own: (#B, C), counts up by one wherever the segment id changes.
    before: (#B, 1), the run of the state that enters the chunk.
  """

  own: jax.Array
  before: jax.Array

  def enters(self) -> jax.Array:
    """(#B, C), whether a token sees the state that enters the chunk."""
    return self.own == self.before

  def leaves(self) -> jax.Array:
    """(#B, C), whether a token is part of the state that leaves the chunk."""
    return self.own == self.own[:, -1:]

  def passes(self) -> jax.Array:
    """(#B, 1), whether the state that enters the chunk is part of the one that leaves it."""
    return self.before == self.own[:, -1:]

  def meet(self) -> jax.Array:
    """(#B, C, C), whether two tokens are of one document."""
    return self.own[:, :, None] == self.own[:, None, :]


def runs(segment: jax.Array | None, batch: int, length: int, chunk: int) -> Runs | None:
  """The runs of all chunks, (chunks, #B, ...) each; None where there is one document.

  Raises:
    ValueError: `segment` is not of shape (1, T) or (B, T).
  """
  if segment is None:
    return None
  segment = jnp.asarray(segment)
  if segment.shape not in ((1, length), (batch, length)):
    expected = f"(1, {length}) or ({batch}, {length})"
    raise ValueError(f"segment has shape {segment.shape}; expected {expected}, as Tokens.segment")
  changes = segment[:, 1:] != segment[:, :-1]
  own = jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)])
  own = jnp.pad(own, [(0, 0), (0, -length % chunk)], mode="edge")
  own = jnp.moveaxis(own.reshape(own.shape[0], -1, chunk), 1, 0)
  before = jnp.pad(own[:-1, :, -1:], [(1, 0), (0, 0), (0, 0)])
  return Runs(own, before)


def cut(x: jax.Array, chunk: int, fill: float = 0.0) -> jax.Array:
  """(B, T, ...) to (chunks, B, C, ...), padded with `fill`."""
  if pad := -x.shape[1] % chunk:
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def join(x: jax.Array, length: int) -> jax.Array:
  """(chunks, B, C, ...) to (B, T, ...), the inverse of `cut`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def heads_first(x: jax.Array, num_heads: int, dtype: Any) -> jax.Array:
  """A chunk (B, C, K, X) to (B, N, C, X), its heads repeated: of a chunk, never of the sequence."""
  x = jnp.swapaxes(x, 1, 2).astype(dtype)
  return x if x.shape[1] in (1, num_heads) else jnp.repeat(x, num_heads // x.shape[1], axis=1)


def scan(
  step: Callable, state: Any, xs: Any, *, consts: Any = (), every: int = 1
) -> tuple[Any, Any]:
  """`lax.scan` of step(state, x, *consts), keeping every `every`-th state for the backward pass.

  Each chunk, and each group of chunks, is computed again when its gradient is needed.
  """
  state = varying(state, xs, consts)
  body = jax.checkpoint(lambda state, x: step(state, x, *consts), prevent_cse=False)
  length = jax.tree.leaves(xs)[0].shape[0]
  inner = functools.partial(jax.lax.scan, body)
  if every <= 1 or every >= length:
    return inner(state, xs)
  whole = length - length % every
  groups = jax.tree.map(lambda x: x[:whole].reshape(-1, every, *x.shape[1:]), xs)
  state, out = jax.lax.scan(jax.checkpoint(inner, prevent_cse=False), state, groups)
  out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out)
  if whole == length:
    return state, out
  state, rest = jax.checkpoint(inner)(state, jax.tree.map(lambda x: x[whole:], xs))
  return state, jax.tree.map(lambda *x: jnp.concatenate(x), out, rest)


def log_sums(log_decay: jax.Array) -> jax.Array:
  """Sums of (B, N, C, X) along C through each token, as (2, B, N, C, X): a coarse and a fine part.

  Differences of sums are what is exponentiated, and a float32 difference of two sums near -2000 is
  off by 1e-4. The coarse parts are multiples of 2^-11, whose sums and differences are exact; the
  fine parts are small. Decays that would underflow, -inf among them, are moved to where they just
  underflow, so that no infinities are subtracted.
  """
  floor = math.log(jnp.finfo(log_decay.dtype).smallest_subnormal) - 1.0
  log_decay = jnp.maximum(log_decay, floor)
  coarse = jnp.round(jax.lax.stop_gradient(log_decay) * 2.0**11) * 2.0**-11
  return jnp.cumsum(jnp.stack([coarse, log_decay - coarse]), axis=-2)


def through_previous(sums: jax.Array) -> jax.Array:
  """Sums through each token to sums through the token before it."""
  return jnp.pad(sums[..., :-1, :], [(0, 0)] * (sums.ndim - 2) + [(1, 0), (0, 0)])


def between(late: jax.Array, early: jax.Array) -> jax.Array:
  """The log decay from `early` to `late`, the difference of two `log_sums`.

  It is above 0 by no more than the rounding of the fine parts, so it needs no minimum, whose
  gradient would be halved where there is no decay.
  """
  return (late[0] - early[0]) + (late[1] - early[1])


def check(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int) -> int:
  """The number of heads.

  Raises:
    TypeError: an array is not floating.
    ValueError: shapes do not fit each other, or `chunk` is not positive.
  """
  for name, x in (("q", q), ("k", k), ("v", v)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f"{name} has dtype {x.dtype}; expected a floating one: cast it first")
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(f"{name} has shape {x.shape}; expected (B, T, heads, width), none of them 0")
    if x.shape[:2] != q.shape[:2]:
      raise ValueError(f"{name} has shape {x.shape}; expected {q.shape[:2]} first, as q has")
  if k.shape[3] != q.shape[3]:
    raise ValueError(f"k has width {k.shape[3]}; expected {q.shape[3]}, the width of q")
  num_heads = max(q.shape[2], v.shape[2])
  for name, x in (("q", q), ("k", k), ("v", v)):
    if num_heads % x.shape[2]:
      raise ValueError(f"{name} has {x.shape[2]} heads, which must divide the {num_heads} heads")
  if chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1")
  return num_heads


def check_state(state: jax.Array | None, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless a state is None or of this shape."""
  if state is not None and state.shape != shape:
    raise ValueError(f"state has shape {state.shape}; expected {shape}, as a call returns it")
