"""An encoder and a decoder that reads it through cross attention."""

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
  """logits of the target, given a source: decoder blocks read norm(encoder(source)).

  Args:
    vocab: V, of source and target.
    dim: D.
    depth: number of blocks of the encoder, and of the decoder.
    encoder, decoder: entries of `mixers`, repeated in order until the depth is reached.
    cross: entry of `mixers` that reads the encoder, in every block of the decoder. With a causal
      mask the target at position p reads the source up to position p (simultaneous decoding).
    mlp, wiring, dropout: of `nn.block.Block`.
    vocabulary: further arguments of `nn.readout.Vocabulary`.
    scan, remat: of `nn.stack.Stack`.
  """

  def __init__(
    self,
    vocab: int,
    *,
    dim: int,
    depth: int,
    encoder: Sequence[Any],
    decoder: Sequence[Any],
    cross: Any = "cross_attention",
    mlp: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    wiring: Any = "pre",
    dropout: float = 0.0,
    scan: bool = False,
    remat: str | None = None,
    rngs: nnx.Rngs,
  ):
    reads, writes = pattern(encoder), pattern(decoder)
    same = dict(mlp=mlp, wiring=wiring, dropout=dropout)
    read = lambda i, rngs: Block(dim, mixer=reads(i), **same, rngs=rngs)
    write = lambda i, rngs: Block(dim, mixer=writes(i), cross=cross, **same, rngs=rngs)
    count = lambda entries: 1 if isinstance(entries, str | Mapping) else len(entries)
    kinds: Any = dict(scan=scan, remat=remat, rngs=rngs)
    self.vocabulary = Vocabulary(vocab, dim, **(vocabulary or {}), rngs=rngs)
    self.encoder = Stack(read, depth, period=count(encoder), **kinds)
    self.encoder_norm = RMSNorm(dim, rngs=rngs)
    self.decoder = Stack(write, depth, period=count(decoder), **kinds)
    self.decoder_norm = RMSNorm(dim, rngs=rngs)

  def encode(
    self, source: jax.Array, *, tokens: Tokens | None = None, key: jax.Array | None = None
  ) -> jax.Array:
    """Source ids (B, S) to what the decoder reads, (B, S, D)."""
    where = Tokens.of_length(source.shape[1]) if tokens is None else tokens
    x = self.encoder(self.vocabulary(source, where), tokens=tokens, key=key)
    return self.encoder_norm(x)

  def __call__(
    self,
    source: jax.Array,
    target: jax.Array,
    *,
    source_tokens: Tokens | None = None,
    tokens: Tokens | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Source (B, S) and target ids (B, T), shifted by the caller, to logits (B, T, V)."""
    keys = (None, None) if key is None else jax.random.split(key)
    context = self.encode(source, tokens=source_tokens, key=keys[0])
    where = Tokens.of_length(target.shape[1]) if tokens is None else tokens
    x = self.decoder(
      self.vocabulary(target, where),
      context=context, tokens=tokens, context_tokens=source_tokens, key=keys[1],
    )  # fmt: skip
    return self.vocabulary.logits(self.decoder_norm(x))

  def init_cache(
    self, batch: int, length: int, *, source: jax.Array, source_tokens: Tokens | None = None
  ) -> dict[str, Any]:
    """Encodes the source (B, S) and remembers its keys, with room for `length` target tokens."""
    context = self.encode(source, tokens=source_tokens)
    caches = self.decoder.init_cache(
      batch, length, context=context, context_tokens=source_tokens
    )
    return dict(seen=jnp.zeros(batch, jnp.int32), blocks=caches)

  def step(
    self, ids: jax.Array, cache: dict[str, Any], *, tokens: Tokens | None = None, last: bool = False
  ):
    """The next target ids (B, t) to logits (B, t, V), and the cache after them.

    `last` asks for the logits of the last token alone, (B, 1, V).
    """
    if tokens is None:
      position = cache["seen"][:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)
      tokens = Tokens(position, position, jnp.zeros_like(position))
    x, blocks = self.decoder.step(self.vocabulary(ids, tokens), cache["blocks"], tokens=tokens)
    seen = jnp.maximum(cache["seen"], tokens.position.max(1) + 1).astype(jnp.int32)
    x = x[:, -1:] if last else x
    return self.vocabulary.logits(self.decoder_norm(x)), dict(seen=seen, blocks=blocks)
