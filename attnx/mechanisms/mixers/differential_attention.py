"""Differential attention: the difference of two attention maps (Ye et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.attention import attend_partial, reference
from attnx.core import registry
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.attention import build_spec, dropping, readable, sides, trained, value_of
from attnx.nn.kv_cache import Cache
from attnx.nn.linear import RMSNorm, linear
from attnx.nn.mixer import Mixer, observed
from attnx.nn.position import Position


class DifferentialAttention(Mixer):
  """(1 - b) RMSNorm((A_1 - l A_2) v), with A_m = softmax(q_m k_m^T / sqrt(H)) for two maps m.

  b = 0.8 - 0.6 exp(-0.3 (layer - 1)). l = exp(<a_1, c_1>) - exp(<a_2, c_2>) + b is one number for
  all heads, with learned a and c; each norm is over the 2 H channels of one head, with gains that
  heads share. What both maps attend to cancels. A head has two queries and two keys of width H and
  one value of width 2 H, so that D / 2H heads cost what D / H heads of softmax attention cost; the
  channels of a head's first map come before those of its second.

  Both reads are linear in memory and their difference is taken in float32. A decoder keeps the keys
  of both maps side by side: 4 H numbers a token and key head. (B, T, D) to (B, T, D) in the dtype
  of `x`. arXiv:2410.05258.

  Args:
    dim: D.
    layer: place of the layer in its model, from 1 as in the paper; b grows with it from 0.2 to 0.8.
    num_heads: N, pairs of query maps.
    num_kv_heads: K, pairs of keys with a value; None means N.
    head_dim: H; None means D / 2N.
    context_dim: width of what `context` brings; None means D.
    mask, transforms, normaliser, edits: entries of those interfaces, by name, mapping or object;
      both maps have the same.
    scale: factor on q k^T; None means 1 / sqrt(H).
    position: entry of `positions`, applied to the queries and keys of each map; None for none.
    cache: entry of `caches` that is attended to like any keys.
    dropout: rate at which weights are dropped when a `key` is given, the same ones from both maps.
    implementation: passed to `attend`.

  Raises:
    ValueError: numbers of heads do not divide, or `layer` or `dropout` is out of range.
  """

  def __init__(
    self,
    dim: int,
    *,
    layer: int,
    num_heads: int = 8,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    context_dim: int | None = None,
    mask: Any = "causal",
    transforms: Sequence[Any] = (),
    normaliser: Any = "softmax",
    edits: Sequence[Any] = (),
    scale: float | None = None,
    position: Any = "rope",
    cache: Any = "full",
    dropout: float = 0.0,
    implementation: str = "auto",
    rngs: nnx.Rngs,
  ):
    if num_heads < 1 or (head_dim is None and dim % (2 * num_heads)):
      raise ValueError(f"2 num_heads={2 * num_heads} must divide dim={dim}, or give head_dim")
    K = num_heads if num_kv_heads is None else num_kv_heads
    if K < 1 or num_heads % K:
      raise ValueError(f"num_kv_heads={K} must divide num_heads={num_heads}")
    if layer < 1 or not 0 <= dropout < 1:
      raise ValueError(f"layer={layer} must count from 1, and dropout={dropout} be in [0, 1)")
    H = dim // (2 * num_heads) if head_dim is None else head_dim
    widths = {"normalisers": 2 * H}  # they see heads; the other interfaces see queries and keys
    build = lambda interface, entry: registry.build(
      interface, entry, dim=dim, num_heads=num_heads, head_dim=widths.get(interface, H), rngs=rngs
    )
    self.spec = trained(build_spec(build, mask, transforms, normaliser, edits, scale))
    self.position = Position() if position is None else build("positions", position)
    self.cache = build("caches", cache)
    self.dropout, self.implementation = dropout, implementation
    self.offset = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
    source = dim if context_dim is None else context_dim
    self.query = linear(dim, (num_heads, 2 * H), rngs=rngs)
    self.key, self.value = (linear(source, (K, 2 * H), rngs=rngs) for _ in range(2))
    self.factors = nnx.Param(0.1 * jax.random.normal(rngs.params(), (2, 2, H), jnp.float32))
    self.norm = RMSNorm(2 * H, epsilon=1e-5, rngs=rngs)
    self.out = linear((num_heads, 2 * H), dim, rngs=rngs)

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    v = self.values(x if context is None else context)
    where = dict(context=context, tokens=tokens, context_tokens=context_tokens)
    return self.project(self.mix(x, v, **where, key=key), x)

  def values(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """(B, S, D) to (B, S, K, 2 H)."""
    return self.value(x)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None, key=None):
    context, q_tokens, k_tokens = sides(x, context, tokens, context_tokens)
    q, k = self.queries(x, q_tokens), self.keys(context, k_tokens)
    return self.read(q, k, values, q_tokens, k_tokens, key=key)

  def init_cache(self, batch: int, length: int) -> Cache:
    heads, width = self.key.kernel.shape[1:]
    return readable(self.cache.empty(batch, length, heads, width, width))

  def step(self, x, cache, *, tokens=None):
    tokens = cache.next(x.shape[1]) if tokens is None else tokens
    view, after = cache.append(self.keys(x, tokens), self.values(x), tokens)
    heads = self.read(self.queries(x, tokens), view.key, view.value, tokens, view.tokens)
    return self.project(heads, x), after

  def queries(self, x: jax.Array, tokens: Tokens) -> jax.Array:
    """[q_1; q_2] with positions, (B, T, D) to (B, T, N, 2 H)."""
    maps = jnp.split(self.query(x), 2, axis=-1)
    return jnp.concatenate([self.position.query(q, tokens.position) for q in maps], axis=-1)

  def keys(self, context: jax.Array, tokens: Tokens) -> jax.Array:
    """[k_1; k_2] with positions, (B, S, D) to (B, S, K, 2 H)."""
    maps = jnp.split(self.key(context), 2, axis=-1)
    return jnp.concatenate([self.position.key(k, tokens.position) for k in maps], axis=-1)

  def read(self, q, k, v, q_tokens, k_tokens, *, key=None) -> jax.Array:
    """(A_1 - l A_2) v: (B, T, N, 2 H), (B, S, K, 2 H) and values to (B, T, N, V) in float32."""
    spec = dropping(value_of(self.spec), key, self.dropout)
    maps = list(zip(jnp.split(q, 2, axis=-1), jnp.split(k, 2, axis=-1)))
    where = dict(q_tokens=q_tokens, k_tokens=k_tokens)
    first, second = (
      spec.finish(attend_partial(q, k, v, spec, **where, implementation=self.implementation))
      for q, k in maps
    )
    heads = first - self.factor() * second
    if observed(self):
      a, b = (reference.weights(q, k, spec, q_tokens, k_tokens) for q, k in maps)
      self.sow(nnx.Intermediate, "weights", a - self.factor() * b)
      self.sow(nnx.Intermediate, "heads", heads)
    return heads

  def factor(self) -> jax.Array:
    """l, a float32 scalar."""
    first, second = jnp.exp(jnp.prod(self.factors[...], axis=1).sum(-1))
    return first - second + self.offset

  def project(self, heads: jax.Array, x: jax.Array) -> jax.Array:
    """What is mixed, (B, T, N, 2 H), to (B, T, D)."""
    return self.out(((1 - self.offset) * self.norm(heads)).astype(x.dtype))


ENTRY = Entry(
  make=DifferentialAttention,
  paper="arXiv:2410.05258",
  facts={"streaming", "linear_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(layer=3, num_heads=4, num_kv_heads=2),
  patterns={
    "causal_self": {},
    "causal_cross": {},
    "noncausal_self": dict(mask="everything"),
    "noncausal_cross": dict(mask="everything"),
  },
)
