"""Short causal convolutions, as recurrent mixers put before their queries, keys and values."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.tokens import Tokens
from attnx.nn.linear import linear
from attnx.recurrence.convolution import short_convolution

# As wide as a uniform distribution between -W^-1/2 and W^-1/2.
UNIFORM = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ShortConv(nnx.Module):
  """y_t = sum_{i < W} w_i x_{t - i}, for every channel by itself (arXiv:2302.10866).

  Sums are float32; documents do not see each other, and padding is zero.

  Args:
    dim: D.
    width: W.
    use_bias: adds b, which starts at zero.
    kernel_init: initialises w (W, D).
  """

  def __init__(
    self,
    dim: int,
    *,
    width: int = 4,
    use_bias: bool = False,
    kernel_init: jax.nn.initializers.Initializer = UNIFORM,
    rngs: nnx.Rngs,
  ):
    if width < 1:
      raise ValueError(f"width={width} must be at least 1")
    self.kernel = nnx.Param(kernel_init(rngs.params(), (width, dim), jnp.float32))
    self.bias = nnx.Param(jnp.zeros(dim)) if use_bias else None

  def __call__(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """(B, T, D) to (B, T, D) in the dtype of `x`."""
    return self.convolve(x, None, tokens)[0]

  def init_cache(self, batch: int) -> jax.Array:
    """The last W - 1 inputs (B, W - 1, D), zero before the first of a document."""
    width, dim = self.kernel.shape
    return jnp.zeros((batch, width - 1, dim))

  def step(
    self, x: jax.Array, cache: jax.Array, *, tokens: Tokens | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """The next t inputs (B, t, D); a prompt may be padded on the left.

    The cache belongs to the document of the first token, and the one returned to that of the last;
    `RecurrentCache` empties it where another document begins.
    """
    y, after = self.convolve(x, cache, tokens)
    return y, after.astype(cache.dtype)

  def convolve(
    self, x: jax.Array, past: jax.Array | None, tokens: Tokens | None
  ) -> tuple[jax.Array, jax.Array]:
    segment = None if tokens is None else tokens.segment
    kernel = self.kernel[...]
    y, after = short_convolution(exists(x, tokens), kernel, state=past, segment=segment)
    return y if self.bias is None else y + self.bias[...].astype(y.dtype), after


class ConvolvedHeads(nnx.Module):
  """silu(conv(x W)) in heads, (B, T, D) to (B, T, N, H): queries, keys or values of a recurrence.

  Padding is zero. As the convolutions of Gated DeltaNet (arXiv:2412.06464).

  Args:
    dim: D.
    heads: (N, H).
    width: taps of the convolution.
  """

  def __init__(self, dim: int, heads: tuple[int, int], *, width: int = 4, rngs: nnx.Rngs):
    self.heads = heads
    self.project = linear(dim, heads[0] * heads[1], rngs=rngs)
    self.conv = ShortConv(heads[0] * heads[1], width=width, rngs=rngs)

  def __call__(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    return self.activate(self.conv(self.project(x), tokens=tokens), tokens)

  def init_cache(self, batch: int) -> jax.Array:
    return self.conv.init_cache(batch)

  def step(
    self, x: jax.Array, cache: jax.Array, *, tokens: Tokens | None = None
  ) -> tuple[jax.Array, jax.Array]:
    y, after = self.conv.step(self.project(x), cache, tokens=tokens)
    return self.activate(y, tokens), after

  def activate(self, y: jax.Array, tokens: Tokens | None) -> jax.Array:
    return exists(jax.nn.silu(y), tokens).reshape(*y.shape[:2], *self.heads)


def exists(x: jax.Array, tokens: Tokens | None) -> jax.Array:
  """x (B, T, ...), zero where there is no token."""
  if tokens is None:
    return x
  there = jnp.asarray(tokens.position >= 0)
  return jnp.where(there.reshape(*there.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
