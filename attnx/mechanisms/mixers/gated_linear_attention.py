"""Gated linear attention: every channel of a key is forgotten at its own, chosen rate."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.conv import exists
from attnx.nn.gated_norm import GatedNorm
from attnx.nn.linear import linear
from attnx.nn.mixer import refuse
from attnx.nn.position import working_dtype
from attnx.nn.recurrent import RecurrentMixer
from attnx.recurrence.linear import linear_attention


class GatedLinearAttention(RecurrentMixer):
  """o_t = q_t S_t with S_t = diag(a_t) S_{t-1} + k_t v_t^T (arXiv:2312.06635).

  log a_t = logsigmoid(x_t W_1 W_2 + b) / temperature, with W_1 W_2 of low rank; q is over sqrt(H).
  Then out W_o with out = RMSNorm(o) * silu(x W_g) by head. (B, T, D) to (B, T, D) in the dtype of
  `x`; decays and states (B, N, H, V) are float32. Documents empty the state.

  Args:
    dim: D.
    num_heads: N.
    expand_key, expand_value: widths of all keys and of all values over D.
    gate_rank: rank of the map that gates come from.
    temperature: what log gates are divided by; 16 keeps a decay of 0.958 where the gate is 1/2.
    chunk: tokens handled at once; any number gives the same.

  Raises:
    ValueError: `num_heads` does not divide a width, or a number is not positive.
    NotImplementedError: a `context` is given.
  """

  def __init__(
    self,
    dim: int,
    *,
    num_heads: int = 4,
    expand_key: float = 0.5,
    expand_value: float = 1.0,
    gate_rank: int = 16,
    temperature: float = 16.0,
    chunk: int = 64,
    rngs: nnx.Rngs,
  ):
    N, keys, values = num_heads, int(expand_key * dim), int(expand_value * dim)
    if N < 1 or min(keys, values) < 1 or keys % N or values % N:
      raise ValueError(f"num_heads={N} must divide {keys} channels of keys and {values} of values")
    if gate_rank < 1 or temperature <= 0:
      raise ValueError(f"gate_rank={gate_rank} and temperature={temperature} must be positive")
    self.temperature, self.chunk = temperature, chunk
    self.shape = (N, keys // N, values // N)
    init = jax.nn.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
    make = lambda outputs, **options: linear(dim, outputs, kernel_init=init, rngs=rngs, **options)
    self.query, self.key = make((N, keys // N)), make((N, keys // N))
    self.value, self.gate = make((N, values // N)), make((N, values // N))
    self.narrow = make(gate_rank)
    self.decay = linear(gate_rank, (N, keys // N), use_bias=True, kernel_init=init, rngs=rngs)
    self.norm = GatedNorm(values // N, epsilon=1e-5, rngs=rngs)
    self.out = linear((N, values // N), dim, kernel_init=init, rngs=rngs)

  def empty(self, batch):
    return jnp.zeros((batch, *self.shape))

  def run(self, x, past, tokens):
    heads, state = self._recur(x, self.values(x), past, tokens)
    return self.out(self.norm(heads, self.gate(x))), state

  def values(self, x, *, tokens=None):
    return self.value(x)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    return self._recur(x, values, None, tokens)[0]

  def log_decay(self, x: jax.Array) -> jax.Array:
    """log a, (B, T, D) to (B, T, N, H), float32 at least."""
    gate = self.decay(self.narrow(x)).astype(working_dtype(x))
    return jax.nn.log_sigmoid(gate) / self.temperature

  def _recur(self, x, v, state, tokens):
    """Heads (B, T, N, V) and the state after them."""
    q, k = self.query(x) * self.shape[1] ** -0.5, exists(self.key(x), tokens)
    segment = None if tokens is None else tokens.segment
    return linear_attention(
      q, k, v, self.log_decay(x), state=state, segment=segment, chunk=self.chunk
    )


ENTRY = Entry(
  make=GatedLinearAttention,
  paper="arXiv:2312.06635",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4, gate_rank=3),
  patterns={"causal_self": {}},
)
