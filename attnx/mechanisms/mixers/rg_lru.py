"""The recurrent block of Griffin: a real-gated linear recurrent unit beside a gate."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.conv import ShortConv, exists
from attnx.nn.linear import linear
from attnx.nn.mixer import refuse
from attnx.nn.position import working_dtype
from attnx.nn.recurrent import RecurrentMixer
from attnx.recurrence.diagonal import diagonal_scan

SHARPNESS = 8.0  # c of the paper
SLOW, FAST = 0.999, 0.9  # bounds of a where the gate r is 1 / c, at first


class RGLRU(RecurrentMixer):
  """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t) with log a_t = -8 r_t softplus(w).

  The recurrent block of Griffin (arXiv:2402.19427). u = conv(x W_u + b_u), and r = sigmoid(u W_r +
  b_r) and i = sigmoid(u W_i + b_i) have W_r and W_i of N diagonal blocks. Then (h * gelu(x W_y +
  b_y)) W_o + b_o. The first token of a document enters as i_t u_t, since nothing is there to be
  forgotten. At first exp(-softplus(w)) fills the area between the circles of radius 0.9 and 0.999
  evenly, as in the code of the authors. (B, T, D) to (B, T, D) in the dtype of `x`; gates and
  states (B, R) are float32. Documents empty both the state and the convolution.

  Args:
    dim: D.
    rnn_dim: R; None means D, as in the released models. The paper has about 4 D / 3.
    num_heads: N.
    width: taps of the convolution.

  Raises:
    ValueError: `num_heads` does not divide `rnn_dim`.
    NotImplementedError: a `context` is given.
  """

  def __init__(
    self,
    dim: int,
    *,
    rnn_dim: int | None = None,
    num_heads: int = 8,
    width: int = 4,
    rngs: nnx.Rngs,
  ):
    R = dim if rnn_dim is None else rnn_dim
    if num_heads < 1 or R < 1 or R % num_heads:
      raise ValueError(f"num_heads={num_heads} must divide rnn_dim={R}")
    self.gate, self.inputs = (linear(dim, R, use_bias=True, rngs=rngs) for _ in range(2))
    small = jax.nn.initializers.variance_scaling(0.01, "fan_in", "normal")
    self.conv = ShortConv(R, width=width, use_bias=True, kernel_init=small, rngs=rngs)
    self.recurrence_gate, self.input_gate = (
      BlockDiagonal(R, num_heads, rngs=rngs) for _ in range(2)
    )
    self.log_rate = nnx.Param(initial_rate(rngs.params(), R))
    self.out = linear(R, dim, use_bias=True, rngs=rngs)

  def empty(self, batch):
    begun = jnp.zeros((batch, 1), bool)  # whether a token of the document came before
    state = jnp.zeros((batch, self.log_rate.shape[0]))
    return dict(conv=self.conv.init_cache(batch), state=state, begun=begun)

  def run(self, x, past, tokens):
    u, conv = self._convolved(x, past["conv"], tokens)
    h, state = self._recur(u, u, past["state"], past["begun"], tokens)
    y = self.out(h.astype(x.dtype) * jax.nn.gelu(self.gate(x)))
    there = jnp.ones((1, 1), bool) if tokens is None else jnp.asarray(tokens.position)[:, -1:] >= 0
    begun = jnp.broadcast_to(there, past["begun"].shape)
    return y, dict(conv=conv, state=state, begun=begun)

  def values(self, x, *, tokens=None):
    return self._convolved(x, self.conv.init_cache(x.shape[0]), tokens)[0][..., None]

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    past = self.empty(x.shape[0])
    u, _ = self._convolved(x, past["conv"], tokens)
    return self._recur(u, values, None, past["begun"], tokens)[0].astype(values.dtype)

  def look(self, x, tokens):
    u, _ = self._convolved(x, self.conv.init_cache(x.shape[0]), tokens)
    self.sow(nnx.Intermediate, "decays", jnp.exp(self._log_decay(u)))  # (B, T, R)

  def _convolved(self, x, past, tokens):
    """u (B, T, R), and what the convolution remembers after them."""
    u, past = self.conv.step(self.inputs(x), past, tokens=tokens)
    return exists(u, tokens), past  # again, since the convolution has a bias

  def _log_decay(self, u):
    r = jax.nn.sigmoid(self.recurrence_gate(u).astype(working_dtype(u)))
    return -SHARPNESS * r * jax.nn.softplus(self.log_rate[...])

  def _recur(self, u, v, state, begun, tokens):
    """h of values v (B, T, R, ...), with the gates of u (B, T, R), and the state after it."""
    log_decay = self._log_decay(u)
    i = jax.nn.sigmoid(self.input_gate(u).astype(log_decay.dtype))
    first = starts(begun, u.shape[1], tokens)[..., None]
    gain = i * jnp.where(first, 1.0, complement(log_decay))
    wide = lambda x: x.reshape(*x.shape, *[1] * (v.ndim - 3))
    segment = None if tokens is None else tokens.segment
    a, b = wide(jnp.exp(log_decay)), wide(gain) * v
    return diagonal_scan(a, b, state=state, segment=segment)


class BlockDiagonal(nnx.Module):
  """x W + b with W of N diagonal blocks, (B, T, R) to (B, T, R)."""

  def __init__(self, dim: int, num_blocks: int, *, rngs: nnx.Rngs):
    size = dim // num_blocks
    init = jax.nn.initializers.lecun_normal(batch_axis=0)
    self.kernel = nnx.Param(init(rngs.params(), (num_blocks, size, size), jnp.float32))
    self.bias = nnx.Param(jnp.zeros(dim))

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel, bias = (w[...].astype(x.dtype) for w in (self.kernel, self.bias))
    blocks = x.reshape(*x.shape[:-1], kernel.shape[0], -1)
    return jnp.einsum("btni,nij->btnj", blocks, kernel).reshape(x.shape) + bias


def complement(log_decay: jax.Array) -> jax.Array:
  """sqrt(1 - a^2), exact for a near 1, and with a finite slope at 1."""
  lost = -jnp.expm1(2 * log_decay)
  return jnp.sqrt(jnp.maximum(lost, jnp.finfo(lost.dtype).tiny))


def starts(begun: jax.Array, length: int, tokens: Tokens | None) -> jax.Array:
  """Which of T tokens nothing of their document precedes, bool (B, T)."""
  if tokens is None:
    return ~begun & (jnp.arange(length) == 0)
  there, segment = jnp.asarray(tokens.position) >= 0, jnp.asarray(tokens.segment)
  goes_on = there[:, :-1] & (segment[:, 1:] == segment[:, :-1])
  goes_on = jnp.broadcast_to(goes_on, (begun.shape[0], length - 1))
  return there & ~jnp.concatenate([begun, goes_on], axis=1)


def initial_rate(key: jax.Array, dim: int) -> jax.Array:
  """w (R,) with exp(-2 softplus(w)) uniform between 0.9^2 and 0.999^2."""
  square = jax.random.uniform(key, (dim,), minval=FAST**2, maxval=SLOW**2)
  return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))


ENTRY = Entry(
  make=RGLRU,
  paper="arXiv:2402.19427",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(rnn_dim=24, num_heads=4),
  patterns={"causal_self": {}},
)
