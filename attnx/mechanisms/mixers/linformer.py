"""Linformer: softmax attention over keys and values compressed to a fixed number of rows."""

from __future__ import annotations

from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, attend
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.attention import dropping
from attnx.nn.implicit import look
from attnx.nn.linear import linear
from attnx.nn.mixer import Mixer, refuse


class Linformer(Mixer):
  """softmax(q (E^T k)^T / sqrt(H)) (F^T v), with E and F (S, rank) learned over positions.

  Shorter sequences use the first rows of E and F. A token at position n meets row n wherever it
  stands in the array, and padding is left out of the sums, so that all `rank` rows stay visible.
  Compression mixes keys before any query sees them: there is no causal form, and documents packed
  in one row would see each other. (B, T, D) to (B, T, D) in the dtype of `x`; sums over keys are
  float32. O((T + S) rank). arXiv:2006.04768.

  Args:
    dim: D.
    length: the longest sequence of keys, the number of rows of E and F.
    rank: rows after compression.
    num_heads: N.
    num_kv_heads: K; None means N.
    head_dim: H; None means D / N.
    context_dim: width of `context`; None means D.
    sharing: "none" gives each key head its own E and F, "head" one E and one F to all of them, "kv"
      one matrix that is both.
    dropout: rate at which weights are dropped when a `key` is given.
    rngs: initialises the projections, and E and F by Xavier with gain 1 / sqrt(2).

  Raises:
    ValueError: numbers of heads do not divide, or a sequence or a known position exceeds `length`.
    NotImplementedError: keys are in several documents, or in documents not known before compiling;
      or `sharing="layer"`, since one E for all layers is no part of one of them.
  """

  def __init__(
    self,
    dim: int,
    *,
    length: int,
    rank: int = 128,
    num_heads: int = 8,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    context_dim: int | None = None,
    sharing: Literal["none", "head", "kv"] = "head",
    dropout: float = 0.0,
    rngs: nnx.Rngs,
  ):
    K = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % K or (head_dim is None and dim % num_heads):
      raise ValueError(f"num_heads={num_heads} must divide dim={dim}, and num_kv_heads={K} it")
    if sharing == "layer":
      raise NotImplementedError("sharing='layer' would need one matrix in several mixers")
    if sharing not in ("none", "head", "kv"):
      raise ValueError(f"sharing={sharing!r} is not one of 'none', 'head' and 'kv'")
    H, source = dim // num_heads if head_dim is None else head_dim, context_dim or dim
    self.length, self.dropout = length, dropout
    self.query = linear(dim, (num_heads, H), rngs=rngs)
    self.key, self.value = (linear(source, (K, H), rngs=rngs) for _ in range(2))
    self.out = linear((num_heads, H), dim, rngs=rngs)
    init = jax.nn.initializers.variance_scaling(0.5, "fan_avg", "uniform", batch_axis=0)
    shape = (K if sharing == "none" else 1, length, rank)
    compressor = lambda: nnx.Param(init(rngs.params(), shape, jnp.float32))
    self.compress_key = compressor()
    self.compress_value = None if sharing == "kv" else compressor()

  def __call__(self, x, *, context=None, tokens=None, context_tokens=None, key=None):
    v = self.values(x if context is None else context)
    where = dict(context=context, tokens=tokens, context_tokens=context_tokens)
    look(self, x, **where)
    return self.out(self.mix(x, v, **where, key=key).astype(x.dtype))

  def values(self, x, *, tokens=None):
    return self.value(x)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None, key=None):
    if context is None:
      refuse(self, context_tokens=context_tokens)
      context, context_tokens = x, tokens
    check_one_document(tokens)
    check_one_document(context_tokens)
    rows = rows_of(context_tokens, context.shape[1], self.length)
    k = compress(self.key(context), self.compress_key[...], rows)
    other = self.compress_key if self.compress_value is None else self.compress_value
    v = compress(values, other[...], rows)
    return attend(
      self.query(x), k, v, dropping(AttentionSpec(), key, self.dropout), q_tokens=tokens
    )


def check_one_document(tokens: Tokens | None) -> None:
  """Raises unless each row is known to hold one document."""
  if tokens is None:
    return
  if isinstance(tokens.segment, jax.core.Tracer):
    raise NotImplementedError("linformer cannot keep documents apart: segments must be known")
  segment, there = np.asarray(tokens.segment), np.ones(tokens.position.shape, bool)
  if not isinstance(tokens.position, jax.core.Tracer):  # else padding must have its row's document
    there = np.asarray(tokens.position) >= 0
  ends = np.iinfo(segment.dtype)
  first, last = np.where(there, segment, ends.max).min(1), np.where(there, segment, ends.min).max(1)
  if (first < last).any():
    raise NotImplementedError("linformer cannot keep documents apart; give one to a row")


def rows_of(tokens: Tokens | None, count: int, length: int) -> jax.Array | None:
  """The row of E of each key (#B, S), negative where no key is; None means the first `count`."""
  if count > length:
    raise ValueError(f"got {count} keys; expected at most length={length}")
  if tokens is None:
    return None
  position = tokens.position
  if not isinstance(position, jax.core.Tracer) and np.max(position) >= length:
    raise ValueError(f"position {np.max(position)} has no row; expected less than length={length}")
  return position


def compress(x: jax.Array, matrix: jax.Array, rows: jax.Array | None) -> jax.Array:
  """sum_s matrix_{row of s} x_s, (B, S, K, H) and (K or 1, length, rank) to (B, rank, K, H)."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  matrix = jnp.broadcast_to(matrix, (x.shape[2], *matrix.shape[1:]))
  if rows is None:
    y = jnp.einsum("bskh,ksr->brkh", wide, matrix[:, : x.shape[1]])
  else:  # a position beyond the matrix that is only known at run time gives NaN, not another's row
    rows = jnp.broadcast_to(jnp.asarray(rows), x.shape[:2])
    taken = matrix.at[:, jnp.maximum(rows, 0)].get(mode="fill", fill_value=jnp.nan)
    taken = jnp.where(rows[None, ..., None] >= 0, taken, 0.0)
    y = jnp.einsum("bskh,kbsr->brkh", wide, taken)
  return y.astype(x.dtype)


ENTRY = Entry(
  make=Linformer,
  paper="arXiv:2006.04768",
  facts={"linear_in_values"},
  tiny=dict(length=32, rank=5, num_heads=4, num_kv_heads=2),
  patterns={"noncausal_self": {}, "noncausal_cross": {}},
)
