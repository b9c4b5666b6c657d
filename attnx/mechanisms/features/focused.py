"""Focused linear attention: features pulled towards their largest channels."""

from __future__ import annotations

from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.feature import Feature
from attnx.nn.position import working_dtype


class Focused(Feature):
  """phi(x) = |y| y^p / |y^p| with y = (relu(x) + 1e-6) / softplus(scale); powers by channel.

  The map keeps the norm of y and turns it towards its largest channels. It is homogeneous, so that
  it is computed on y over its maximum, and neither small nor large inputs leave float32. What the
  paper adds around it, a position for keys and a depthwise convolution of values, belongs to a
  block. (B, T, N, H) to (B, T, N, H) in float32. arXiv:2308.00442.

  Args:
    head_dim: H.
    num_heads: N.
    num_kv_heads: K; None means N. Queries share the scale of their key head.
    power: p.
    norm_axis: "full" takes norms over all heads of a token, as the released code does; "head" over
      each head.
  """

  def __init__(
    self,
    head_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    power: float = 3.0,
    norm_axis: Literal["full", "head"] = "full",
  ):
    if norm_axis not in ("full", "head"):
      raise ValueError(f"norm_axis={norm_axis!r} is neither 'full' nor 'head'")
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % num_kv_heads:
      raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    self.scale = nnx.Param(jnp.zeros((num_kv_heads, head_dim), jnp.float32))
    self.power, self.axes = power, (-2, -1) if norm_axis == "full" else (-1,)

  def query(self, x):
    return self._phi(x)

  def key(self, x):
    return self._phi(x)

  def width(self, head_dim):
    return head_dim

  def _phi(self, x: jax.Array) -> jax.Array:
    (K, _), heads = self.scale.shape, x.shape[-2]
    if heads % K:
      raise ValueError(f"got {heads} heads; expected a multiple of num_kv_heads={K}")
    scale = jnp.repeat(jax.nn.softplus(self.scale[...]), heads // K, axis=0)
    y = (jax.nn.relu(x.astype(working_dtype(x))) + 1e-6) / scale
    unit = jax.lax.stop_gradient(y.max(self.axes, keepdims=True))  # any constant gives the same
    y = y / unit
    powers = y**self.power
    norm = lambda z: jnp.linalg.norm(z, axis=self.axes, keepdims=True)
    return unit * norm(y) * powers / norm(powers)


ENTRY = Entry(make=Focused, paper="arXiv:2308.00442", facts={"nonnegative"})
