"""Dynamic convolution: taps that each token predicts for itself."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.taps import TapMixer


class DynamicConv(TapMixer):
  """y_{t,c} = sum_j softmax(U_{head of c} v_t)_j v_{t + j - P, c}, with one U (W, D) a head.

  Around it a gated linear unit, which v comes from, and an output projection; arguments and errors:
  see `TapMixer`. (B, T, D) to (B, T, D) in the dtype of `x`; taps are float32. arXiv:1901.10430.
  """

  def init_taps(self, dim, rngs):
    init = jax.nn.initializers.xavier_uniform(in_axis=0, out_axis=(1, 2))
    shape = (dim, self.num_heads, self.width)
    self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))

  def logits(self, v):
    return jnp.einsum("btd,dnw->btnw", v, self.kernel[...])


ENTRY = Entry(
  make=DynamicConv,
  paper="arXiv:1901.10430",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4, width=3),
  patterns={"causal_self": {}, "noncausal_self": dict(causal=False)},
)
