"""Convolutions over tokens whose taps are normalised, as attention weights are."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.tokens import Tokens
from attnx.nn.linear import linear
from attnx.nn.mixer import Mixer, refuse
from attnx.nn.position import working_dtype


@struct.dataclass
class Past:
  """The last W - 1 inputs of a convolution of width W.

  Attributes:
    value: (B, W - 1, D), zero where there was no token.
    there: bool (B, W - 1), whether there was one.
    segment: (B, W - 1), documents of the tokens.
  """

  value: jax.Array
  there: jax.Array
  segment: jax.Array

  @classmethod
  def empty(cls, batch: int, length: int, dim: int) -> Past:
    """`length` places before the first token."""
    nobody = jnp.zeros((batch, length), bool)
    value = jnp.zeros((batch, length, dim), jnp.float32)
    return cls(value=value, there=nobody, segment=nobody.astype(jnp.int32))

  def __add__(self, later: Past) -> Past:
    join = lambda a, b: jnp.concatenate([jnp.broadcast_to(a, b.shape[:1] + a.shape[1:]), b], axis=1)
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
    before, after = self._reach()
    here = self._inputs(x, Tokens.of_length(x.shape[1]) if tokens is None else tokens)
    ends = [Past.empty(x.shape[0], n, x.shape[2]) for n in (before, after)]
    ends[1] = Past(ends[1].value.astype(x.dtype), ends[1].there, ends[1].segment)
    return self.out(self._mix(ends[0] + here + ends[1], key))

  def init_cache(self, batch: int, length: int) -> Past:
    del length  # the taps reach as far back as they do
    if not self.causal:
      raise NotImplementedError("centred taps see tokens to come; stepping needs causal=True")
    return Past.empty(batch, self.width - 1, self.out.kernel.shape[0])

  def step(self, x, cache, *, tokens=None):
    if not self.causal:
      raise NotImplementedError("centred taps see tokens to come; stepping needs causal=True")
    if tokens is None:  # the document that the last token belonged to goes on
      goes_on = cache.segment[:, -1:] if self.width > 1 else jnp.zeros((1, 1), jnp.int32)
      place = jnp.arange(x.shape[1])[None]
      tokens = Tokens(index=place, position=place, segment=jnp.broadcast_to(goes_on, x.shape[:2]))
    joined = cache + self._inputs(x, tokens)
    last = lambda a, was: a[:, a.shape[1] - self.width + 1 :].astype(was.dtype)
    return self.out(self._mix(joined, None)), jax.tree.map(last, joined, cache)

  def _reach(self) -> tuple[int, int]:
    """Taps before and after the token itself."""
    before = self.width - 1 if self.causal else (self.width - 1) // 2
    return before, self.width - 1 - before

  def _inputs(self, x: jax.Array, tokens: Tokens) -> Past:
    a, b = jnp.split(self.value(x), 2, axis=-1)
    there = jnp.broadcast_to(jnp.asarray(tokens.position) >= 0, x.shape[:2])
    value = jnp.where(there[..., None], a * jax.nn.sigmoid(b), jnp.zeros((), a.dtype))
    segment = jnp.broadcast_to(jnp.asarray(tokens.segment), x.shape[:2])
    return Past(value=value, there=there, segment=segment)

  def _mix(self, joined: Past, key: jax.Array | None) -> jax.Array:
    """The tokens (B, T, D) of (B, W - 1 + T, D) that have W - 1 others around them."""
    W, before = self.width, self._reach()[0]
    T = joined.value.shape[1] - W + 1
    at = lambda a, j: a[:, j : j + T]
    here = at(joined.there, before)
    same = [at(joined.segment, j) == at(joined.segment, before) for j in range(W)]
    meets = jnp.stack([at(joined.there, j) & here & same[j] for j in range(W)], axis=-1)
    v = at(joined.value, before)
    taps = self._taps(self.logits(v).astype(working_dtype(v)), meets[:, :, None], key)
    B, _, D = v.shape
    heads = lambda j: at(joined.value, j).reshape(B, T, self.num_heads, -1)
    out = sum(taps[..., j, None] * heads(j) for j in range(W))
    return jnp.reshape(out, (B, T, D)).astype(v.dtype)

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
