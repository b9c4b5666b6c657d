"""Multi-head latent attention: all heads read one small latent a token (DeepSeek-V2, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.attention import attend, attend_partial, reference
from attnx.attention.transforms import Transform
from attnx.core import registry
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.attention import build_spec, dropping, readable, sides, trained, value_of
from attnx.nn.kv_cache import Cache, View
from attnx.nn.linear import RMSNorm, linear
from attnx.nn.mixer import Mixer, observed
from attnx.nn.position import Position


class MultiHeadLatentAttention(Mixer):
  """softmax_j((<q_n, U_n c_j> + <R q'_n, R k'_j>) / sqrt(H + R)) W_n c_j, c = RMSNorm(x C).

  c, of width C, is all that the N heads know of a token, but for one rotary key k' that they share:
  a position could not be moved past U. Queries come from x, or from a latent of their own.

  A decoder keeps C + R numbers a token, however many heads there are. `step` moves U to the side of
  the queries and W behind the softmax, and attends with one key [c; R k'] and its part c as value.
  That costs 2 C + R a pair in place of H + R + V, so that prompts, whose queries are many, expand
  the latents instead; the numbers are the same.

  (B, T, D) to (B, T, D) in the dtype of `x`. arXiv:2405.04434.

  Args:
    dim: D.
    num_heads: N.
    query_rank: width of the latent of queries, normalised as c is; None makes queries of x.
    kv_rank: C.
    head_dim: H, of the part of queries and keys that has no position.
    rope_dim: R, of the part that has.
    value_dim: V.
    context_dim: width of what `context` brings; None means D.
    mask, transforms, normaliser, edits: entries of those interfaces, by name, mapping or object.
    scale: factor on scores; None means 1 / sqrt(H + R).
    position: entry of `positions`, applied to the R channels; None for none. Where it has a gain,
      as YaRN does, the other channels gain as much, so that the temperature is that of all scores.
    cache: entry of `caches` that is attended to like any keys.
    dropout: rate at which weights are dropped when a `key` is given.
    implementation: passed to `attend`.

  Raises:
    ValueError: a width is not positive, or `dropout` is out of range.
    NotImplementedError: a transform or its readout looks at vectors of queries or values, which are
      others once U and W have moved.
  """

  def __init__(
    self,
    dim: int,
    *,
    num_heads: int = 8,
    query_rank: int | None = None,
    kv_rank: int = 512,
    head_dim: int = 128,
    rope_dim: int = 64,
    value_dim: int = 128,
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
    widths = dict(
      num_heads=num_heads, kv_rank=kv_rank, head_dim=head_dim, rope_dim=rope_dim,
      value_dim=value_dim, query_rank=1 if query_rank is None else query_rank,
    )  # fmt: skip
    for name, width in widths.items():
      if width < 1:
        raise ValueError(f"{name}={width} must be at least 1")
    if not 0 <= dropout < 1:
      raise ValueError(f"dropout={dropout} must be in [0, 1)")
    offer = dict(dim=dim, num_heads=num_heads, rngs=rngs)
    build = lambda interface, entry: registry.build(
      interface, entry, **offer, head_dim=rope_dim if interface == "positions" else value_dim
    )
    scale = (head_dim + rope_dim) ** -0.5 if scale is None else scale
    spec = build_spec(build, mask, transforms, normaliser, edits, scale)
    if spec.readouts or any(type(t).table is not Transform.table for t in spec.transforms):
      raise NotImplementedError(
        "latent attention has no one query and value width; take transforms of scores and tokens"
      )
    self.spec = trained(spec)
    self.position = Position() if position is None else build("positions", position)
    self.cache = build("caches", cache)
    self.head_dim, self.dropout, self.implementation = head_dim, dropout, implementation
    source = dim if context_dim is None else context_dim
    if query_rank is None:
      self.query_down, self.query_norm = None, None
    else:
      self.query_down = linear(dim, query_rank, rngs=rngs)
      self.query_norm = RMSNorm(query_rank, rngs=rngs)
    self.query = linear(query_rank or dim, (num_heads, head_dim + rope_dim), rngs=rngs)
    self.down = linear(source, kv_rank, rngs=rngs)
    self.norm = RMSNorm(kv_rank, rngs=rngs)
    self.rope_key = linear(source, (1, rope_dim), rngs=rngs)
    self.key = linear(kv_rank, (num_heads, head_dim), rngs=rngs)
    self.value = linear(kv_rank, (num_heads, value_dim), rngs=rngs)
    self.out = linear((num_heads, value_dim), dim, rngs=rngs)

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    v = self.values(x if context is None else context)
    where = dict(context=context, tokens=tokens, context_tokens=context_tokens)
    return self.out(self.mix(x, v, **where, key=key).astype(x.dtype))

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None, key=None):
    context, q_tokens, k_tokens = sides(x, context, tokens, context_tokens)
    q = jnp.concatenate(self.queries(x, q_tokens), axis=-1)
    k = self.keys(self.latent(context), self.shared_key(context, k_tokens))
    spec = dropping(value_of(self.spec), key, self.dropout)
    heads = attend(
      q, k, values, spec,
      q_tokens=q_tokens, k_tokens=k_tokens, implementation=self.implementation,
    )  # fmt: skip
    if observed(self):
      self.sow(nnx.Intermediate, "weights", reference.weights(q, k, spec, q_tokens, k_tokens))
      self.sow(nnx.Intermediate, "heads", heads)
    return heads

  def init_cache(self, batch: int, length: int) -> Cache:
    (_, rope_dim), kv_rank = self.rope_key.kernel.shape[1:], self.key.kernel.shape[0]
    return readable(self.cache.empty(batch, length, 1, rope_dim, kv_rank))

  def step(self, x, cache, *, tokens=None):
    tokens = cache.next(x.shape[1]) if tokens is None else tokens
    view, after = cache.append(self.shared_key(x, tokens), self.latent(x)[:, :, None], tokens)
    read = self.absorbed if self.absorbs(x.shape[1]) else self.expanded
    heads = read(*self.queries(x, tokens), view, tokens)
    return self.out(heads.astype(x.dtype)), after

  def queries(self, x: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """(B, T, D) to what meets U c, (B, T, N, H), and what meets k', (B, T, N, R)."""
    if self.query_down is not None and self.query_norm is not None:
      x = self.query_norm(self.query_down(x))
    content, turned = jnp.split(self.query(x), [self.head_dim], axis=-1)
    gain = getattr(self.position, "gain", 1.0)
    return content * gain**2, self.position.query(turned, tokens.position)

  def latent(self, context: jax.Array) -> jax.Array:
    """c: (B, S, D) to (B, S, C)."""
    return self.norm(self.down(context))

  def shared_key(self, context: jax.Array, tokens: Tokens) -> jax.Array:
    """R k': (B, S, D) to (B, S, 1, R)."""
    return self.position.key(self.rope_key(context), tokens.position)

  def keys(self, latent: jax.Array, shared_key: jax.Array) -> jax.Array:
    """[U_n c; R k'] of every head: (B, S, C) and (B, S, 1, R) to (B, S, N, H + R)."""
    content = self.key(latent)
    shared = jnp.broadcast_to(shared_key, (*content.shape[:3], shared_key.shape[-1]))
    return jnp.concatenate([content, shared.astype(content.dtype)], axis=-1)

  def values(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """W_n c: (B, S, D) to (B, S, N, V)."""
    return self.value(self.latent(x))

  def absorbs(self, count: int) -> bool:
    """Whether `absorbed` multiplies less than `expanded` for this many queries."""
    (C, _, H), V = self.key.kernel.shape, self.value.kernel.shape[-1]
    return count * (2 * C - H - V) <= C * (H + V)

  def absorbed(self, content, turned, view: View, tokens: Tokens) -> jax.Array:
    """Heads (B, t, N, V) of queries over a cache, with one key head and latents as values."""
    spec, latent = value_of(self.spec), view.value
    up, down = self.key.kernel[...], self.value.kernel[...]
    q = jnp.einsum("btnh,cnh->btnc", content, up.astype(content.dtype))
    p = attend_partial(
      jnp.concatenate([q, turned], axis=-1),
      jnp.concatenate([latent, view.key.astype(latent.dtype)], axis=-1),
      latent,
      spec,
      q_tokens=tokens,
      k_tokens=view.tokens,
      implementation=self.implementation,
    )  # W moves behind the sums over keys, but not behind `finish`, which may not be linear
    out = jnp.einsum("btnc,cnv->btnv", p.out, down.astype(p.out.dtype))
    return spec.finish(dataclasses.replace(p, out=out))

  def expanded(self, content, turned, view: View, tokens: Tokens) -> jax.Array:
    """`absorbed`, by keys and values of every head."""
    latent = view.value[:, :, 0]
    return attend(
      jnp.concatenate([content, turned], axis=-1),
      self.keys(latent, view.key),
      self.value(latent),
      value_of(self.spec),
      q_tokens=tokens,
      k_tokens=view.tokens,
      implementation=self.implementation,
    )


ENTRY = Entry(
  make=MultiHeadLatentAttention,
  paper="arXiv:2405.04434",
  facts={"streaming", "linear_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4, query_rank=10, kv_rank=6, head_dim=5, rope_dim=4, value_dim=3),
  patterns={
    "causal_self": {},
    "causal_cross": {},
    "noncausal_self": dict(mask="everything"),
    "noncausal_cross": dict(mask="everything"),
  },
)
