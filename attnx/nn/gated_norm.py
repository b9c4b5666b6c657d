"""The norm of a head and its gate, which recurrent mixers put between a state and the output."""

from __future__ import annotations

import jax

from attnx.nn.linear import RMSNorm
from attnx.nn.position import working_dtype


class GatedNorm(RMSNorm):
  """g o / sqrt(mean(o^2) + epsilon) * silu(gate), the mean over the channels of a head.

  As in retention (arXiv:2307.08621), gated linear attention (arXiv:2312.06635) and Gated DeltaNet
  (arXiv:2412.06464): the gate comes after the norm. Float32 inside, also between norm and gate. The
  arguments are those of `RMSNorm`: V, `epsilon` and `use_scale`, whether there is a gain g (V,) of
  all heads.
  """

  def __call__(self, heads: jax.Array, gate: jax.Array) -> jax.Array:
    """Heads (B, T, N, V) and gates (B, T, N, V) to (B, T, N, V) in the dtype of the heads."""
    dtype = working_dtype(heads)
    normed = super().__call__(heads.astype(dtype))
    return (normed * jax.nn.silu(gate.astype(dtype))).astype(heads.dtype)
