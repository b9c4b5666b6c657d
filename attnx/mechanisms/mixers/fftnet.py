"""FFTNet: a filter over frequencies of the sequence that adapts to its mean."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.mixer import Mixer, refuse


class FFTNet(Mixer):
  """y = irfft(modrelu(W rfft(x))), W = base + MLP(mean_t x), for N groups of channels.

  modrelu(z) = relu(|z| + b) z / (|z| + 1e-6). The transform is over tokens and orthonormal; W and b
  are by group and frequency, F = T // 2 + 1 of them, and begin as 1 and 0. Mixing is circular and
  every token sees every other one; the length is part of the parameters. The later versions with a
  local branch or another activation are left out. (B, T, D) to (B, T, D) in the dtype of `x`,
  computed in float32. arXiv:2502.18394.

  Args:
    dim: D.
    length: T.
    num_heads: N, groups of D / N channels that share a filter.
    rngs: initialises the MLP, D to D to N F with a GELU.

  Raises:
    ValueError: `num_heads` does not divide `dim`, or a sequence has another length.
    NotImplementedError: `context` or `tokens` are given: a circle has neither documents nor ends.
  """

  def __init__(self, dim: int, *, length: int, num_heads: int = 8, rngs: nnx.Rngs):
    if num_heads < 1 or dim % num_heads:
      raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
    if length < 1:
      raise ValueError(f"length={length} must be positive")
    self.length, self.shape = length, (num_heads, length // 2 + 1)
    self.base = nnx.Param(jnp.ones(self.shape, jnp.float32))
    self.bias = nnx.Param(jnp.zeros(self.shape, jnp.float32))
    self.hidden = nnx.Linear(dim, dim, rngs=rngs)
    self.adapt = nnx.Linear(dim, self.shape[0] * self.shape[1], rngs=rngs)

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    del key  # nothing drops
    refuse(self, context=context, tokens=tokens, context_tokens=context_tokens)
    B, T, D = x.shape
    if T != self.length:
      raise ValueError(f"got a sequence of {T}; expected length={self.length}, that of the filters")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    spectrum = jnp.fft.rfft(wide.reshape(B, T, self.shape[0], -1), axis=1, norm="ortho")
    gain = jnp.swapaxes(self.filter(wide), 1, 2)[..., None]  # (B, F, N, 1)
    filtered = modrelu(spectrum * gain, self.bias[...].T[..., None])
    y = jnp.fft.irfft(filtered, n=T, axis=1, norm="ortho")
    return y.reshape(B, T, D).astype(x.dtype)

  def filter(self, x: jax.Array) -> jax.Array:
    """W of each row, (B, T, D) to (B, N, F)."""
    change = self.adapt(jax.nn.gelu(self.hidden(x.mean(1)), approximate=False))
    return self.base[...] + change.reshape(-1, *self.shape)


def modrelu(z: jax.Array, bias: jax.Array) -> jax.Array:
  """relu(|z| + bias) z / (|z| + 1e-6): a magnitude below -bias is cut off, the phase is kept."""
  size = jnp.abs(z)
  return jax.nn.relu(size + bias) / (size + 1e-6) * z


ENTRY = Entry(
  make=FFTNet,
  paper="arXiv:2502.18394",
  tiny=dict(length=12, num_heads=4),
  patterns={"noncausal_self": {}},
)
