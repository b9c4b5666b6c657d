"""Vector quantisation: vectors to the nearest of a set that follows their averages."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.core import struct


@struct.dataclass
class Codebook:
  """R codewords a head: sums of the vectors that were nearest to each, and how many they were.

  It is learned by moving averages (arXiv:1711.00937) of the sums that `of` makes of a batch.
  Vectors learn through their codewords, straight through, and by a commitment loss that pulls
  them there.

  Attributes:
    sum: (K, R, H).
    count: (K, R).
  """

  sum: jax.Array
  count: jax.Array

  def codewords(self) -> jax.Array:
    """sum / max(count, 0.01), (K, R, H); a constant to whoever differentiates."""
    return jax.lax.stop_gradient(self.sum / jnp.maximum(self.count, 0.01)[..., None])

  def nearest(self, x: jax.Array) -> jax.Array:
    """argmin_r |x - codeword_r|^2, (B, S, K, H) to int32 (B, S, K)."""
    words, x = self.codewords(), jax.lax.stop_gradient(x)
    products = jnp.einsum("bskh,krh->bskr", x, words, precision="highest")
    return jnp.argmin((words**2).sum(-1) - 2 * products, axis=-1).astype(jnp.int32)

  def quantise(self, x: jax.Array, code: jax.Array) -> jax.Array:
    """The codewords of vectors (B, S, K, H), with the gradient of the vectors themselves."""
    word = self.codewords()[jnp.arange(x.shape[2]), code].astype(x.dtype)
    return word + (x - jax.lax.stop_gradient(x))

  def commitment(self, x: jax.Array, there: jax.Array) -> jax.Array:
    """The mean over tokens that are there, (B, S), of |x - codeword|^2 summed over heads."""
    word = jax.lax.stop_gradient(self.quantise(x, self.nearest(x)))
    return jnp.sum(there * ((x - word) ** 2).sum((2, 3))) / jnp.maximum(there.sum(), 1)

  def of(self, x: jax.Array, there: jax.Array) -> Codebook:
    """Sums and counts of the vectors (B, S, K, H) nearest to each codeword, of those there."""
    at = (jnp.arange(x.shape[2]), self.nearest(x))
    weight = jnp.broadcast_to(there[..., None], x.shape[:3]).astype(self.sum.dtype)
    x = jax.lax.stop_gradient(x) * weight[..., None]
    return Codebook(
      sum=jnp.zeros_like(self.sum).at[at].add(x.astype(self.sum.dtype)),
      count=jnp.zeros_like(self.count).at[at].add(weight),
    )
