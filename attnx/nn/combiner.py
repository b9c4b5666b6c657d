"""Combiners: what happens to heads between attention and the output projection."""

from __future__ import annotations

from flax import nnx
import jax

from attnx.core.tokens import Tokens


class Combiner(nnx.Module):
  """Weighs or gates heads, each token by itself, so that decoding needs nothing more. Facts:

    identity: returns the heads themselves as it is initialised.
    balanced: has a `balance_loss`, which training adds.
  """

  def __call__(self, heads: jax.Array, x: jax.Array) -> jax.Array:
    """Heads (B, T, N, V) to heads of the same shape and dtype, seeing the input x (B, T, D)."""
    raise NotImplementedError

  def aside(self, x: jax.Array, tokens: Tokens | None) -> None:
    """Sows what training adds to the loss for tokens x (B, T, D); nothing here."""

  def balance_loss(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """A scalar that keeps a router from forgetting heads; tokens at negative positions are out."""
    del x, tokens
    raise NotImplementedError(f"{type(self).__name__} routes nothing that could be out of balance")


def fits(heads: jax.Array, x: jax.Array, num_heads: int, dim: int | None = None) -> None:
  """Raises ValueError unless heads are (B, T, N, V) and x is (B, T, D)."""
  if heads.ndim != 4 or heads.shape[2] != num_heads:
    raise ValueError(f"heads have shape {heads.shape}; expected (B, T, {num_heads}, V)")
  if x.shape[:2] != heads.shape[:2] or x.ndim != 3 or (dim is not None and x.shape[2] != dim):
    width = "D" if dim is None else dim
    raise ValueError(f"x has shape {x.shape}; expected (*{heads.shape[:2]}, {width}) beside heads")
