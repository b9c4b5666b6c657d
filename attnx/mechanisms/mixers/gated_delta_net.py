"""Gated DeltaNet: a memory that fades, and is corrected instead of added to."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.conv import ConvolvedHeads
from attnx.nn.gated_norm import GatedNorm
from attnx.nn.linear import linear, unit
from attnx.nn.mixer import refuse
from attnx.nn.position import working_dtype
from attnx.nn.recurrent import RecurrentMixer
from attnx.nn.time_step import TimeStep
from attnx.recurrence.delta import delta_rule


class GatedDeltaNet(RecurrentMixer):
  """o_t = q_t S_t, S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T (arXiv:2412.06464).

  q, k and v are silu(conv(x W)), q and k of unit length and q over sqrt(H) besides; beta_t =
  sigmoid(x W_b) and log a_t = -exp(A) softplus(x W_a + b) are by head. Then out W_o with out =
  RMSNorm(o) * silu(x W_g) by head. (B, T, D) to (B, T, D) in the dtype of `x`; gates and states
  (B, N, H, V) are float32. Documents empty both the state and the convolutions.

  Args:
    dim: D.
    num_heads: N, heads of values.
    num_key_heads: K, heads of queries and keys, each shared by N / K heads of values; None means N.
    head_dim: H; None means 3 D / (4 K), with which the layer has 6 D^2 parameters.
    value_dim: V; None means 2 K H / N, twice as many values as keys.
    width: taps of the convolutions.
    allow_neg_eigval: beta in (0, 2), so that a key can be reflected (arXiv:2411.12537), rather than
      in (0, 1).

  Raises:
    ValueError: numbers of heads or widths do not divide.
    NotImplementedError: a `context` is given.
  """

  def __init__(
    self,
    dim: int,
    *,
    num_heads: int = 6,
    num_key_heads: int | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    width: int = 4,
    allow_neg_eigval: bool = False,
    rngs: nnx.Rngs,
  ):
    N, K = num_heads, num_heads if num_key_heads is None else num_key_heads
    if K < 1 or N % K:
      raise ValueError(f"num_key_heads={K} must divide num_heads={N}")
    if head_dim is None and 3 * dim % (4 * K):
      raise ValueError(f"3 / 4 of dim={dim} cannot be dealt to {K} key heads; give head_dim")
    H = 3 * dim // (4 * K) if head_dim is None else head_dim
    if value_dim is None and 2 * K * H % N:
      raise ValueError(f"2 * {K} * {H} values cannot be dealt to {N} heads; give value_dim")
    V = 2 * K * H // N if value_dim is None else value_dim
    self.strength = 2.0 if allow_neg_eigval else 1.0
    self.query, self.key, self.value = (
      ConvolvedHeads(dim, heads, width=width, rngs=rngs) for heads in ((K, H), (K, H), (N, V))
    )
    self.beta, self.rate = (linear(dim, N, rngs=rngs) for _ in range(2))
    self.time_step = TimeStep(N, slowest=1e-3, rngs=rngs)  # from 0, where its logarithm is not
    self.gate = linear(dim, (N, V), rngs=rngs)
    self.norm = GatedNorm(V, epsilon=1e-5, rngs=rngs)
    self.out = linear((N, V), dim, rngs=rngs)

  def empty(self, batch):
    convolved = dict(query=self.query, key=self.key, value=self.value)
    past = {name: heads.init_cache(batch) for name, heads in convolved.items()}
    (N, V), (_, H) = self.value.heads, self.key.heads
    return past | dict(state=jnp.zeros((batch, N, H, V)))

  def run(self, x, past, tokens):
    q, query = self.query.step(x, past["query"], tokens=tokens)
    k, key = self.key.step(x, past["key"], tokens=tokens)
    v, value = self.value.step(x, past["value"], tokens=tokens)
    heads, state = self._recur(x, q, k, v, past["state"], tokens)
    y = self.out(self.norm(heads, self.gate(x)))
    return y, dict(query=query, key=key, value=value, state=state)

  def values(self, x, *, tokens=None):
    return self.value(x, tokens=tokens)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    q, k = self.query(x, tokens=tokens), self.key(x, tokens=tokens)
    return self._recur(x, q, k, values, None, tokens)[0]

  def _recur(self, x, q, k, v, state, tokens):
    """Heads (B, T, N, V) and the state after them."""
    beta = self.strength * jax.nn.sigmoid(self.beta(x).astype(working_dtype(x)))
    _, log_decay = self.time_step(self.rate(x))
    q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    segment = None if tokens is None else tokens.segment
    return delta_rule(q, k, v, beta, log_decay, state=state, segment=segment)


ENTRY = Entry(
  make=GatedDeltaNet,
  paper="arXiv:2412.06464",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4, num_key_heads=2, head_dim=6, value_dim=5),
  patterns={"causal_self": {}},
)
