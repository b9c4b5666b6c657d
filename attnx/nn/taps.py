"""Convolutions over tokens whose taps are normalised, as attention weights are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.tokens import Tokens
from attnx.nn.implicit import look
from attnx.nn.linear import linear
from attnx.nn.mixer import Mixer, refuse
from attnx.nn.position import working_dtype


@struct.dataclass
class Past:
  """The last W - 1 inputs of a convolution of width W.

  Attributes:
    value: (B, W - 1, N, V), zero where there was no token.
    there: bool (B, W - 1), whether there was one.
    segment: (B, W - 1), documents of the tokens.
  """

  value: jax.Array
  there: jax.Array
  segment: jax.Array

  @classmethod
  def empty(cls, batch: int, length: int, heads: Sequence[int], dtype: Any = jnp.float32) -> Past:
    """`length` places without a token, for heads (N, V)."""
    nobody = jnp.zeros((batch, length), bool)
    value = jnp.zeros((batch, length, *heads), dtype)
    return cls(value=value, there=nobody, segment=nobody.astype(jnp.int32))

  def __add__(self, later: Past) -> Past:
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    return Past(
      value=join(self.value.astype(later.value.dtype), later.value),
      there=join(self.there, later.there),
      segment=join(self.segment, later.segment.astype(self.segment.dtype)),
    )


class TapMixer(Mixer):
  """y W_out, y_{t,c} = sum_j softmax(logits_{t, head of c})_j v_{t + j - P, c}, v = GLU(x W_in).

  A subclass gives `init_taps` and `logits`. There are W taps, P of them before the token: all but
  one where causal, else half. Channels are dealt to heads in blocks of D / N. Tokens count by their
  place in the array; those of other documents and places without a token count as zero.

  Args:
    dim: D.
    num_heads: N.
    width: W.
    causal: look back only; else the taps are centred.
    renormalise: let softmax run over taps that meet a token, instead of losing the weight of those
      that fall outside.
    use_bias: whether the projections have biases.
    dropout: rate at which normalised taps are dropped when a `key` is given.

  Raises:
    ValueError: `num_heads` does not divide `dim`, or `width` or `dropout` is out of range.
    NotImplementedError: a `context` is given, or `step` is called and `causal` is not set.
  """

  def __init__(
    self,
    dim: int,
    *,
    num_heads: int = 16,
    width: int = 7,
    causal: bool = True,
    renormalise: bool = False,
    use_bias: bool = False,
    dropout: float = 0.0,
    rngs: nnx.Rngs,
  ):
    if num_heads < 1 or dim % num_heads:
      raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
    if width < 1 or not 0 <= dropout < 1:
      raise ValueError(f"width={width} must be positive and dropout={dropout} in [0, 1)")
    self.num_heads, self.width, self.causal = num_heads, width, causal
    self.renormalise, self.dropout = renormalise, dropout
    self.value = linear(dim, 2 * dim, use_bias=use_bias, rngs=rngs)
    self.out = linear(dim, dim, use_bias=use_bias, rngs=rngs)
    self.init_taps(dim, rngs)

  def init_taps(self, dim: int, rngs: nnx.Rngs) -> None:
    """Makes the parameters that `logits` wants."""
    raise NotImplementedError(f"{type(self).__name__} does not say what its taps are")

  def logits(self, v: jax.Array) -> jax.Array:
    """What softmax over the last axis makes taps of, (B, T, D) to (#B, #T, N, W) in float32."""
    raise NotImplementedError(f"{type(self).__name__} does not say what its taps are")

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    refuse(self, context=context, context_tokens=context_tokens)
    look(self, x, tokens=tokens)
    v = self.values(x)
    return self._project(self._whole(v, v, tokens, key))

  def values(self, x, *, tokens=None):
    a, b = jnp.split(self.value(x), 2, axis=-1)
    return (a * jax.nn.sigmoid(b)).reshape(*x.shape[:2], self.num_heads, -1)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    return self._whole(self.values(x), values, tokens, None)

  def init_cache(self, batch: int, length: int) -> Past:
    del length  # the taps reach as far back as they do
    self._check_steps()
    dim = self.out.kernel.shape[0]
    return Past.empty(batch, self.width - 1, (self.num_heads, dim // self.num_heads))

  def step(self, x, cache, *, tokens=None):
    self._check_steps()
    if tokens is None:  # the document that the last token belonged to goes on
      goes_on = cache.segment[:, -1:] if self.width > 1 else jnp.zeros((1, 1), jnp.int32)
      place = jnp.arange(x.shape[1])[None]
      tokens = Tokens(index=place, position=place, segment=jnp.broadcast_to(goes_on, x.shape[:2]))
    v = self.values(x)
    joined = cache + inputs(v, tokens)
    last = lambda a, was: a[:, a.shape[1] - self.width + 1 :].astype(was.dtype)
    return self._project(self._mix(v, joined, None)), jax.tree.map(last, joined, cache)

  def _check_steps(self):
    if not self.causal:
      raise NotImplementedError("centred taps see tokens to come; stepping needs causal=True")

  def _project(self, heads: jax.Array) -> jax.Array:
    return self.out(heads.reshape(*heads.shape[:2], -1))

  def _reach(self) -> tuple[int, int]:
    """Taps before and after the token itself."""
    before = self.width - 1 if self.causal else (self.width - 1) // 2
    return before, self.width - 1 - before

  def _whole(self, v, values, tokens, key) -> jax.Array:
    """Heads of a whole sequence: taps by what they predict from v, of any values (B, T, N, V)."""
    here = inputs(values, Tokens.of_length(v.shape[1]) if tokens is None else tokens)
    nobody = lambda n: Past.empty(v.shape[0], n, values.shape[2:], values.dtype)
    before, after = map(nobody, self._reach())
    return self._mix(v, before + here + after, key)

  def _mix(self, v: jax.Array, joined: Past, key: jax.Array | None) -> jax.Array:
    """Heads (B, T, N, V) of (B, W - 1 + T, N, V), with taps that v (B, T, N, D / N) predicts."""
    W, before, T = self.width, self._reach()[0], v.shape[1]
    at = lambda a, j: a[:, j : j + T]
    here, segment = at(joined.there, before), at(joined.segment, before)
    meets = [at(joined.there, j) & here & (at(joined.segment, j) == segment) for j in range(W)]
    logits = self.logits(v.reshape(*v.shape[:2], -1)).astype(working_dtype(v))
    taps = self._taps(logits, jnp.stack(meets, axis=-1)[:, :, None], key)
    heads = sum(taps[..., j, None] * at(joined.value, j) for j in range(W))
    return jnp.asarray(heads).astype(joined.value.dtype)

  def _taps(self, logits: jax.Array, meets: jax.Array, key: jax.Array | None) -> jax.Array:
    """Logits (#B, #T, N, W) and which meet a token (B, T, 1, W) to weights (B, T, N, W)."""
    counted = None
    if self.renormalise:  # a place without a token counts itself, for a sum that is not zero
      counted = meets | (jnp.arange(self.width) == self._reach()[0])
      logits = jnp.broadcast_to(logits, jnp.broadcast_shapes(logits.shape, counted.shape))
    taps = jax.nn.softmax(logits, where=counted) * meets
    if key is None or not self.dropout:
      return taps
    kept = jax.random.bernoulli(key, 1 - self.dropout, taps.shape)
    return jnp.where(kept, taps / (1 - self.dropout), 0.0)


def inputs(values: jax.Array, tokens: Tokens) -> Past:
  """Values (B, T, N, V) where they sit; zero where there is no token."""
  rows = lambda x: jnp.broadcast_to(jnp.asarray(x), values.shape[:2])
  there = rows(tokens.position) >= 0
  value = jnp.where(there[..., None, None], values, jnp.zeros((), values.dtype))
  return Past(value=value, there=there, segment=rows(tokens.segment))
