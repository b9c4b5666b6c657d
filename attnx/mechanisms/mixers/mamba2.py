"""Mamba-2: a state space whose decay is one number a head and token."""

from __future__ import annotations

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.conv import ShortConv, exists
from attnx.nn.linear import RMSNorm, linear
from attnx.nn.mixer import refuse
from attnx.nn.recurrent import RecurrentMixer
from attnx.nn.time_step import TimeStep
from attnx.recurrence.linear import linear_attention


class Inputs(NamedTuple):
  """What a token says: z and x (B, T, N, V), B and C (B, T, G, H), dt (B, T, N)."""

  z: jax.Array
  x: jax.Array
  B: jax.Array
  C: jax.Array
  dt: jax.Array


class Mamba2(RecurrentMixer):
  """y_t = C_t S_t + D x_t, S_t = exp(-exp(A) dt_t) S_{t-1} + dt_t B_t x_t^T (arXiv:2405.21060).

  One projection gives z, x, B, C and dt; x, B and C go through a convolution and silu, dt through
  softplus(dt + bias). Then out W_o with out = RMSNorm(y * silu(z)), the mean over the heads of a
  group. B is a key and C a query; the matrix that is mixed with holds dt and the skip D, and x are
  the values. (B, T, D) to (B, T, D) in the dtype of `x`; decays and states (B, N, H, V) are
  float32. Documents empty both the state and the convolution.

  Args:
    dim: D.
    expand: width of x over D.
    head_dim: V; there are N = expand D / V heads.
    state_dim: H.
    num_groups: G; N / G heads share B and C.
    width: taps of the convolution.

  Raises:
    ValueError: `head_dim` does not divide the width of x, or `num_groups` the number of heads.
    NotImplementedError: a `context` is given.
  """

  def __init__(
    self,
    dim: int,
    *,
    expand: int = 2,
    head_dim: int = 64,
    state_dim: int = 128,
    num_groups: int = 1,
    width: int = 4,
    rngs: nnx.Rngs,
  ):
    inner = expand * dim
    if head_dim < 1 or inner < 1 or inner % head_dim:
      raise ValueError(f"head_dim={head_dim} must divide {inner}, which is expand={expand} times D")
    N, V, G, H = inner // head_dim, head_dim, num_groups, state_dim
    if G < 1 or N % G:
      raise ValueError(f"num_groups={G} must divide the {N} heads")
    self.heads, self.keys = (N, V), (G, H)
    self.project = linear(dim, 2 * inner + 2 * G * H + N, rngs=rngs)
    self.conv = ShortConv(inner + 2 * G * H, width=width, use_bias=True, rngs=rngs)
    self.time_step = TimeStep(N, rngs=rngs)
    self.skip = nnx.Param(jnp.ones(N))
    self.norm = RMSNorm(inner // G, epsilon=1e-5, use_scale=False, rngs=rngs)
    self.gain = nnx.Param(jnp.ones(inner))
    self.out = linear(inner, dim, rngs=rngs)

  def empty(self, batch):
    (N, V), (_, H) = self.heads, self.keys
    return dict(conv=self.conv.init_cache(batch), state=jnp.zeros((batch, N, H, V)))

  def run(self, x, past, tokens):
    inputs, conv = self._inputs(x, past["conv"], tokens)
    y, state = self._recur(inputs, inputs.x, past["state"], tokens)
    y = y * jax.nn.silu(inputs.z)
    y = self.norm(y.reshape(*x.shape[:2], self.keys[0], -1)).reshape(*x.shape[:2], -1)
    return self.out(y * self.gain[...].astype(y.dtype)), dict(conv=conv, state=state)

  def values(self, x, *, tokens=None):
    return self._inputs(x, self.conv.init_cache(x.shape[0]), tokens)[0].x

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    inputs, _ = self._inputs(x, self.conv.init_cache(x.shape[0]), tokens)
    return self._recur(inputs, values, None, tokens)[0]

  def _inputs(self, x, past, tokens):
    """The inputs of tokens (B, T, D), and what the convolution remembers after them."""
    (N, V), (G, H) = self.heads, self.keys
    z, xBC, dt = jnp.split(self.project(x), [N * V, 2 * (N * V + G * H)], axis=-1)
    xBC, past = self.conv.step(xBC, past, tokens=tokens)
    xBC = exists(jax.nn.silu(xBC), tokens)  # again, since the convolution has a bias
    x, B, C = jnp.split(xBC, [N * V, N * V + G * H], axis=-1)
    heads = lambda y, shape: y.reshape(*y.shape[:2], *shape)
    z, x, B, C = (heads(y, s) for y, s in zip((z, x, B, C), (*2 * [(N, V)], *2 * [(G, H)])))
    return Inputs(z=z, x=x, B=B, C=C, dt=dt), past

  def _recur(self, inputs, v, state, tokens):
    """Heads (B, T, N, V) and the state after them."""
    dt, log_decay = self.time_step(inputs.dt)
    written = (dt[..., None] * v).astype(v.dtype)
    segment = None if tokens is None else tokens.segment
    y, state = linear_attention(
      inputs.C, inputs.B, written, log_decay[..., None], state=state, segment=segment
    )
    return y + self.skip[...][:, None].astype(v.dtype) * v, state


ENTRY = Entry(
  make=Mamba2,
  paper="arXiv:2405.21060",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(head_dim=8, state_dim=6, num_groups=2),
  patterns={"causal_self": {}},
)
