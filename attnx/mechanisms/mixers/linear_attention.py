"""Linear attention: features of queries and keys in place of a softmax over their products."""

from __future__ import annotations

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core import registry
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.attention import sides, width_of_heads
from attnx.nn.conv import exists
from attnx.nn.implicit import look
from attnx.nn.linear import linear
from attnx.nn.position import Position, working_dtype
from attnx.nn.recurrent import RecurrentMixer
from attnx.recurrence.linear import linear_attention


class LinearAttention(RecurrentMixer):
  """o_t = phi(q_t) sum_s phi(k_s) v_s^T / (phi(q_t) sum_s phi(k_s) + epsilon) (arXiv:2006.16236).

  Sums run over s <= t, or over everything. O(T M V) for features of width M. (B, T, D) to (B, T, D)
  in the dtype of `x`; features, sums and states (B, N, M, V + 1) are float32. Documents do not see
  each other; a context is read whole, whatever its documents.

  Args:
    dim: D.
    num_heads: N.
    num_kv_heads: K; None means N.
    head_dim: H; None means D / N.
    context_dim: width of what `context` brings; None means D.
    feature: entry of `features`.
    position: entry of `positions`, applied before the features; None for none.
    causal: sums run over the past only.
    normalise: divide by the sum of weights, which is one more column of the state; without it,
      features may be of any sign.
    epsilon: added to that sum, which features that are not negative keep from being less. Rows
      whose sum is far below it, where features underflow, come out near zero.
    chunk: tokens handled at once; any number gives the same.

  Raises:
    ValueError: numbers of heads do not divide.
    NotImplementedError: causal attention to a context with `tokens` or `context_tokens`: what it
      may see goes by places; or `step` where not causal.
  """

  def __init__(
    self,
    dim: int,
    *,
    num_heads: int = 8,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    context_dim: int | None = None,
    feature: Any = "elu",
    position: Any = None,
    causal: bool = True,
    normalise: bool = True,
    epsilon: float = 1e-6,
    chunk: int = 64,
    rngs: nnx.Rngs,
  ):
    H = width_of_heads(dim, num_heads) if head_dim is None else head_dim
    K = num_heads if num_kv_heads is None else num_kv_heads
    if K < 1 or num_heads % K:
      raise ValueError(f"num_kv_heads={K} must divide num_heads={num_heads}")
    offer = dict(dim=dim, num_heads=num_heads, num_kv_heads=K, head_dim=H, rngs=rngs)
    self.feature = registry.build("features", feature, **offer)
    self.position = (
      Position() if position is None else registry.build("positions", position, **offer)
    )
    self.causal, self.normalise, self.epsilon, self.chunk = causal, normalise, epsilon, chunk
    source = dim if context_dim is None else context_dim
    self.query = linear(dim, (num_heads, H), rngs=rngs)
    self.key, self.value = (linear(source, (K, H), rngs=rngs) for _ in range(2))
    self.out = linear((num_heads, H), dim, rngs=rngs)

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    del key  # nothing drops
    where = dict(context=context, tokens=tokens, context_tokens=context_tokens)
    look(self, x, **where)
    return self.out(self.mix(x, self.values(x if context is None else context), **where))

  def values(self, x, *, tokens=None):
    return self.value(x)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    source, q_tokens, k_tokens = sides(x, context, tokens, context_tokens)
    q, k = self._features(x, source, q_tokens, k_tokens)
    k, v = exists(k, k_tokens), self._counted(values)
    if context is not None:
      sums = self._over_context(q, k, v, tokens, context_tokens)
    elif self.causal:
      sums = self._sums(q, k, v, segment=None if tokens is None else tokens.segment)[0]
    elif tokens is None:
      sums = read_all(q, k, v)
    else:
      sums = self._both_ways(q, k, v, tokens.segment)
    return exists(self._divided(sums), q_tokens).astype(values.dtype)

  def empty(self, batch):
    (_, N, H), V = self.query.kernel.shape, self.value.kernel.shape[-1]
    width = V + 1 if self.normalise else V
    state = jnp.zeros((batch, N, self.feature.width(H), width))
    return dict(seen=jnp.zeros((batch, 1), jnp.int32), state=state)

  def init_cache(self, batch, length):
    if not self.causal:
      raise NotImplementedError("sums over everything see tokens to come; step with causal=True")
    return super().init_cache(batch, length)

  def run(self, x, past, tokens):
    position = past["seen"] + jnp.arange(x.shape[1], dtype=jnp.int32)
    where = Tokens(position, position, jnp.zeros_like(position)) if tokens is None else tokens
    q, k = self._features(x, x, where, where)
    sums, state = self._sums(
      q, exists(k, tokens), self._counted(self.values(x)), state=past["state"],
      segment=None if tokens is None else tokens.segment,
    )  # fmt: skip
    seen = jnp.broadcast_to(jnp.maximum(jnp.asarray(where.position)[:, -1:] + 1, 0), (len(x), 1))
    y = self.out(exists(self._divided(sums), tokens).astype(x.dtype))
    return y, dict(seen=seen.astype(jnp.int32), state=state)

  def _features(self, x, context, q_tokens, k_tokens):
    q = self.position.query(self.query(x), q_tokens.position)
    k = self.position.key(self.key(context), k_tokens.position)
    return self.feature.query(q), self.feature.key(k)

  def _counted(self, v: jax.Array) -> jax.Array:
    """Values, and a one that the weights are summed with, in float32."""
    v = v.astype(working_dtype(v))
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1) if self.normalise else v

  def _divided(self, sums: jax.Array) -> jax.Array:
    return sums[..., :-1] / (sums[..., -1:] + self.epsilon) if self.normalise else sums

  def _sums(self, q, k, v, **options):
    return linear_attention(q, k, v, chunk=self.chunk, **options)

  def _both_ways(self, q, k, v, segment):
    """Sums over the documents of tokens: what comes up to a token, and what comes after it."""
    back = lambda y: jnp.flip(jnp.asarray(y), axis=1)
    not_itself = jnp.zeros((q.shape[2], q.shape[3]))
    later = self._sums(back(q), back(k), back(v), bonus=not_itself, segment=back(segment))[0]
    return self._sums(q, k, v, segment=segment)[0] + back(later)

  def _over_context(self, q, k, v, tokens, context_tokens):
    """Sums over a context (B, S, ...): all of it, or what stands no later than the query."""
    if not self.causal:
      return read_all(q, k, v)
    if tokens is not None or context_tokens is not None:
      raise NotImplementedError(
        "causal linear attention to a context goes by places; leave tokens out, or take attention"
      )
    T, S = q.shape[1], k.shape[1]
    pad = lambda y: jnp.pad(y, [(0, 0), (0, max(T - S, 0)), (0, 0), (0, 0)])[:, :T]
    return self._sums(q, pad(k), pad(v))[0]


def read_all(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """q_t sum_s k_s v_s^T over all s: (B, T, N, M), (B, S, K, M), (B, S, K, V) to (B, T, N, V)."""
  (B, T, N, M), K = q.shape, k.shape[2]
  state = jnp.einsum("bskm,bskv->bkmv", k, v)
  heads = jnp.einsum("btkgm,bkmv->btkgv", q.reshape(B, T, K, N // K, M), state)
  return heads.reshape(B, T, N, v.shape[3])


ENTRY = Entry(
  make=LinearAttention,
  paper="arXiv:2006.16236",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4, num_kv_heads=2),
  patterns={
    "causal_self": {},
    "noncausal_self": dict(causal=False),
    "noncausal_cross": dict(causal=False),
    "causal_cross": {},
  },
)
