"""Hedgehog: a small trained layer of each head that learns to be as spiky as softmax."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.feature import Feature
from attnx.nn.position import working_dtype


class Hedgehog(Feature):
  """phi(x) = [softmax(W x + b), softmax(-W x - b)], softmax over features.

  Queries and keys have layers of their own, one a head, which begin as the identity. The features
  of a token sum to 2. The paper trains them to give the weights of a softmax attention; that is a
  loss, and not here. (B, T, N, H) to (B, T, N, 2 F) in float32. arXiv:2402.04347.

  Args:
    head_dim: H.
    num_heads: N.
    num_kv_heads: K; None means N.
    num_features: F, half the width; None means H.
  """

  def __init__(
    self,
    head_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    num_features: int | None = None,
  ):
    F = head_dim if num_features is None else num_features
    K = num_heads if num_kv_heads is None else num_kv_heads
    identity = lambda heads: nnx.Param(jnp.tile(jnp.eye(head_dim, F), (heads, 1, 1)))
    self.query_kernel, self.query_bias = identity(num_heads), nnx.Param(jnp.zeros((num_heads, F)))
    self.key_kernel, self.key_bias = identity(K), nnx.Param(jnp.zeros((K, F)))

  def query(self, x):
    return self._phi(x, self.query_kernel[...], self.query_bias[...])

  def key(self, x):
    return self._phi(x, self.key_kernel[...], self.key_bias[...])

  def width(self, head_dim):
    del head_dim
    return 2 * self.query_bias.shape[-1]

  def _phi(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    if x.shape[-2] != kernel.shape[0]:
      raise ValueError(
        f"got {x.shape[-2]} heads; expected {kernel.shape[0]}: pass num_heads and num_kv_heads"
      )
    dtype = working_dtype(x)
    y = jnp.einsum("btnh,nhf->btnf", x.astype(dtype), kernel.astype(dtype)) + bias.astype(dtype)
    return jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], axis=-1)


ENTRY = Entry(make=Hedgehog, paper="arXiv:2402.04347", facts={"nonnegative"})
