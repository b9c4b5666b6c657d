"""Positions: how queries, keys and embeddings come to know where they stand."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp


class Position(nnx.Module):
  """Three places at which an entry may write positions in; by default each returns its `x`.

  `position` is an integer array (#B, T); negative means that no token is there, and gives something
  finite that nobody will look at. Shapes and dtypes are kept; angles and tables are float32 at
  least, since a bfloat16 cannot count beyond 256. Facts that the contract holds an entry to:

    relative: q k^T of `query` and `key` depends on differences of positions alone.
    identity_at_zero: at position 0 `query` and `key` return `x` itself.
    keeps_norm: `query` and `key` keep the norm of every vector.
    additive: `embed` is the place; `query` and `key` return their `x`.
  """

  def query(self, x: jax.Array, position: jax.Array) -> jax.Array:
    """What keys are compared with, (B, T, N, H) to (B, T, N, H)."""
    del position
    return x

  def key(self, x: jax.Array, position: jax.Array) -> jax.Array:
    """What queries are compared with, and what is cached, (B, S, K, H) to (B, S, K, H)."""
    del position
    return x

  def embed(self, x: jax.Array, position: jax.Array) -> jax.Array:
    """Embeddings on their way into the first block, (B, T, D) to (B, T, D)."""
    del position
    return x


def working_dtype(x: jax.Array) -> jnp.dtype:
  """float32, or float64 where `x` is."""
  return jax.dtypes.canonicalize_dtype(jnp.promote_types(x.dtype, jnp.float32))
