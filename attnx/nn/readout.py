"""Token ids in, logits out."""

from __future__ import annotations

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.nn.linear import like_first, linear
from attnx.nn.position import Position


class Vocabulary(nnx.Module):
  """Embeds ids as rows of E (V, D), and reads logits x E^T, or x W if they are not tied.

  Args:
    vocab: V.
    dim: D.
    position: entry of `positions` that adds to embeddings; None for none.
    tied: whether the readout is the transpose of the embedding (arXiv:1608.05859).
    soft_cap: logits become cap * tanh(logits / cap) (arXiv:2408.00118); None for none.
    dtype: that blocks compute in; parameters and logits are float32.
  """

  def __init__(
    self,
    vocab: int,
    dim: int,
    *,
    position: Any = None,
    tied: bool = True,
    soft_cap: float | None = None,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    if vocab < 1 or dim < 1:
      raise ValueError(f"vocab={vocab} and dim={dim} must be at least 1")
    if soft_cap is not None and soft_cap <= 0:
      raise ValueError(f"soft_cap={soft_cap} must be above 0, or None")
    self.soft_cap, self.dtype = soft_cap, jnp.dtype(dtype)
    self.embed = nnx.Embed(vocab, dim, promote_dtype=like_first, rngs=rngs)
    self.position = (
      Position() if position is None else registry.build("positions", position, dim=dim, rngs=rngs)
    )
    self.readout = None if tied else linear(dim, vocab, rngs=rngs)

  def __call__(self, ids: jax.Array, tokens: Tokens) -> jax.Array:
    """(B, T) integers to (B, T, D)."""
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim != 2:
      raise TypeError(f"ids are {ids.dtype}{list(ids.shape)}; expected integers (B, T)")
    return self.position.embed(self.embed(ids).astype(self.dtype), tokens.position)

  def logits(self, x: jax.Array) -> jax.Array:
    """(B, T, D) to (B, T, V), float32."""
    y = self.embed.attend(x) if self.readout is None else self.readout(x)
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    return y if self.soft_cap is None else self.soft_cap * jnp.tanh(y / self.soft_cap)
