"""Short causal convolutions, as recurrent mixers put before their queries, keys and values."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.tokens import Tokens


class ShortConv(nnx.Module):
  """y_t = sum_{i < W} w_i x_{t - i}, for every channel by itself (arXiv:2302.10866).

  Args:
    dim: D.
    width: W.
    use_bias: adds b.
  """

  def __init__(self, dim: int, *, width: int = 4, use_bias: bool = False, rngs: nnx.Rngs):
    if width < 1:
      raise ValueError(f"width={width} must be at least 1")
    bound = width**-0.5
    kernel = jax.random.uniform(rngs.params(), (width, dim), minval=-bound, maxval=bound)
    self.kernel = nnx.Param(kernel)
    self.bias = nnx.Param(jnp.zeros(dim)) if use_bias else None

  def __call__(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """(B, T, D) to (B, T, D); documents do not see each other, padding is zero."""
    x, past = exists(x, tokens), jnp.zeros_like(x[:, : self.kernel.shape[0] - 1])
    if tokens is None:
      return self.convolve(x, past)
    segment = jnp.broadcast_to(tokens.segment, x.shape[:2])
    y = jnp.zeros_like(x)
    for i, w in enumerate(self.kernel[...].astype(x.dtype)):
      shift = lambda a, fill: jnp.pad(
        a, [(0, 0), (i, 0)] + [(0, 0)] * (a.ndim - 2), constant_values=fill
      )[:, : a.shape[1]]
      y += w * shift(x, 0) * (shift(segment, -1) == segment)[..., None]
    return self.biased(y)

  def init_cache(self, batch: int) -> jax.Array:
    """The last W - 1 inputs (B, W - 1, D), zero before the first."""
    width, dim = self.kernel.shape
    return jnp.zeros((batch, width - 1, dim))

  def step(
    self, x: jax.Array, cache: jax.Array, *, tokens: Tokens | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """The next t inputs (B, t, D); a prompt may be padded on the left."""
    x = exists(x, tokens)
    after = jnp.concatenate([cache, x.astype(cache.dtype)], axis=1)
    return self.convolve(x, cache.astype(x.dtype)), after[:, x.shape[1] :]

  def convolve(self, x: jax.Array, past: jax.Array) -> jax.Array:
    (width, _), count = self.kernel.shape, x.shape[1]
    past = jnp.pad(past, ((0, 0), (width - 1 - past.shape[1], 0), (0, 0)))
    joined = jnp.concatenate([past, x], axis=1)
    kernel = self.kernel[...].astype(x.dtype)
    return self.biased(
      sum(kernel[i] * joined[:, width - 1 - i :][:, :count] for i in range(width))
    )

  def biased(self, y: jax.Array) -> jax.Array:
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def exists(x: jax.Array, tokens: Tokens | None) -> jax.Array:
  """x (B, T, ...), zero where there is no token."""
  if tokens is None:
    return x
  there = jnp.asarray(tokens.position >= 0)
  return jnp.where(there.reshape(*there.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
