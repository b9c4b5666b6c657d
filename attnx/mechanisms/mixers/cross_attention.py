"""Cross attention: one sequence asks, another answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.attention import Attention
from attnx.nn.mixer import Mixer


@struct.dataclass
class Memory:
  """Keys (B, S, K, H) and values of a context, where they sit, and (B,) target tokens seen."""

  key: jax.Array
  value: jax.Array
  tokens: Tokens
  seen: jax.Array


class CrossAttention(Mixer):
  """softmax(q k^T / sqrt(H)) v with q of x, k and v of the context (arXiv:1706.03762).

  Decoding remembers the keys of the context, once: `remember` takes the place of `init_cache`.

  Args:
    dim: D.
    mask: by default every query sees the whole context; "causal" compares positions of both sides.
    attention: further arguments of `nn.attention.Attention`.
  """

  def __init__(
    self,
    dim: int,
    *,
    mask: Any = "everything",
    attention: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs,
  ):
    self.attention = Attention(dim, mask=mask, **(attention or {}), rngs=rngs)

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    if context is None:
      raise ValueError("cross attention wants a context; for one sequence take 'attention'")
    return self.attention(
      x, context=context, tokens=tokens, context_tokens=context_tokens, key=key
    )

  def init_cache(self, batch, length):
    raise ValueError("cross attention remembers a context; call `remember(context)` instead")

  def remember(self, context: jax.Array, *, context_tokens: Tokens | None = None) -> Memory:
    """What decoding wants to know of a context (B, S, D)."""
    B, S, _ = context.shape
    tokens = Tokens.of_length(S) if context_tokens is None else context_tokens
    tokens = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (B, S)), tokens)
    k = self.attention.position.key(self.attention.keys(context), tokens.position)
    v = self.attention.values(context)
    return Memory(k, v, tokens, jnp.zeros(B, jnp.int32))

  def step(self, x, cache: Memory, *, tokens=None):
    if tokens is None:
      position = cache.seen[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
      tokens = Tokens(position, position, jnp.zeros_like(position))
    q = self.attention.position.query(self.attention.queries(x), tokens.position)
    heads = self.attention.read(q, cache.key, cache.value, tokens, cache.tokens)
    seen = jnp.maximum(cache.seen, tokens.position.max(1) + 1).astype(jnp.int32)
    after = Memory(cache.key, cache.value, cache.tokens, seen)
    return self.attention.project(heads, x), after


ENTRY = Entry(
  make=CrossAttention,
  paper="arXiv:1706.03762",
  facts={"packed", "any_length"},
  tiny=dict(attention=dict(num_heads=4, num_kv_heads=2)),
  patterns={"noncausal_cross": {}, "causal_cross": dict(mask="causal")},
)
