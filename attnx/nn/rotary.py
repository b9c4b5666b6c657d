"""Rotations by position (arXiv:2104.09864), and what their frequencies have in common."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from attnx.nn.position import Position, working_dtype


def frequencies(width: int, base: float = 10_000.0) -> np.ndarray:
  """w_j = base^(-2j / R) for the pairs j = 0 .. R/2 - 1 of R = `width` channels, in float64.

  Raises:
    ValueError: `width` is odd.
  """
  if width % 2:
    raise ValueError(f"a width of {width} channels has no pairs to turn; expected an even number")
  return base ** (-2.0 * np.arange(width // 2) / max(width, 1))


def angles(position: jax.Array, frequency: np.ndarray, dtype=jnp.float32) -> jax.Array:
  """position * frequency, (#B, T) and (R/2,) to (#B, T, R/2), never in less than float32."""
  return jnp.asarray(position).astype(dtype)[..., None] * jnp.asarray(frequency, dtype)


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
  """(a cos - b sin, b cos + a sin) for every pair (a, b) = (x_j, x_{j + R/2}).

  This is the layout in two halves, not the one of neighbouring channels: weights trained with the
  latter want their channels permuted.

  Args:
    x: (B, T, N, H).
    angle: (#B, T, R/2), R <= H; channels from R on pass through.

  Returns:
    (B, T, N, H) in the dtype of `x`, computed in that of `angle`.
  """
  R = 2 * angle.shape[-1]
  turned, rest = x[..., :R], x[..., R:]
  sin, cos = jnp.sin(angle)[..., None, :], jnp.cos(angle)[..., None, :]
  a, b = jnp.split(turned.astype(jnp.promote_types(x.dtype, angle.dtype)), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return jnp.concatenate([turned, rest], axis=-1)


class Rotary(Position):
  """Rotates queries and keys alike; a subclass says how fast each pair turns.

  Args:
    base: the slowest pair turns once in about 2 pi base tokens.
    rotary_dim: R, how many of the H channels turn; None means all.
    gain: factor on queries and on keys, so that scores gain its square.
  """

  def __init__(
    self, *, base: float = 10_000.0, rotary_dim: int | None = None, gain: float = 1.0
  ):
    if base <= 1:
      raise ValueError(f"base={base} must be above 1, or no pair is slower than another")
    self.base, self.rotary_dim, self.gain = base, rotary_dim, gain

  def frequencies(self, width: int) -> np.ndarray:
    """Radians a token, (R/2,), of R = `width` turning channels."""
    raise NotImplementedError(f"{type(self).__name__} does not say how fast its pairs turn")

  def query(self, x, position):
    return self._turn(x, position)

  def key(self, x, position):
    return self._turn(x, position)

  def width(self, head_dim: int) -> int:
    """R, for heads of width H."""
    if self.rotary_dim is not None and not 0 <= self.rotary_dim <= head_dim:
      raise ValueError(f"rotary_dim={self.rotary_dim} does not fit a head of {head_dim} channels")
    return head_dim if self.rotary_dim is None else self.rotary_dim

  def _turn(self, x: jax.Array, position: jax.Array) -> jax.Array:
    frequency, dtype = self.frequencies(self.width(x.shape[-1])), working_dtype(x)
    turned = rotate(x.astype(dtype), angles(position, frequency, dtype))
    return (turned * self.gain).astype(x.dtype)


class Stretched(Rotary):
  """Pairs turn more slowly, so that texts may be `factor` times longer than in training.

  Args:
    factor: how many times longer the context is than in training; at least 1.
    base, rotary_dim, gain: see `Rotary`.
  """

  def __init__(
    self,
    factor: float,
    *,
    base: float = 10_000.0,
    rotary_dim: int | None = None,
    gain: float = 1.0,
  ):
    if factor < 1:
      raise ValueError(f"factor={factor} must be at least 1: it says how much longer texts become")
    super().__init__(base=base, rotary_dim=rotary_dim, gain=gain)
    self.factor = factor


class ByParts(Stretched):
  """w'_j = (1 - g_j) w_j / factor + g_j w_j; a subclass says which share g_j of a pair is kept.

  Pairs that turn often in the context of training are kept as they are, and pairs that never
  complete a turn are interpolated. Queries and keys are multiplied by 0.1 ln(factor) + 1, so that
  all of q k^T, passed-through channels included, has the temperature of arXiv:2309.00071.

  Args:
    factor: how many times longer the context is than in training; at least 1.
    original_length: context length of training.
    slow, fast: turns within `original_length` below which a pair is interpolated, and above which
      it is left alone; alpha and beta of the paper.
    base, rotary_dim: see `Rotary`.

  Raises:
    ValueError: `factor` is below 1, or `fast` is not above `slow`.
  """

  def __init__(
    self,
    factor: float,
    original_length: int,
    *,
    slow: float = 1.0,
    fast: float = 32.0,
    base: float = 10_000.0,
    rotary_dim: int | None = None,
  ):
    if fast <= slow:
      raise ValueError(f"fast={fast} turns must be more than slow={slow}")
    gain = 0.1 * math.log(max(factor, 1)) + 1
    super().__init__(factor, base=base, rotary_dim=rotary_dim, gain=gain)
    self.original_length, self.slow, self.fast = original_length, slow, fast

  def kept(self, width: int) -> np.ndarray:
    """g, (R/2,) in [0, 1]."""
    raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")

  def frequencies(self, width):
    w, kept = frequencies(width, self.base), self.kept(width)
    return (1 - kept) * w / self.factor + kept * w
