"""Relative attention of the Music Transformer (Huang et al., 2018)."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.attention.transforms import Transform
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class MusicRelative(Transform):
  """s + scale <q, embedding[n, M - 1 - d]> for 0 <= d < M, with d = position_q - position_k.

  Pairs outside of the table get nothing, where Shaw's get the vector of its end; among them are
  keys after the query, unless there are 2 M - 1 rows (`bidirectional`), whose last is the key M - 1
  ahead. A query meets its rows once, in `table`, and pairs gather, which is what skewing does, at
  any positions; memory is O(T M), never O(T^2 H). The value side of the paper's predecessor is not
  part of it (arXiv:1809.04281).

  Attributes:
    embedding: (N, M, H) or, shared by all heads, (M, H); with 2 M - 1 for M if bidirectional.
    bidirectional: whether the table goes on after the query.
  """

  embedding: jax.Array
  bidirectional: bool = struct.static(False)

  @property
  def needs(self) -> frozenset[str]:
    return frozenset({"parameters", "heads"} if self.embedding.ndim == 3 else {"parameters"})

  def table(self, query: jax.Array) -> jax.Array:
    product = "btnh,nrh->btnr" if self.embedding.ndim == 3 else "btnh,rh->btnr"
    return jnp.einsum(product, query, jnp.asarray(self.embedding).astype(query.dtype))

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    rows = q.table.size
    origin = rows // 2 if self.bidirectional else rows - 1
    row = origin - (q.position - k.position)
    inside = (row >= 0) & (row < rows)
    return scores + jnp.where(inside, q.table.at(jnp.clip(row, 0, rows - 1)), 0.0)


def music_relative(
  num_heads: int,
  head_dim: int,
  max_distance: int = 512,
  bidirectional: bool = False,
  shared: bool = False,
  *,
  rngs: nnx.Rngs,
) -> MusicRelative:
  """`MusicRelative` for distances below M = `max_distance`, drawn with variance 1 / H.

  Args:
    num_heads: N.
    head_dim: H.
    max_distance: M, the distances 0 .. M - 1 that have a vector.
    bidirectional: also the distances ahead.
    shared: one table for all heads.
    rngs: source of the initial values.
  """
  if max_distance < 1:
    raise ValueError(f"max_distance={max_distance} must be at least 1, the query itself")
  rows = 2 * max_distance - 1 if bidirectional else max_distance
  shape = (rows, head_dim) if shared else (num_heads, rows, head_dim)
  embedding = jax.random.normal(rngs.params(), shape) * head_dim**-0.5
  return MusicRelative(embedding, bidirectional)


ENTRY = Entry(
  make=music_relative,
  paper="arXiv:1809.04281",
  facts={"relative"},
  tiny=dict(max_distance=5, bidirectional=True),
)
