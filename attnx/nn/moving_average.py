"""Exponential moving averages: several a channel, damped, and mixed by learned weights."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.tokens import Tokens
from attnx.nn.conv import exists
from attnx.nn.position import working_dtype
from attnx.recurrence.convolution import (
  exponential_convolution, exponential_kernel, long_convolution,
)  # fmt: skip


class MovingAverage(nnx.Module):
  """silu(sum_r c_r h_tr + omega x_t), h_t = (1 - a d) h_{t-1} + a beta x_t (arXiv:2209.10655).

  Every channel has R states; a = sigmoid(alpha) is the weight of the new, d = sigmoid(delta) damps
  what it takes from the old, and c = gamma / sqrt(R). (B, T, D) to (B, T, D) in the dtype of `x`,
  computed in float32: by FFT, or in chunks where `tokens` pack documents. Padding is zero.

  Args:
    dim: D.
    size: R.
    both: adds averages of the reversed sequence, with parameters of their own. Both see the token
      itself; later code of the authors leaves it out of the second.
  """

  def __init__(self, dim: int, size: int, *, both: bool, rngs: nnx.Rngs):
    if size < 1:
      raise ValueError(f"size={size} must be at least 1")
    shape = (2 if both else 1, dim, size)
    normal = lambda *shape: jax.random.normal(rngs.params(), shape)
    self.alpha, self.delta = (nnx.Param(0.2 * normal(*shape)) for _ in range(2))
    self.beta = nnx.Param(0.02 * normal(*shape) + (-1.0) ** jnp.arange(size))
    self.gamma, self.omega = nnx.Param(normal(*shape)), nnx.Param(normal(dim))

  def modes(self) -> tuple[jax.Array, jax.Array]:
    """Log decays and coefficients of the exponentials, (directions, D, R)."""
    alpha, delta, log = self.alpha[...], self.delta[...], jax.nn.log_sigmoid
    log_decay = jnp.logaddexp(log(-alpha), log(alpha) + log(-delta))  # log(1 - a d), never -inf
    c = self.gamma[...] * self.beta[...] * jax.nn.sigmoid(alpha) * alpha.shape[-1] ** -0.5
    return log_decay, c

  def __call__(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    wide = exists(x.astype(working_dtype(x)), tokens)
    y = jnp.zeros_like(wide)
    for modes, order in zip(zip(*self.modes()), (slice(None), slice(None, None, -1))):
      if tokens is None:
        kernel = exponential_kernel(*modes, x.shape[1])
        average = long_convolution(wide[:, order], kernel)
      else:
        segment = jnp.asarray(tokens.segment)[:, order]
        average, _ = exponential_convolution(wide[:, order], *modes, segment=segment)
      y += average[:, order]
    return self._finish(y, wide).astype(x.dtype)

  def init_cache(self, batch: int) -> jax.Array:
    """The states of no tokens, (B, D, R)."""
    return jnp.zeros((batch, *self.gamma.shape[1:]))

  def step(
    self, x: jax.Array, state: jax.Array, *, tokens: Tokens
  ) -> tuple[jax.Array, jax.Array]:
    """The next t inputs (B, t, D); the state is of the document of the first."""
    wide = exists(x.astype(working_dtype(x)), tokens)
    (modes,) = zip(*self.modes())
    y, state = exponential_convolution(wide, *modes, state=state, segment=tokens.segment)
    return self._finish(y, wide).astype(x.dtype), state

  def _finish(self, y, x):
    return jax.nn.silu(y + self.omega[...] * x)
