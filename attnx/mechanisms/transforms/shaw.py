"""Relative position representations (Shaw et al., 2018)."""

from __future__ import annotations

from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.attention.transforms import Readout, Transform
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class RelativeValues(Readout):
  """sum_j w_j values[clip(position_j - position_q, -R, R) + R], by the weight of each distance.

  Attributes:
    values: (2 R + 1, V), float32, shared by all heads.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"parameters"})

  values: jax.Array

  def __call__(self, weights: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    B, N, T, _ = weights.shape
    relation = _relation(q, k, self.values.shape[0])
    at = (jnp.arange(B)[:, None, None, None], jnp.arange(N)[:, None, None], jnp.arange(T)[:, None])
    mass = jnp.zeros((B, N, T, self.values.shape[0]), weights.dtype)
    mass = mass.at[(*at, jnp.broadcast_to(relation, weights.shape))].add(weights)
    return jnp.einsum("bntr,rv->bntv", mass, jnp.asarray(self.values).astype(weights.dtype))


@struct.dataclass
class RelativeKeys(Transform):
  """s + scale <q, keys[clip(position_k - position_q, -R, R) + R]>.

  A query meets its 2 R + 1 vectors once, in `table`; pairs only gather, so that memory is O(T R)
  and not O(T S H) (arXiv:1803.02155).

  Attributes:
    keys: (2 R + 1, H), float32, shared by all heads.
    readout: the relative values that belong to them; None for none.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"parameters"})

  keys: jax.Array
  readout: RelativeValues | None = None

  def table(self, query: jax.Array) -> jax.Array:
    return jnp.einsum("btnh,rh->btnr", query, jnp.asarray(self.keys).astype(query.dtype))

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    return scores + q.table.at(_relation(q, k, q.table.size))


def _relation(q: Tokens, k: Tokens, size: int) -> jax.Array:
  """Which of the `size` vectors belongs to each pair."""
  reach = size // 2
  return jnp.clip(k.position - q.position, -reach, reach) + reach


def shaw(
  head_dim: int,
  max_distance: int = 16,
  value_dim: int | None = None,
  *,
  values: bool = True,
  rngs: nnx.Rngs,
) -> RelativeKeys:
  """`RelativeKeys` that bring their `RelativeValues` along, as in the paper.

  Args:
    head_dim: H.
    max_distance: R, from which on distances are one.
    value_dim: V; None means H.
    values: whether there are relative values too; the paper does as well without.
    rngs: source of the Glorot-uniform initial values.
  """
  if max_distance < 0:
    raise ValueError(f"max_distance={max_distance} must not be negative")
  draw = lambda width: jax.nn.initializers.glorot_uniform()(
    rngs.params(), (2 * max_distance + 1, width)
  )
  keys = draw(head_dim)
  width = head_dim if value_dim is None else value_dim
  return RelativeKeys(keys, RelativeValues(draw(width)) if values else None)


ENTRY = Entry(
  make=shaw, paper="arXiv:1803.02155", facts={"relative"}, tiny=dict(max_distance=3)
)
