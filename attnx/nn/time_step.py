"""Time steps that a token chooses, and the decay of a state over them."""

from __future__ import annotations

import math

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.nn.position import working_dtype


class TimeStep(nnx.Module):
  """dt = softplus(x + bias) and log a = -exp(log_rate) dt, by head (arXiv:2405.21060).

  At first softplus(bias) is log-uniform between `shortest` and `longest`, and the rate uniform
  between `slowest` and `fastest`. Float32 whatever the dtype of `x` (float64 if it is).

  Args:
    num_heads: N.
    slowest, fastest: bounds of the rate; `slowest` must be positive.
    shortest, longest: bounds of the step.
  """

  def __init__(
    self,
    num_heads: int,
    *,
    slowest: float = 1.0,
    fastest: float = 16.0,
    shortest: float = 1e-3,
    longest: float = 1e-1,
    rngs: nnx.Rngs,
  ):
    uniform = lambda low, high: jax.random.uniform(
      rngs.params(), (num_heads,), minval=low, maxval=high
    )
    step = jnp.exp(uniform(math.log(shortest), math.log(longest)))
    self.bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)))  # the inverse of softplus
    self.log_rate = nnx.Param(jnp.log(uniform(slowest, fastest)))

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, T, N) to steps and log decays, (B, T, N) each."""
    step = jax.nn.softplus(x.astype(working_dtype(x)) + self.bias[...])
    return step, -jnp.exp(self.log_rate[...]) * step
