"""Linear maps and norms that compute in the dtype they are given; their parameters are float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp


def like_first(arrays: Any, *, dtype: Any = None, **_: Any) -> Any:
  """All arrays in the dtype of the first: a bfloat16 input keeps a product in bfloat16."""
  del dtype
  return [None if x is None else x.astype(arrays[0].dtype) for x in arrays]


def linear(
  inputs: int | Sequence[int],
  outputs: int | Sequence[int],
  *,
  use_bias: bool = False,
  rngs: nnx.Rngs,
  **options: Any,
) -> nnx.LinearGeneral:
  """x W + b over the last axes of x, in the dtype of x.

  Args:
    inputs: size of the last axis, or sizes of the last axes: (N, V) takes heads together.
    outputs: size or sizes of what they become: (N, H) makes heads.
    use_bias: whether there is a b; it starts at zero.
    options: of `nnx.LinearGeneral`, e.g. kernel_init.
  """
  count = 1 if isinstance(inputs, int) else len(inputs)
  options = dict[str, Any](axis=tuple(range(-count, 0)), promote_dtype=like_first) | options
  return nnx.LinearGeneral(inputs, outputs, use_bias=use_bias, rngs=rngs, **options)


class RMSNorm(nnx.RMSNorm):
  """g x / sqrt(mean(x^2) + epsilon) over the last axis: float32 inside, out in the dtype of x."""

  def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
    return super().__call__(x, **options).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
  """g (x - mean(x)) / sqrt(var(x) + epsilon) + b: float32 inside, out in the dtype of x."""

  def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
    return super().__call__(x, **options).astype(x.dtype)


def unit(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """x / sqrt(sum(x^2) + epsilon) over the last axis: float32 inside, out in the dtype of x."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  size = jnp.sum(wide * wide, axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(size + epsilon)).astype(x.dtype)
