"""Transformer-VQ: softmax attention over quantised keys, in linear time (Lingle, 2023)."""

from __future__ import annotations

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.aside import Average, Loss, aside
from attnx.nn.codebook import Codebook
from attnx.nn.linear import RMSNorm, linear
from attnx.nn.mixer import Mixer, observed, refuse
from attnx.nn.position import working_dtype
from attnx.nn.rotary import angles, frequencies
from attnx.recurrence.quantised import (
  Keys,
  Past,
  Relative,
  quantised_attention,
  quantised_weights,
)


class TransformerVQ(Mixer):
  """softmax_s((q_t + a) . c_{z_s} + b_{t - s}) v_s . silu(gate), z_s = argmin_z |k_s - c_z|.

  b_d = (q_t + e) . r_d for 0 <= d <= M and 0 beyond, r = sinusoid(d) W_r. Queries and keys are
  normalised to RMS H^(-1/4) and values pass a silu. Scores of keys of one code that are further
  away than M are equal, so that a code's count and mean value stand for all of them, log(count)
  added to its score: exactly quadratic attention over quantised keys, in O(T (C + M + R)). Tokens
  are taken in blocks of C; a query meets those of its block and the M before it one by one. What is
  older is met by code, where keys have no gradient but values do: a key learns, straight through
  its codeword, from the queries that met it one by one.

  The codebook is not trained by the loss: sums and counts of the keys of a batch move it, as an
  `nn.aside.Average`. Training adds `commitment` times the mean of |k - c_z|^2 over tokens, summed
  over heads and layers, to its loss. The norm before the paper's unit is a block's to give, and
  dropout of sinusoids is left out.

  (B, T, D) to (B, T, D) in the dtype of `x`; queries, keys, codes and means are float32. Documents
  packed in a row start with an empty past. arXiv:2309.16354.

  Args:
    dim: D.
    num_heads: N.
    num_kv_heads: K, of keys, codebooks and values; None means N.
    head_dim: H.
    value_dim: V; None means 2 D / N.
    num_codes: R.
    block: C.
    memory: M; None means C.
    commitment: factor of the loss that draws keys to their codewords.
    base: of the sinusoids, whose slowest wave has a period of about 2 pi base tokens.

  Raises:
    ValueError: heads do not divide, D is odd, or a size is not positive.
    NotImplementedError: a `context` is given.
  """

  learns_aside = True

  def __init__(
    self,
    dim: int,
    *,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    head_dim: int = 128,
    value_dim: int | None = None,
    num_codes: int = 512,
    block: int = 512,
    memory: int | None = None,
    commitment: float = 1e-4,
    base: float = 100_000.0,
    rngs: nnx.Rngs,
  ):
    N, H, R = num_heads, head_dim, num_codes
    K, M = N if num_kv_heads is None else num_kv_heads, block if memory is None else memory
    if min(N, K, H, R, block, M) < 1:
      raise ValueError(f"heads, head_dim={H}, num_codes={R}, block={block}, memory={M} are below 1")
    if N % K or (value_dim is None and 2 * dim % N):
      raise ValueError(f"num_kv_heads={K} must divide num_heads={N}, and that 2 dim={2 * dim}")
    V = 2 * dim // N if value_dim is None else value_dim
    self.block, self.memory, self.base, self.size = block, M, base, H**-0.25
    self.commitment = commitment
    init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    options: dict[str, Any] = dict(rngs=rngs, kernel_init=init)
    self.query, self.key = linear(dim, (N, H), **options), linear(dim, (K, H), **options)
    self.value, self.gate = linear(dim, (K, V), **options), linear(dim, (N, V), **options)
    self.distance = linear(dim, (K, H), **options)
    self.out = linear((N, V), dim, **options)
    self.content_bias, self.relative_bias = (nnx.Param(jnp.zeros((N, H))) for _ in range(2))
    self.norm = RMSNorm(H, use_scale=False, rngs=rngs)
    self.code_sum = Average(jax.random.normal(rngs.params(), (K, R, H)) * R**-0.5)
    self.code_count = Average(jnp.ones((K, R)))

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    del key  # nothing drops
    refuse(self, context=context, context_tokens=context_tokens)
    self.aside(x, tokens)
    return self.project(self.mix(x, self.values(x), tokens=tokens), x)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    past = self.nothing(x.shape[0], values.shape[-1], working_dtype(values))
    heads, _ = self.read(x, values, past, tokens)
    if observed(self):
      self.sow(nnx.Intermediate, "weights", self.weights(x, tokens))
      self.sow(nnx.Intermediate, "heads", heads)
    return heads

  def init_cache(self, batch: int, length: int) -> Past:
    del length  # the past does not grow
    return self.nothing(batch, self.out.kernel.shape[1], jnp.float32)

  def step(self, x, cache, *, tokens=None):
    heads, cache = self.read(x, self.values(x), cache, tokens)
    return self.project(heads, x), cache

  @property
  def codebook(self) -> Codebook:
    """The codebook of keys."""
    return Codebook(self.code_sum[...], self.code_count[...])

  def aside(self, x: jax.Array, tokens: Tokens | None) -> None:
    """Sows the commitment loss, and the sums and counts that move the codebook."""
    if observed(self, Loss):
      k, there = self.keys(x), place(x, tokens)[0] >= 0
      batch = self.codebook.of(k, there)
      aside(self, Loss, "commit", self.commitment * self.codebook.commitment(k, there))
      aside(self, Average, "code_sum", batch.sum)
      aside(self, Average, "code_count", batch.count)

  def weights(self, x: jax.Array, tokens: Tokens | None = None) -> jax.Array:
    """What a call multiplies values by, (B, N, T, T). Quadratic; for analysis."""
    k, book = self.keys(x), self.codebook
    k = book.quantise(k, book.nearest(k))
    return quantised_weights(self.queries(x), k, *place(x, tokens), self.relative(x))

  def read(self, x, values, past: Past, tokens: Tokens | None) -> tuple[jax.Array, Past]:
    """Heads (B, T, N, V) after a past, and the past after them."""
    k, book = self.keys(x), self.codebook
    code = book.nearest(k)
    position, segment = place(x, tokens)
    if tokens is None:  # the document of the past goes on
      position, segment = past.seen[:, None] + position, past.segment[:, None] + segment
    keys = Keys(book.quantise(k, code), values, code, position)
    return quantised_attention(
      self.queries(x), keys, segment, book.codewords(), self.relative(x), past,
      block=self.block, gaps=tokens is not None,
    )  # fmt: skip

  def nothing(self, batch: int, width: int, dtype: Any) -> Past:
    """The past of the first token, for values of this width."""
    return Past.empty(batch, self.memory, self.code_sum.shape, width, dtype)

  def queries(self, x: jax.Array) -> jax.Array:
    """q + a: (B, T, D) to (B, T, N, H)."""
    return self.sized(self.query(x)) + self.content_bias[...] * self.size

  def keys(self, x: jax.Array) -> jax.Array:
    """k, not quantised: (B, S, D) to (B, S, K, H)."""
    return self.sized(self.key(x))

  def values(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """v: (B, S, D) to (B, S, K, V)."""
    return jax.nn.silu(self.value(x))

  def sized(self, x: jax.Array) -> jax.Array:
    """x at RMS H^(-1/4), in float32 at least: rounding is not to choose the nearest codeword."""
    return self.norm(x.astype(working_dtype(x))) * self.size

  def relative(self, x: jax.Array) -> Relative:
    """b, in the working dtype of `x`."""
    dtype = working_dtype(x)
    angle = angles(jnp.arange(self.memory + 1), frequencies(x.shape[-1], self.base), dtype)
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    shift = self.relative_bias[...] - self.content_bias[...]
    return Relative(self.distance(waves) * self.size, shift * self.size)

  def project(self, heads: jax.Array, x: jax.Array) -> jax.Array:
    """What is mixed, (B, T, N, V), gated, to (B, T, D)."""
    return self.out(heads.astype(x.dtype) * jax.nn.silu(self.gate(x)))


def place(x: jax.Array, tokens: Tokens | None) -> tuple[jax.Array, jax.Array]:
  """Positions and segments of x (B, T, D), int32 (B, T)."""
  tokens = Tokens.of_length(x.shape[1]) if tokens is None else tokens
  whole = lambda x_: jnp.broadcast_to(jnp.asarray(x_, jnp.int32), x.shape[:2])
  return whole(tokens.position), whole(tokens.segment)


ENTRY = Entry(
  make=TransformerVQ,
  paper="arXiv:2309.16354",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6, num_codes=5, block=4, memory=3),
  patterns={"causal_self": {}},
)
