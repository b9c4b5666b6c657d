"""What recurrent mixers share: a past of constant size that documents empty."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.tokens import Tokens
from attnx.nn.implicit import look
from attnx.nn.mixer import Mixer, observed, refuse

Past = Any  # a pytree of arrays (B, ...)


@struct.dataclass
class RecurrentCache:
  """A past and the document that it is of.

  Attributes:
    past: states and the inputs that convolutions still see: arrays (B, ...), all of them zero
      before the first token of a document.
    segment: int32 (B, 1), the document of the last token.
  """

  past: Past
  segment: jax.Array

  @classmethod
  def empty(cls, past: Past) -> RecurrentCache:
    """Before the first token; `past` is zero."""
    batch = jax.tree.leaves(past)[0].shape[0]
    return cls(past=past, segment=jnp.zeros((batch, 1), jnp.int32))

  def before(self, tokens: Tokens | None) -> Past:
    """The past of the next tokens: zero in rows where they begin another document.

    Recurrences and convolutions then take it as that of the first token's document. None as
    `tokens` goes on with the document of the last one.
    """
    if tokens is None:
      return self.past
    goes_on = (jnp.asarray(tokens.segment)[:, :1] == self.segment)[:, 0]
    kept = lambda x: goes_on.reshape(-1, *[1] * (x.ndim - 1))
    return jax.tree.map(lambda x: jnp.where(kept(x), x, jnp.zeros((), x.dtype)), self.past)

  def after(self, past: Past, tokens: Tokens | None) -> RecurrentCache:
    """The cache once tokens have left `past` behind."""
    past = jax.tree.map(lambda new, was: new.astype(was.dtype), past, self.past)
    if tokens is None:
      return RecurrentCache(past=past, segment=self.segment)
    last = jnp.broadcast_to(jnp.asarray(tokens.segment)[:, -1:], self.segment.shape)
    return RecurrentCache(past=past, segment=last.astype(self.segment.dtype))


class RecurrentMixer(Mixer):
  """A causal mixer with a past of constant size; a call is a step from an empty past.

  A subclass gives `empty` and `run`, and `values` and `mix` where it is linear in values.
  """

  def empty(self, batch: int) -> Past:
    """The past before the first token of a document: zeros."""
    raise NotImplementedError(f"{type(self).__name__} does not say what its past is")

  def run(self, x: jax.Array, past: Past, tokens: Tokens | None) -> tuple[jax.Array, Past]:
    """Mixes tokens (B, T, D), the first of which belongs to the document of `past`.

    Documents empty the past where they begin inside of `tokens`; None is one document.
    """
    raise NotImplementedError(f"{type(self).__name__} does not say how it runs")

  def look(self, x: jax.Array, tokens: Tokens | None) -> None:
    """Sows what is worth looking at in a call on `x`: the matrix that the mixer is, and heads."""
    look(self, x, tokens=tokens)

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    del key  # nothing drops
    refuse(self, context=context, context_tokens=context_tokens)
    if observed(self):
      self.look(x, tokens)
    return self.run(x, self.empty(x.shape[0]), tokens)[0]

  def init_cache(self, batch: int, length: int) -> RecurrentCache:
    del length  # the past is of constant size
    return RecurrentCache.empty(self.empty(batch))

  def step(self, x, cache, *, tokens=None):
    y, past = self.run(x, cache.before(tokens), tokens)
    return y, cache.after(past, tokens)
