"""Lightweight convolution: a softmax of learned taps, shared by the channels of a head."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.taps import TapMixer


class LightweightConv(TapMixer):
  """y_{t,c} = sum_j softmax(w_{head of c})_j v_{t + j - P, c}, with one w (W,) a head.

  Around it a gated linear unit and an output projection; arguments and errors: see `TapMixer`.
  (B, T, D) to (B, T, D) in the dtype of `x`; taps are float32. arXiv:1901.10430.
  """

  def init_taps(self, dim, rngs):
    del dim
    init = jax.nn.initializers.xavier_uniform(in_axis=1, out_axis=0)  # W inputs, N W outputs
    kernel = init(rngs.params(), (self.num_heads, 1, self.width), jnp.float32)
    self.kernel = nnx.Param(kernel[:, 0])

  def logits(self, v):
    return self.kernel[...][None, None]


ENTRY = Entry(
  make=LightweightConv,
  paper="arXiv:1901.10430",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4, width=3),
  patterns={"causal_self": {}, "noncausal_self": dict(causal=False)},
)
