"""A decoder language model over any mix of mixers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.tokens import Tokens
from attnx.nn.block import Block
from attnx.nn.linear import RMSNorm
from attnx.nn.readout import Vocabulary
from attnx.nn.stack import Stack, pattern


class Model(nnx.Module):
  """logits = E^T norm(block_depth(... block_1(E[ids]))).

  Args:
    vocab: V.
    dim: D.
    depth: number of blocks.
    mixers: entries of `mixers`, repeated in order until the depth is reached. One entry is a plain
      model, two are a hybrid.
    mlp: arguments of `nn.mlp.MLP`.
    vocabulary: further arguments of `nn.readout.Vocabulary`: position, tied, soft_cap, dtype.
    wiring, dropout: of `nn.block.Block`.
    scan, remat: of `nn.stack.Stack`.
  """

  def __init__(
    self,
    vocab: int,
    *,
    dim: int,
    depth: int,
    mixers: Sequence[Any],
    mlp: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    wiring: Any = "pre",
    dropout: float = 0.0,
    scan: bool = False,
    remat: str | None = None,
    rngs: nnx.Rngs,
  ):
    mixer = pattern(mixers)
    make = lambda i, rngs: Block(
      dim, mixer=mixer(i), mlp=mlp, wiring=wiring, dropout=dropout, rngs=rngs
    )
    period = 1 if isinstance(mixers, str | Mapping) else len(mixers)
    self.vocabulary = Vocabulary(vocab, dim, **(vocabulary or {}), rngs=rngs)
    self.stack = Stack(make, depth, period=period, scan=scan, remat=remat, rngs=rngs)
    self.norm = RMSNorm(dim, rngs=rngs)

  def __call__(
    self, ids: jax.Array, *, tokens: Tokens | None = None, key: jax.Array | None = None
  ) -> jax.Array:
    """Token ids (B, T) to logits (B, T, V), float32.

    Args:
      ids: (B, T) integers.
      tokens: where they sit; default: positions 0 .. T-1 of one document.
      key: for what drops; None is evaluation.
    """
    where = Tokens.of_length(ids.shape[1]) if tokens is None else tokens
    x = self.stack(self.vocabulary(ids, where), tokens=tokens, key=key)
    return self.vocabulary.logits(self.norm(x))

  def init_cache(self, batch: int, length: int) -> dict[str, Any]:
    """What is remembered before the first token, with room for `length` tokens."""
    caches = self.stack.init_cache(batch, length)
    return dict(seen=jnp.zeros(batch, jnp.int32), blocks=caches)

  def step(
    self, ids: jax.Array, cache: dict[str, Any], *, tokens: Tokens | None = None, last: bool = False
  ):
    """The next ids (B, t) to logits (B, t, V), and the cache after them.

    `tokens` default to the positions after those seen; rows of a prompt that are shorter than the
    others are padded on the left, with negative positions. `last` asks for the logits of the last
    token alone, (B, 1, V): those of a long prompt are larger than the model.
    """
    if tokens is None:
      position = cache["seen"][:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)
      tokens = Tokens(position, position, jnp.zeros_like(position))
    x = self.vocabulary(ids, tokens)
    x, blocks = self.stack.step(x, cache["blocks"], tokens=tokens)
    seen = jnp.maximum(cache["seen"], tokens.position.max(1) + 1).astype(jnp.int32)
    x = x[:, -1:] if last else x
    return self.vocabulary.logits(self.norm(x)), dict(seen=seen, blocks=blocks)
