"""Hyena: gates and convolutions as long as the sequence, in turn."""

from __future__ import annotations

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.conv import UNIFORM, ShortConv, exists
from attnx.nn.linear import linear
from attnx.nn.mixer import refuse
from attnx.nn.position import working_dtype
from attnx.nn.recurrent import RecurrentCache, RecurrentMixer
from attnx.recurrence import chunks
from attnx.recurrence.convolution import long_convolution

TARGET, FAST, SLOW = 1e-2, 0.3, 1.5  # windows fall to 1 / 100 after these parts of max_length


class Hyena(RecurrentMixer):
  """(x_0 * v_n) W_o with v_{i+1} = h_i conv (g_i * v_i) + b_i (g_i * v_i) (arXiv:2302.10866).

  The order is n + 1: x_0, the gates g_{n-1} .. g_0 and the values v_0, in this order, are short
  convolutions of x W; h_i are the n filters of each channel, see `ImplicitFilter`, and b_i weighs
  the input itself. (B, T, D) to (B, T, D) in the dtype of `x`; filters and sums are float32.
  O(n T log T D), with packed documents O(n T log^2 T D), since each level of blocks has transforms
  of its own.

  There is no state of constant size: the cache holds the gated values of all tokens, n D numbers
  for each, and a step reads all of its room, O(n room D) for one token besides the filters, which
  are made anew, and a transform for several. Beyond its room a row is NaN until its next document.

  Args:
    dim: D.
    max_length: the longest sequence; time in the filters is counted in parts of it.
    order: n + 1, at least 2.
    width: taps of the short convolutions.
    filter_width, filter_depth, bands, frequency, shift: of `ImplicitFilter`.
    use_bias: whether W and W_o have biases.

  Raises:
    ValueError: `order` is below 2, or a sequence or the room of a cache exceeds `max_length`.
    NotImplementedError: a `context` is given.
  """

  def __init__(
    self,
    dim: int,
    *,
    max_length: int,
    order: int = 2,
    width: int = 3,
    filter_width: int = 64,
    filter_depth: int = 2,
    bands: int = 1,
    frequency: float = 1.0,
    shift: float = 0.0,
    use_bias: bool = True,
    rngs: nnx.Rngs,
  ):
    if order < 2:
      raise ValueError(f"order={order} must be at least 2: one convolution and two gates")
    self.project = linear(dim, (order + 1) * dim, use_bias=use_bias, rngs=rngs)
    self.conv = ShortConv((order + 1) * dim, width=width, use_bias=True, rngs=rngs)
    self.filter = ImplicitFilter(
      dim, order - 1, max_length=max_length, width=filter_width, depth=filter_depth, bands=bands,
      frequency=frequency, shift=shift, rngs=rngs,
    )  # fmt: skip
    self.skip = nnx.Param(jax.random.normal(rngs.params(), (dim, order - 1)))
    self.out = linear(dim, dim, use_bias=use_bias, rngs=rngs)

  def empty(self, batch, room: int = 0):
    """What is remembered of no tokens; a call remembers nothing, and so wants no room."""
    inputs = jnp.zeros((batch, room, *self.skip.shape))
    there = jnp.zeros((batch, room), bool)
    return dict(conv=self.conv.init_cache(batch), inputs=inputs, there=there)

  def init_cache(self, batch, length):
    self._check(length)
    return RecurrentCache.empty(self.empty(batch, length))

  def run(self, x, past, tokens):
    self._check(x.shape[1])
    streams, conv = self._streams(x, past["conv"], tokens)
    segment = joined_segment(tokens, past["there"])
    y, inputs = self._recur(streams, streams[-1][..., None], past["inputs"], segment)
    if not past["there"].shape[1]:  # a call, after which nothing comes
      return self.out(y[..., 0].astype(x.dtype)), past
    after, lost = self._remember(past["there"], inputs, tokens, segment)
    y = jnp.where(lost, jnp.nan, y)[..., 0]
    return self.out(y.astype(x.dtype)), after | dict(conv=conv)

  def values(self, x, *, tokens=None):
    return self._streams(x, None, tokens)[0][-1][..., None]

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    self._check(x.shape[1])
    past = self.empty(x.shape[0])
    streams, _ = self._streams(x, past["conv"], tokens)
    segment = joined_segment(tokens, past["there"])
    return self._recur(streams, values, past["inputs"], segment)[0].astype(values.dtype)

  def _remember(self, there, inputs, tokens, segment):
    """The last `room` inputs of the last document, and (B, 1, 1, 1) whether there were more."""
    B, room = there.shape
    count = inputs.shape[1] - room
    here = jnp.ones((1, count), bool) if tokens is None else jnp.asarray(tokens.position) >= 0
    there = jnp.concatenate([there, jnp.broadcast_to(here, (B, count))], axis=1)
    there, inputs = last_document(there, segment), last_document(inputs, segment)
    lost = there[:, :count].any(axis=1)[:, None, None, None]
    inputs = jnp.where(lost, jnp.nan, inputs[:, count:])
    return dict(inputs=inputs, there=there[:, count:]), lost

  def _check(self, length):
    if length > self.filter.max_length:
      raise ValueError(f"{length} tokens exceed max_length={self.filter.max_length}")

  def _streams(self, x, past, tokens):
    """x_0, the gates and the values, (B, T, D) each, and what the convolution remembers."""
    u, past = self.conv.convolve(self.project(x), past, tokens)
    u = exists(u, tokens)  # again, since the convolution has a bias
    return jnp.split(u, self.skip.shape[1] + 2, axis=-1), past

  def _recur(self, streams, v, past, segment):
    """Heads of values v (B, T, D, V), and all inputs of the filters (B, room + T, D, n) for V = 1.

    `past` (B, room, D, n) are their earlier inputs, and `segment` are documents of both.
    """
    x0, *gates, _ = streams
    length = min(past.shape[1] + v.shape[1], self.filter.max_length)
    filters, inputs = self.filter(length).astype(working_dtype(v)), []
    for i, gate in enumerate(reversed(gates)):
      v = gate[..., None] * v
      before = past[..., i : i + 1].astype(v.dtype)
      before = jnp.broadcast_to(before, (*before.shape[:3], v.shape[3]))
      joined = jnp.concatenate([before, v], axis=1)
      inputs.append(joined[..., :1])
      convolve = lambda x: last_outputs(x, filters[..., i], v.shape[1], segment)
      skipped = self.skip[...][:, i, None].astype(v.dtype) * v
      v = jax.vmap(convolve, in_axes=-1, out_axes=-1)(joined) + skipped
    return x0[..., None] * v, jnp.concatenate(inputs, axis=-1)


class ImplicitFilter(nnx.Module):
  """h_t = MLP(z_t) (exp(-|delta| t / (L - 1)) + shift), z_t = (t / (L - 1), cos f w_t, -sin f w_t).

  w_t = 2 pi t / L for lags t = 0 .. L - 1, L = max_length, and there are `bands` numbers f evenly
  from 1e-4 to bands - 1. The MLP has `depth` + 1 hidden layers of sin(s * y), whose learned s is
  one for all layers, as in the code of the authors, and its weights begin uniform within 1 /
  sqrt(inputs). |delta| is even over channels from log(100) / 1.5 to log(100) / 0.3. Features stay
  as they are, where the authors train them at a rate of their own. float32.

  Args:
    dim: D.
    count: filters for each channel.
    max_length: L.
    width: of hidden layers.
    depth: hidden layers after the first.
    bands: pairs of features besides time.
    frequency: s at first; 14 in the language models of the paper, with 16 bands.
    shift: what the window falls to.
  """

  def __init__(
    self,
    dim: int,
    count: int,
    *,
    max_length: int,
    width: int = 64,
    depth: int = 2,
    bands: int = 1,
    frequency: float = 1.0,
    shift: float = 0.0,
    rngs: nnx.Rngs,
  ):
    if max_length < 1 or bands < 1:
      raise ValueError(f"max_length={max_length} and bands={bands} must be at least 1")
    self.max_length, self.bands, self.shift, self.shape = max_length, bands, shift, (dim, count)
    sizes = [1 + 2 * bands] + [width] * (depth + 1)
    self.hidden = nnx.List([
      linear(n, m, use_bias=True, kernel_init=UNIFORM, bias_init=within(n**-0.5), rngs=rngs)
      for n, m in zip(sizes, sizes[1:])
    ])  # fmt: skip
    self.out = linear(width, dim * count, kernel_init=UNIFORM, rngs=rngs)
    self.frequency = nnx.Param(jnp.full(width, frequency, jnp.float32))

  def __call__(self, length: int) -> jax.Array:
    """The taps of the first `length` lags, (length, D, count)."""
    lag = jnp.arange(length, dtype=float)[:, None]
    time = lag / max(self.max_length - 1, 1)
    angle = np.linspace(1e-4, self.bands - 1, self.bands) * (2 * np.pi / self.max_length) * lag
    y = jnp.concatenate([time, jnp.cos(angle), -jnp.sin(angle)], axis=1)
    for layer in self.hidden:
      y = jnp.sin(self.frequency[...] * layer(y))
    slow, fast = (-math.log(TARGET) / part for part in (SLOW, FAST))
    window = jnp.exp(-time * np.linspace(slow, fast, math.prod(self.shape))) + self.shift
    return (self.out(y) * window).reshape(length, *self.shape)


def within(bound: float):
  """Initialises uniformly between -bound and bound."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def last_outputs(x: jax.Array, kernel: jax.Array, count: int, segment: jax.Array | None):
  """The last `count` outputs (B, count, D) of a convolution of x (B, S, D) with kernel (L, D)."""
  if count > 1:
    return long_convolution(x, kernel, segment=segment)[:, -count:]
  L = min(x.shape[1], kernel.shape[0])  # of one document, or the past were empty
  wide = x[:, -L:].astype(working_dtype(x))
  return jnp.einsum("bld,ld->bd", wide, kernel[:L][::-1])[:, None].astype(x.dtype)


def joined_segment(tokens: Tokens | None, there: jax.Array) -> jax.Array | None:
  """Documents (#B, room + T) of a past (B, room), which is of the first token's, and of tokens."""
  if tokens is None:
    return None
  segment = jnp.asarray(tokens.segment)
  past = jnp.broadcast_to(segment[:, :1], (segment.shape[0], there.shape[1]))
  return jnp.concatenate([past, segment], axis=1)


def last_document(x: jax.Array, segment: jax.Array | None) -> jax.Array:
  """x (B, S, ...), zero where it is of another document than the last token."""
  runs = chunks.runs(segment, x.shape[0], x.shape[1], x.shape[1])
  if runs is None:
    return x
  kept = runs.own[0] == runs.own[0][:, -1:]
  return jnp.where(kept.reshape(*kept.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


ENTRY = Entry(
  make=Hyena,
  paper="arXiv:2302.10866",
  facts={"streaming", "linear_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(max_length=128, order=3, filter_width=8, bands=2),
  patterns={"causal_self": {}},
)
