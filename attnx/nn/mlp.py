"""The part of a block that works on each token alone."""

from __future__ import annotations

from typing import Any

from flax import nnx
import jax

from attnx.nn.linear import linear


class MLP(nnx.Module):
  """out(silu(gate x) * up x) (arXiv:2002.05202).

  Args:
    dim: D.
    expand: width of the inside over D.
    use_bias: whether the three maps have biases.
  """

  def __init__(
    self, dim: int, *, expand: float = 8 / 3, use_bias: bool = False, rngs: nnx.Rngs
  ):
    if (width := int(expand * dim)) < 1:
      raise ValueError(f"expand={expand} leaves no width for dim={dim}")
    kinds: Any = dict(use_bias=use_bias, rngs=rngs)
    self.gate, self.up = linear(dim, width, **kinds), linear(dim, width, **kinds)
    self.out = linear(width, dim, **kinds)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.out(jax.nn.silu(self.gate(x)) * self.up(x))
