"""Multi-head attention: projections around `attend`."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import operator
from typing import Any

from flax import nnx
import jax

from attnx.attention import AttentionSpec, attend, reference
from attnx.attention.transforms import Dropout
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.nn.aside import Loss
from attnx.nn.kv_cache import Cache
from attnx.nn.linear import RMSNorm, linear
from attnx.nn.mixer import Mixer, observed
from attnx.nn.position import Position


class Attention(Mixer):
  """softmax(q k^T / sqrt(H)) v with every piece replaceable (arXiv:1706.03762).

  Args:
    dim: D.
    num_heads: query heads, N.
    num_kv_heads: key and value heads, K; None means N. 1 is multi-query attention.
    head_dim: H, of queries, keys and values; None means D / N.
    context_dim: width of what `context` brings; None means D.
    mask, transforms, normaliser, edits: entries of those interfaces, by name, mapping or object;
      of a list of masks, all must allow a pair.
    scale: factor on q k^T; None means 1 / sqrt(H).
    position: entry of `positions`, applied to queries and keys; None for none.
    combiner: entry of `combiners`, applied to the heads before the output projection.
    cache: entry of `caches`, what decoding remembers.
    qk_norm: normalise queries and keys to RMS 1 per head, with learned gains (arXiv:2302.05442).
    use_bias: whether projections have biases.
    dropout: rate at which weights are dropped when a `key` is given.
    implementation: passed to `attend`.
  """

  def __init__(
    self,
    dim: int,
    *,
    num_heads: int = 8,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    context_dim: int | None = None,
    mask: Any = "causal",
    transforms: Sequence[Any] = (),
    normaliser: Any = "softmax",
    edits: Sequence[Any] = (),
    scale: float | None = None,
    position: Any = None,
    combiner: Any = None,
    cache: Any = "full",
    qk_norm: bool = False,
    use_bias: bool = False,
    dropout: float = 0.0,
    implementation: str = "auto",
    rngs: nnx.Rngs,
  ):
    head_dim = width_of_heads(dim, num_heads) if head_dim is None else head_dim
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
      raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    if not 0 <= dropout < 1:
      raise ValueError(f"dropout={dropout} must be in [0, 1)")
    offer = dict(dim=dim, num_heads=num_heads, head_dim=head_dim, rngs=rngs)
    build = lambda interface, entry: registry.build(interface, entry, **offer)
    self.spec = trained(
      build_spec(build, mask, transforms, normaliser, edits, scale)
    )
    self.position = Position() if position is None else build("positions", position)
    self.combiner = None if combiner is None else build("combiners", combiner)
    self.cache = build("caches", cache)
    self.query_norm, self.key_norm = (
      RMSNorm(head_dim, rngs=rngs) if qk_norm else None for _ in range(2)
    )
    self.dropout, self.implementation = dropout, implementation
    source = dim if context_dim is None else context_dim
    kinds: Any = dict(use_bias=use_bias, rngs=rngs)
    self.query = linear(dim, (num_heads, head_dim), **kinds)
    self.key = linear(source, (num_kv_heads, head_dim), **kinds)
    self.value = linear(source, (num_kv_heads, head_dim), **kinds)
    self.out = linear((num_heads, head_dim), dim, **kinds)

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    v = self.values(x if context is None else context)
    where = dict(context=context, tokens=tokens, context_tokens=context_tokens)
    if self.combiner is not None and observed(self, Loss):
      self.combiner.aside(x, tokens)
    return self.project(self.mix(x, v, **where, key=key), x)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None, key=None):
    context, q_tokens, k_tokens = sides(x, context, tokens, context_tokens)
    q = self.position.query(self.queries(x), q_tokens.position)
    k = self.position.key(self.keys(context), k_tokens.position)
    return self.read(q, k, values, q_tokens, k_tokens, key=key)

  def init_cache(self, batch: int, length: int) -> Cache:
    heads, head_dim = self.key.kernel.shape[1:]
    return self.cache.empty(batch, length, heads, head_dim, head_dim)

  def step(self, x, cache, *, tokens=None):
    tokens = cache.next(x.shape[1]) if tokens is None else tokens
    heads, cache = cache.attend(
      self.queries(x), self.keys(x), self.values(x), tokens,
      spec=value_of(self.spec), position=self.position, implementation=self.implementation,
    )  # fmt: skip
    return self.project(heads, x), cache

  def queries(self, x: jax.Array) -> jax.Array:
    """(B, T, D) to queries (B, T, N, H), without positions."""
    q = self.query(x)
    return q if self.query_norm is None else self.query_norm(q)

  def keys(self, context: jax.Array) -> jax.Array:
    """(B, S, D) to keys (B, S, K, H), without positions."""
    k = self.key(context)
    return k if self.key_norm is None else self.key_norm(k)

  def values(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """(B, S, D) to values (B, S, K, H)."""
    return self.value(x)

  def read(self, q, k, v, q_tokens, k_tokens, *, key=None) -> jax.Array:
    """Heads (B, T, N, V) of queries over keys, both with positions."""
    spec = dropping(value_of(self.spec), key, self.dropout)
    heads = attend(
      q, k, v, spec, q_tokens=q_tokens, k_tokens=k_tokens, implementation=self.implementation
    )
    if observed(self):
      self.sow(nnx.Intermediate, "weights", reference.weights(q, k, spec, q_tokens, k_tokens))
      self.sow(nnx.Intermediate, "heads", heads)
    return heads

  def project(self, heads: jax.Array, x: jax.Array) -> jax.Array:
    """Heads (B, T, N, V) of the inputs x (B, T, D) to (B, T, D)."""
    heads = heads.astype(x.dtype)
    return self.out(heads if self.combiner is None else self.combiner(heads, x))


def width_of_heads(dim: int, num_heads: int) -> int:
  """D / N, refused where it is not whole."""
  if num_heads < 1 or dim % num_heads:
    raise ValueError(f"num_heads={num_heads} must divide dim={dim}, or give head_dim")
  return dim // num_heads


def build_spec(build, mask, transforms, normaliser, edits, scale) -> AttentionSpec:
  """The spec of entries; of several masks in a list, all must allow a pair."""
  return AttentionSpec(
    mask=functools.reduce(operator.and_, (build("masks", m) for m in several(mask))),
    transforms=tuple(build("transforms", transform) for transform in transforms),
    normaliser=build("normalisers", normaliser),
    edits=tuple(build("edits", edit) for edit in edits),
    scale=scale,
  )


def several(entries: Any) -> Sequence[Any]:
  """The entries of a list, or the one that stands for itself."""
  return entries if isinstance(entries, list | tuple) and entries else (entries,)


def sides(
  x: jax.Array,
  context: jax.Array | None,
  tokens: Tokens | None,
  context_tokens: Tokens | None,
) -> tuple[jax.Array, Tokens, Tokens]:
  """What keys are made of, and where queries and keys sit: the defaults of `Mixer`."""
  if context is None and context_tokens is not None:
    raise ValueError("context_tokens were given without a context; give both or neither")
  context, k_tokens = (x, tokens) if context is None else (context, context_tokens)
  q_tokens = Tokens.of_length(x.shape[1]) if tokens is None else tokens
  k_tokens = Tokens.of_length(context.shape[1]) if k_tokens is None else k_tokens
  return context, q_tokens, k_tokens


def dropping(spec: AttentionSpec, key: jax.Array | None, rate: float) -> AttentionSpec:
  """The spec that also drops weights at this rate; itself where there is no key."""
  if key is None or not rate:
    return spec
  return dataclasses.replace(spec, edits=(*spec.edits, Dropout(key, rate)))


def readable(cache: Cache) -> Cache:
  """A cache that `append` gives all of, for mixers that keep other things than queries meet."""
  if type(cache).attend is not Cache.attend:
    raise NotImplementedError(
      f"{type(cache).__name__} chooses by the queries and keys that it is given, which are not "
      "what is cached here; take 'full', 'window' or 'paged'"
    )
  return cache


def trained(tree: Any) -> Any:
  """A pytree of values, its floating arrays as parameters of the module that holds it."""
  floating = lambda x: jax.numpy.issubdtype(jax.numpy.result_type(x), jax.numpy.floating)
  return nnx.data(jax.tree.map(lambda x: nnx.Param(x) if floating(x) else x, tree))


def value_of(tree: Any) -> Any:
  """The pytree whose parameters `trained` made, as plain arrays again."""
  held = lambda x: isinstance(x, nnx.Variable)
  return jax.tree.map(lambda x: x[...] if held(x) else x, tree, is_leaf=held)
