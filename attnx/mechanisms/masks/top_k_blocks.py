"""Blocks of keys chosen by their content (mixture of block attention)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.masks import Block, Mask, Span
from attnx.core import struct
from attnx.core.lookup import Table
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class SelectedBlocks(Mask):
  """selected[b, n, index_q // q_block, index_k // k_block].

  Attributes:
    selected: bool (#B, #N, ceil(T / q_block), ceil(S / k_block)).
    q_block, k_block: tokens of a block on either side.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"index"})

  selected: Any  # an array; a Table once it lies beside queries
  q_block: int = struct.static()
  k_block: int = struct.static()

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    if isinstance(self.selected, Table):
      return self.selected.at(k.index // self.k_block) > 0
    B, N = self.selected.shape[:2]
    row, head = (q.batch if B > 1 else 0), (q.head if N > 1 else 0)
    return jnp.asarray(self.selected)[row, head, q.index // self.q_block, k.index // self.k_block]

  def beside(self, q: Tokens) -> SelectedBlocks:
    block = jnp.asarray(q.index)[:, None, :] // self.q_block  # (#B, 1, T)
    ids = (jnp.arange(n).reshape(shape) if n > 1 else 0
           for n, shape in zip(self.selected.shape, ((-1, 1, 1), (1, -1, 1))))  # fmt: skip
    rows = jnp.asarray(self.selected)[(*ids, block)].astype(jnp.int32)
    return dataclasses.replace(self, selected=Table(rows))

  def block(self, q: Span, k: Span) -> Block:
    """From sums over rectangles of the table, which cost four look-ups a tile."""
    chosen = jnp.asarray(self.selected).sum((0, 1), dtype=jnp.int32)  # rows and heads alike
    total = jnp.pad(chosen.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    i, j = q.index.lo // self.q_block, k.index.lo // self.k_block
    u, v = q.index.hi // self.q_block + 1, k.index.hi // self.k_block + 1
    count = total[u, v] - total[i, v] - total[u, j] + total[i, j]
    area = self.selected.shape[0] * self.selected.shape[1] * (u - i) * (v - j)
    return Block(empty=count == 0, full=count == area)


def top_k_blocks(scores: jax.Array, top_k: int, q_block: int, k_block: int) -> SelectedBlocks:
  """The `top_k` key blocks of each query block with the largest scores, the first where they tie.

  Args:
    scores: (#B, #N, nq, nk); -inf is never chosen, +inf always, and counts among the `top_k`.
    top_k: blocks that a query block sees, fewer where fewer are above -inf.
    q_block, k_block: tokens of a block on either side.
  """
  if min(top_k, q_block, k_block) < 1:
    raise ValueError(f"top_k={top_k}, q_block={q_block}, k_block={k_block} must be at least 1")
  scores = jax.lax.stop_gradient(jnp.asarray(scores))
  _, best = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))
  chosen = jnp.put_along_axis(jnp.zeros(scores.shape, bool), best, True, -1, inplace=False)
  return SelectedBlocks((chosen & (scores > -jnp.inf)) | (scores == jnp.inf), q_block, k_block)


def select(
  query: jax.Array,
  key: jax.Array,
  q_tokens: Tokens | None = None,
  k_tokens: Tokens | None = None,
  *,
  top_k: int,
  k_block: int,
  q_block: int = 1,
  causal: bool = True,
) -> SelectedBlocks:
  """The key blocks j with the largest <query_i, mean of the keys of j>; MoBA where q_block = 1.

  Causal: blocks that lie wholly before the query compete, and the blocks that hold positions of
  the query block are always chosen and count among the `top_k`; combine with `Causal()`. The first
  query speaks for its block, since a mean would let it hear later ones. Not causal: all blocks
  compete, for the mean of the queries. Padding has no part in a mean, and blocks of other documents
  do not compete. Computed in float32, without gradients (arXiv:2502.13189).

  Args:
    query: (B, T, N, H).
    key: (B, S, K, H), K divides N.
    q_tokens, k_tokens: where they sit, as in `attend`.
    top_k: key blocks that a query block sees.
    k_block, q_block: tokens of a block; the last may be short.
    causal: see above.
  """
  q_tokens = Tokens.of_length(query.shape[1]) if q_tokens is None else q_tokens
  k_tokens = Tokens.of_length(key.shape[1]) if k_tokens is None else k_tokens
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  q_mean, at = _summary(query.astype(dtype), q_tokens, q_block, first=causal)
  k_mean, of = _summary(key.astype(dtype), k_tokens, k_block)
  B, nq, N, H = q_mean.shape
  grouped = q_mean.reshape(B, nq, k_mean.shape[2], -1, H)
  scores = jnp.einsum("bikgh,bjkh->bkgij", grouped, k_mean).reshape(B, N, nq, -1)
  rows, columns = lambda x: x[:, None, :, None], lambda x: x[:, None, None, :]
  (p_lo, p_hi, s_lo, s_hi), (r_lo, r_hi, z_lo, z_hi) = map(rows, at), map(columns, of)
  allowed = (s_lo <= z_hi) & (z_lo <= s_hi) & (p_lo <= p_hi) & (r_lo <= r_hi)
  if causal:
    own = (r_hi >= p_lo) & (r_lo <= p_hi)
    scores = jnp.where(own, jnp.inf, jnp.where(r_hi < p_lo, scores, -jnp.inf))
  return top_k_blocks(jnp.where(allowed, scores, -jnp.inf), top_k, q_block, k_block)


def _summary(x: jax.Array, tokens: Tokens, block: int, first: bool = False):
  """Mean (or first) vector of each block, and its ranges of positions and segments, (#B, n)."""
  missing = -x.shape[1] % block
  split = lambda y, fill: jnp.pad(y, ((0, 0), (0, missing)), constant_values=fill).reshape(
    y.shape[0], -1, block
  )
  exists = split(jnp.asarray(tokens.position), -1) >= 0
  ranges = []
  for each in (tokens.position, tokens.segment):
    values = split(jnp.asarray(each), -1)
    limit = jnp.iinfo(values.dtype)
    ranges += [jnp.where(exists, values, limit.max).min(-1)]
    ranges += [jnp.where(exists, values, limit.min).max(-1)]
  x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
  x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
  weight = exists
  if first:
    weight = exists & (exists.cumsum(-1) == 1)
  weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)
  return jnp.einsum("binkh,bin->bikh", x, jnp.broadcast_to(weight, x.shape[:3])), ranges


TINY = dict(
  scores=((((3.0, 1.0, 2.0), (0.0, 5.0, 1.0), (1.0, 2.0, 3.0)),),),
  top_k=2,
  q_block=4,
  k_block=4,
)
ENTRY = Entry(make=top_k_blocks, paper="arXiv:2502.13189", tiny=TINY)
