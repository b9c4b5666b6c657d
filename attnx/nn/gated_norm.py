"""The norm of a head and its gate, which recurrent mixers put between a state and the output."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.nn.linear import RMSNorm
from attnx.nn.position import working_dtype


class GatedNorm(nnx.Module):
  """g o / sqrt(mean(o^2) + epsilon) * silu(gate), the mean over the channels of a head.

  As in retention (arXiv:2307.08621), gated linear attention (arXiv:2312.06635) and Gated DeltaNet
  (arXiv:2412.06464): the gate comes after the norm. Float32 inside, also between norm and gate.

  Args:
    width: V.
    epsilon: added to the mean; with 0 the size of a head does not matter at all.
    use_scale: whether there is a gain g (V,), which starts at one and which all heads share.
  """

  def __init__(
    self, width: int, *, epsilon: float = 1e-5, use_scale: bool = True, rngs: nnx.Rngs
  ):
    self.norm = RMSNorm(width, epsilon=epsilon, use_scale=use_scale, rngs=rngs)

  def __call__(self, heads: jax.Array, gate: jax.Array) -> jax.Array:
    """Heads (B, T, N, V) and gates (B, T, N, V) to (B, T, N, V) in the dtype of the heads."""
    dtype = jnp.promote_types(working_dtype(heads), working_dtype(gate))
    return (self.norm(heads.astype(dtype)) * jax.nn.silu(gate.astype(dtype))).astype(heads.dtype)
