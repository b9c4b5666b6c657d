"""Causal convolutions along time, one kernel per channel: by FFT, by direct sum, by a state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core.instead import replaceable
from attnx.recurrence import chunks


@replaceable
def long_convolution(
  x: jax.Array, kernel: jax.Array, *, segment: jax.Array | None = None
) -> jax.Array:
  """y_t = sum_{s <= t} kernel_{t-s} x_s, by FFT, in O(T log T), or O(T log^2 T) with documents.

  Rounding is that of a sum over the whole sequence: an output moves, in its last digits, with later
  inputs. With documents it never does.

  Args:
    x: (B, T, D).
    kernel: (L, D), or (L, 1) for one kernel of all channels; what is longer than T is not seen.
    segment: (#B, T) integers; where the id changes, earlier inputs are no longer seen.

  Returns:
    (B, T, D) in the dtype of `x`, computed in float32 (float64 if an input is).

  Raises:
    ValueError: shapes do not fit each other.
  """
  _check(x, kernel)
  (B, T, _), kernel = x.shape, kernel[: x.shape[1]]
  dtype = _dtype(x, kernel)
  wide, kernel = x.astype(dtype), kernel.astype(dtype)
  if (runs := chunks.runs(segment, B, T, T)) is not None:
    return _within_runs(wide, kernel, runs.own[0]).astype(x.dtype)
  size = _fast_length(T + kernel.shape[0] - 1)
  spectrum = jnp.fft.rfft(kernel, size, axis=0)
  y = jnp.fft.irfft(jnp.fft.rfft(wide, size, axis=1) * spectrum, size, axis=1)
  return y[:, :T].astype(x.dtype)


def _within_runs(x, kernel, own):
  """`long_convolution` of tokens (B, T, D) of the runs `own` (#B, T).

  Blocks of 16 tokens are direct sums. Any other tokens s < t are in the two halves of exactly one
  block of 32, 64, 128, ... tokens, and at most one run reaches across its middle. So a product of
  spectra gives what the early half of a block owes to the late one, once everything else is zero
  on either side of it.
  """
  (B, T, D), half = x.shape, 16
  size = max(1 << (T - 1).bit_length(), half)
  fill = lambda a: jnp.pad(a, [(0, 0), (0, size - T), (0, 0)], mode="edge")
  x, own = fill(x), jnp.broadcast_to(fill(own[..., None]), (B, size, 1))
  cut = lambda a: a.reshape(-1, half, a.shape[2])
  y = short_convolution(cut(x), kernel[:half], segment=cut(own)[..., 0])[0].reshape(x.shape)
  while half < size:
    early, late = jnp.moveaxis(x.reshape(B, -1, 2, half, D), 2, 0)
    before, after = jnp.moveaxis(own.reshape(B, -1, 2, half, 1), 2, 0)
    crosses = before[:, :, -1:]
    spectrum = jnp.fft.rfft(kernel[: 2 * half], 2 * half, axis=0)
    early = jnp.fft.rfft(jnp.where(before == crosses, early, 0.0), 2 * half, axis=2)
    owed = jnp.fft.irfft(early * spectrum, 2 * half, axis=2)[:, :, half:]
    owed = jnp.where(after == crosses, owed, 0.0)
    y += jnp.stack([jnp.zeros_like(late), owed], axis=2).reshape(y.shape)
    half *= 2
  return y[:, :T]


def short_convolution(
  x: jax.Array,
  kernel: jax.Array,
  *,
  state: jax.Array | None = None,
  segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """y_t = sum_{d < L} kernel_d x_{t-d}, tap by tap, in O(T L).

  Args:
    x: (B, T, D).
    kernel: (L, D) or (L, 1), L at least 1.
    state: the L - 1 inputs before the first, oldest first, (B, L - 1, D); zero if None. They belong
      to the segment of the first token.
    segment: (#B, T) integers; where the id changes, earlier inputs are no longer seen.

  Returns:
    y (B, T, D) in the dtype of `x`, computed in float32 (float64 if an input is), and the state
    after it in the dtype of `x`, so that a decode step is a call with T = 1.

  Raises:
    ValueError: shapes do not fit each other.
  """
  _check(x, kernel)
  (B, T, D), L = x.shape, kernel.shape[0]
  chunks.check_state(state, (B, L - 1, D))
  state = jnp.zeros((B, L - 1, D), x.dtype) if state is None else state.astype(x.dtype)
  seen, dtype = jnp.concatenate([state, x], axis=1), _dtype(x, kernel)
  if (runs := chunks.runs(segment, B, T, T)) is not None:
    own = jnp.pad(runs.own[0], [(0, 0), (L - 1, 0)])[..., None]  # run 0 has the state as its past
  y = jnp.zeros(x.shape, dtype)
  for d in range(L):
    window = slice(L - 1 - d, L - 1 - d + T)
    tap = seen[:, window].astype(dtype) * kernel[d].astype(dtype)
    y += tap if runs is None else jnp.where(own[:, window] == own[:, L - 1 :], tap, 0.0)
  state = seen[:, T:]
  if runs is not None:
    state = jnp.where(own[:, T:] == own[:, -1:], state, jnp.zeros((), x.dtype))
  return y.astype(x.dtype), state


def exponential_kernel(log_decay: jax.Array, c: jax.Array, length: int) -> jax.Array:
  """kernel_t = Re sum_r c_r exp(t log_decay_r), for t = 0 .. length - 1 (S4D, arXiv:2206.11893).

  Args:
    log_decay: (D, R), real or complex, its real part at most 0.
    c: (D, R), real or complex.
    length: how many taps.

  Returns:
    (length, D) in float32 (float64 if an input is). Never holds (length, D, R): t is split into
    tens and ones, of which there are sqrt(length) each.

  Raises:
    ValueError: shapes do not fit each other.
  """
  _check_modes(log_decay, c)
  ones = max(1, round(length**0.5))
  tens = -(-length // ones)
  rough = c * jnp.exp(ones * np.arange(tens)[:, None, None] * log_decay)
  fine = jnp.exp(np.arange(ones)[:, None, None] * log_decay)
  kernel = jnp.einsum("idr,jdr->ijd", rough, fine, precision="highest").real
  return kernel.reshape(-1, c.shape[0])[:length]


def exponential_convolution(
  x: jax.Array,
  log_decay: jax.Array,
  c: jax.Array,
  *,
  state: jax.Array | None = None,
  segment: jax.Array | None = None,
  chunk: int = 16,
) -> tuple[jax.Array, jax.Array]:
  """y_t = Re sum_r c_r s_tr with s_t = exp(log_decay) s_{t-1} + x_t: an exponential kernel's state.

  Equal to `long_convolution` with `exponential_kernel`, in O(T (chunk + R)), but for carrying a
  state and keeping documents apart.

  Args:
    x: (B, T, D).
    log_decay, c: (D, R), real or complex; the real part of `log_decay` is at most 0.
    state: s_0, (B, D, R); zero if None. It belongs to the segment of the first token.
    segment: (#B, T) integers; where the id changes, the state starts at zero again.
    chunk: tokens handled at once.

  Returns:
    y (B, T, D) in the dtype of `x`, and s_T (B, D, R) in the dtype of `log_decay`, of at least 32
    bits a part.

  Raises:
    ValueError: shapes do not fit each other.
  """
  _check_modes(log_decay, c)
  if x.ndim != 3 or 0 in x.shape or x.shape[2] != c.shape[0]:
    raise ValueError(f"x has shape {x.shape}; expected (B, T, {c.shape[0]}), none of them 0")
  if chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1")
  B, T, D = x.shape
  chunks.check_state(state, (B, *c.shape))
  dtype = jnp.promote_types(jnp.result_type(x, log_decay, c), jnp.float32)
  log_decay, c = log_decay.astype(dtype), c.astype(dtype)
  state = jnp.zeros((B, *c.shape), dtype) if state is None else state.astype(dtype)
  chunk = min(chunk, T)
  whole = T - T % chunk
  runs = None if segment is None else chunks.runs(segment, B, T, 1)
  runs = None if runs is None else jax.tree.map(lambda x: jnp.moveaxis(x[..., 0], 0, 1), runs)
  outputs = []
  for window, size in ((slice(0, whole), chunk), (slice(whole, T), T - whole)):
    if size:
      xs = jax.tree.map(lambda x: chunks.cut(x[:, window], size), (x, runs))
      state, y = chunks.scan(_exponential_step, state, xs, consts=(_modes(log_decay, c, size),))
      outputs.append(chunks.join(y, y.shape[0] * size))
  return jnp.concatenate(outputs, axis=1), state


def exponential_step(
  x: jax.Array, log_decay: jax.Array, c: jax.Array, *, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """y = Re sum_r c_r s_r with s = exp(log_decay) state + x: one token x (B, D), O(D R)."""
  y, state = exponential_convolution(x[:, None], log_decay, c, state=state, chunk=1)
  return y[:, 0], state


def _modes(log_decay, c, size):
  """What every chunk of `size` tokens needs: powers (C, D, R), taps (C, C, D)."""
  place = np.arange(size)
  powers = jnp.exp(place[:, None, None] * log_decay)  # exp(t log_decay), t = 0 .. C - 1
  kernel = jnp.einsum("tdr,dr->td", powers, c, precision="highest").real
  later = place[:, None] - place
  taps = jnp.where((later >= 0)[..., None], kernel[np.maximum(later, 0)], 0.0)
  read, through = c * powers * jnp.exp(log_decay), jnp.exp(size * log_decay)
  return {"powers": powers, "read": read, "pass": through, "taps": taps}


def _exponential_step(state, xs, modes):
  """One chunk: the state before it to the state after it and its outputs (B, C, D)."""
  given, runs = xs
  x = given.astype(modes["taps"].dtype)
  before = jnp.einsum("tdr,bdr->btd", modes["read"], state, precision="highest").real
  kept, onto, taps = modes["pass"] * state, x, modes["taps"]
  if runs is not None:
    own, start, last = runs.own, runs.before[:, :1], runs.own[:, -1:]
    taps = jnp.where((own[:, :, None] == own[:, None, :])[..., None], taps, 0.0)
    before = jnp.where((own == start)[..., None], before, 0.0)
    onto = jnp.where((own == last)[..., None], x, 0.0)
    kept = jnp.where((start == last)[..., None], kept, 0.0)
  y = before + jnp.sum(taps * x[:, None], axis=2)
  state = kept + jnp.einsum("sdr,bsd->bdr", modes["powers"][::-1], onto, precision="highest")
  return state, y.astype(given.dtype)


def _check(x, kernel):
  """Raises ValueError unless x is (B, T, D) and kernel (L, D) or (L, 1)."""
  if x.ndim != 3 or 0 in x.shape:
    raise ValueError(f"x has shape {x.shape}; expected (B, T, D), none of them 0")
  if kernel.ndim != 2 or kernel.shape[0] < 1 or kernel.shape[1] not in (1, x.shape[2]):
    raise ValueError(f"kernel has shape {kernel.shape}; expected (L, {x.shape[2]}) or (L, 1)")


def _check_modes(log_decay, c):
  """Raises ValueError unless both are (D, R)."""
  if c.ndim != 2 or log_decay.shape != c.shape:
    raise ValueError(f"log_decay {log_decay.shape} and c {c.shape} must both be (D, R)")


def _dtype(*arrays):
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _fast_length(length):
  """The smallest 2^a, 3 2^a or 5 2^a that is no less: lengths that FFTs are fast for."""
  return min(m << max(0, (-(-length // m) - 1).bit_length()) for m in (1, 3, 5))
