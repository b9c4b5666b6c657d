"""Mega: one head of gated attention whose queries, keys and gates are moving averages."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.attention import AttentionSpec, attend, attend_partial, reference
from attnx.attention.masks import Causal, Everything, Mask
from attnx.attention.normalisers import Softmax
from attnx.core import registry, struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.attention import dropping, trained, value_of
from attnx.nn.kv_cache import KVCache
from attnx.nn.linear import LayerNorm, linear
from attnx.nn.mixer import Mixer, observed, refuse
from attnx.nn.moving_average import MovingAverage
from attnx.nn.recurrent import RecurrentCache

SMALL = jax.nn.initializers.normal(0.02)


@struct.dataclass
class Memory:
  """The averages so far, (B, D, R), and the keys and values of the past or of the current chunk."""

  averages: RecurrentCache
  pairs: KVCache


class Mega(Mixer):
  """u * (h - x), h = silu(e W_h + (r * A v) W_o), e the moving averages of x (arXiv:2209.10655).

  z = silu(e W_z), q = z * g_0 + b_0, k = z * g_1 + b_1, A = softmax(q k^T / sqrt(H) + bias) or f(q
  k^T / n + bias), n the number of keys that a query sees; v = silu(x W_v), r = silu(e W_r) and u =
  sigmoid(e W_u). For e see `MovingAverage`. A residual connection then gives u h + (1 - u) x. The
  wiring "post" of a block makes the paper's layer with its norm at the end; with "pre", the x that
  u closes on is the normed one. (B, T, D) to (B, T, D) in the dtype of `x`; averages (B, D, R) and
  scores are float32. Documents empty the averages and do not see each other. `mix` is A alone: the
  averages that its queries, keys and gates see are not in its matrix. O(T^2), or O(T chunk).

  The gated cross attention of the paper and its squared ReLU, which is not divided by n again as
  the normaliser `relu` is, are left out.

  Args:
    dim: D.
    key_dim: H, the width of z.
    value_dim: V; None means 2 D.
    state_dim: R, averages for each channel.
    causal: whether tokens see what is before them, else averages run in both directions.
    chunk: attend within chunks of so many positions, which the averages alone cross; None for all.
    normaliser: entry of `normalisers`; "laplace" is the paper's other one.
    scale_by_count: divide q k^T by n rather than sqrt(H); None: unless the normaliser is softmax.
    bias: entry of `transforms`: "rotary_bias" or "relative_bias" of the paper; None for none.
    prenorm: normalise x, but for the x that u closes on: the paper's layer with its norm before,
      for a wiring that has none there.
    dropout: rate at which weights are dropped when a `key` is given.

  Raises:
    NotImplementedError: a `context` is given, or `step` is called and `causal` is not set.
  """

  def __init__(
    self,
    dim: int,
    *,
    key_dim: int = 128,
    value_dim: int | None = None,
    state_dim: int = 16,
    causal: bool = True,
    chunk: int | None = None,
    normaliser: Any = "softmax",
    scale_by_count: bool | None = None,
    bias: Any = "rotary_bias",
    prenorm: bool = False,
    dropout: float = 0.0,
    rngs: nnx.Rngs,
  ):
    if not 0 <= dropout < 1:
      raise ValueError(f"dropout={dropout} must be in [0, 1)")
    H, V = key_dim, 2 * dim if value_dim is None else value_dim
    offer = dict(dim=dim, num_heads=1, head_dim=H, rngs=rngs)
    build = lambda interface, entry: registry.build(interface, entry, **offer)
    mask = (Causal() if causal else Everything()) & build("masks", "same_segment")
    if chunk is not None:
      mask &= build("masks", dict(name="same_chunk", size=chunk))
    normaliser = build("normalisers", normaliser)
    if scale_by_count is None:
      scale_by_count = not isinstance(normaliser, Softmax)
    self.spec = trained(AttentionSpec(
      mask=mask, normaliser=normaliser, scale=1.0 if scale_by_count else None,
      transforms=() if bias is None else (build("transforms", bias),),
    ))  # fmt: skip
    self.causal, self.chunk, self.dropout = causal, chunk, dropout
    self.scale_by_count, self.widths = scale_by_count, (dim, H, V)
    self.norm = LayerNorm(dim, rngs=rngs) if prenorm else None
    self.average = MovingAverage(dim, state_dim, both=not causal, rngs=rngs)
    kinds: dict[str, Any] = dict(use_bias=True, kernel_init=SMALL, rngs=rngs)
    self.value = linear(dim, V, **kinds)
    self.shared = linear(dim, 2 * dim + H + V, **kinds)  # u, z, r and e W_h
    self.out = linear(V, dim, **kinds)
    self.gain = nnx.Param(SMALL(rngs.params(), (2, H), jnp.float32))
    self.offset = nnx.Param(jnp.zeros((2, H)))

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    refuse(self, context=context, context_tokens=context_tokens)
    e = self.average(self._normed(x), tokens=tokens)
    q, k, gates = self._shared(e)
    where = Tokens.of_length(x.shape[1]) if tokens is None else tokens
    return self._gated(x, self._read(q, k, self.values(x), where, where, key), gates)

  def values(self, x, *, tokens=None):
    return jax.nn.silu(self.value(self._normed(x)))[:, :, None]

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    q, k, _ = self._shared(self.average(self._normed(x), tokens=tokens))
    where = Tokens.of_length(x.shape[1]) if tokens is None else tokens
    return self._read(q, k, values, where, where)

  def init_cache(self, batch: int, length: int) -> Memory:
    """Room for `length` tokens, or for one chunk where attention is chunked."""
    self._check_steps()
    _, H, V = self.widths
    room = length if self.chunk is None else min(length, self.chunk)
    return Memory(
      averages=RecurrentCache.empty(self.average.init_cache(batch)),
      pairs=KVCache.empty(batch, room, 1, H, V, rolling=self.chunk is not None),
    )

  def step(self, x, cache, *, tokens=None):
    self._check_steps()
    if tokens is None:  # the document of the last token goes on
      tokens = cache.pairs.next(x.shape[1])
      segment = jnp.broadcast_to(cache.averages.segment, tokens.segment.shape)
      tokens = dataclasses.replace(tokens, segment=segment)
    before = cache.averages.before(tokens)
    e, averages = self.average.step(self._normed(x), before, tokens=tokens)
    q, k, gates = self._shared(e)
    view, pairs = cache.pairs.append(k, self.values(x), tokens)
    heads = self._read(q, view.key, view.value, tokens, view.tokens)
    return self._gated(x, heads, gates), Memory(cache.averages.after(averages, tokens), pairs)

  def _check_steps(self):
    if not self.causal:
      raise NotImplementedError("averages of both directions see tokens to come; use causal=True")

  def _normed(self, x):
    return x if self.norm is None else self.norm(x)

  def _shared(self, e):
    """Averages to queries and keys (B, T, 1, H), and gates u, r and what h adds to them."""
    D, H, V = self.widths
    u, z, r, h = jnp.split(self.shared(e), (D, D + H, D + H + V), axis=-1)
    gain, offset = self.gain[...].astype(z.dtype), self.offset[...].astype(z.dtype)
    q, k = (jax.nn.silu(z)[:, :, None] * gain[i] + offset[i] for i in range(2))
    return q, k, (jax.nn.sigmoid(u), jax.nn.silu(r), h)

  def _read(self, q, k, v, q_tokens, k_tokens, key=None):
    """Heads (B, T, 1, V)."""
    spec = dropping(value_of(self.spec), key, self.dropout)
    if self.scale_by_count:
      q = (q / count(spec.mask, q_tokens, k_tokens)[..., None]).astype(q.dtype)
    heads = attend(q, k, v, spec, q_tokens=q_tokens, k_tokens=k_tokens)
    if observed(self):
      self.sow(nnx.Intermediate, "weights", reference.weights(q, k, spec, q_tokens, k_tokens))
      self.sow(nnx.Intermediate, "heads", heads)
    return heads

  def _gated(self, x, heads, gates):
    u, r, h = gates
    return u * (jax.nn.silu(h + self.out(r * heads[:, :, 0].astype(x.dtype))) - x)


def count(mask: Mask, q: Tokens, k: Tokens) -> jax.Array:
  """How many keys each query sees, at least 1, (#B, T, 1): the mass of as many weights of 1."""
  batch = max(x.shape[0] for x in jax.tree.leaves((q, k)))
  nothing = lambda tokens: jnp.zeros((batch, tokens.position.shape[1], 1, 1))
  spec = AttentionSpec(mask=mask)
  p = attend_partial(nothing(q), nothing(k), nothing(k), spec, q_tokens=q, k_tokens=k)
  return jnp.maximum(p.mass, 1.0)


ENTRY = Entry(
  make=Mega,
  paper="arXiv:2209.10655",
  facts={"streaming", "linear_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(key_dim=8, value_dim=24, state_dim=3),
  patterns={"causal_self": {}, "noncausal_self": dict(causal=False)},
)
