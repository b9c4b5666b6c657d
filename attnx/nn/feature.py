"""Feature maps: what linear attention compares instead of queries and keys."""

from __future__ import annotations

from flax import nnx
import jax


class Feature(nnx.Module):
  """phi_q and phi_k such that phi_q(q) . phi_k(k) is the weight of a pair before normalisation.

  Each token is mapped alone, so that every entry serves causal attention and decoding. Features are
  float32 at least, as scores and recurrent states are. A query's features may carry a positive
  factor of their own, which normalising cancels; a key's may not. Facts:

    nonnegative: no feature is below zero, and so no weight is.
    exponential: phi_q(q) . phi_k(k) estimates exp(q . k / sqrt(H)) without bias, up to the factor
      of the query.
  """

  def query(self, x: jax.Array) -> jax.Array:
    """Features of scaled or unscaled queries, (B, T, N, H) to (B, T, N, M)."""
    raise NotImplementedError

  def key(self, x: jax.Array) -> jax.Array:
    """Features of keys, (B, S, K, H) to (B, S, K, M)."""
    raise NotImplementedError

  def width(self, head_dim: int) -> int:
    """M, for heads of width H."""
    raise NotImplementedError
