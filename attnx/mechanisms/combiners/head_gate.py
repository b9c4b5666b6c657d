"""Gated attention: a sigmoid gate on what each head read."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.combiner import Combiner, fits


class HeadGate(Combiner):
  """heads * sigmoid(x W), with W (D, N) for a gate a head or (D, N, V) for one a channel.

  The gate sees the token that asks, so that a head can be silent for it without an attention sink.
  (B, T, N, V) to the same shape and dtype; gates are float32. arXiv:2505.06708.

  Args:
    dim: D.
    num_heads: N.
    head_dim: V, for gates by channel.
    by_channel: a gate for every channel of a head, the paper's strongest form, instead of one.
    rngs: initialises W, without bias.

  Raises:
    ValueError: heads or `x` have another shape, or gates by channel lack a `head_dim`.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    by_channel: bool = False,
    rngs: nnx.Rngs,
  ):
    if by_channel and head_dim is None:
      raise ValueError("by_channel=True needs head_dim, the width of what a head reads")
    shape = (num_heads, head_dim if by_channel else 1)
    init = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    self.kernel = nnx.Param(init(rngs.params(), (dim, *shape), jnp.float32))

  def gates(self, x: jax.Array) -> jax.Array:
    """sigmoid(x W), (B, T, D) to (B, T, N, 1 or V)."""
    return jax.nn.sigmoid(jnp.einsum("btd,dnv->btnv", x, self.kernel[...]))

  def __call__(self, heads, x):
    D, N, V = self.kernel.shape
    fits(heads, x, N, D)
    if V not in (1, heads.shape[3]):
      raise ValueError(f"heads have shape {heads.shape}; expected V={V}: that is head_dim")
    return (heads * self.gates(x)).astype(heads.dtype)


ENTRY = Entry(make=HeadGate, paper="arXiv:2505.06708")
