"""Relative bias: one learned number for each head and distance (Mega's simple bias)."""

from __future__ import annotations

from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.attention.transforms import Transform
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class RelativeBias(Transform):
  """s + bias[M - 1 + position_k - position_q, n] (arXiv:2209.10655).

  Pairs that are M or more apart have the number of distance M - 1, where the paper's code refuses
  such sequences. Memory is O(M N), and pairs only gather.

  Attributes:
    bias: (2 M - 1, N), float32.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"parameters"})

  bias: jax.Array

  def table(self, query: jax.Array) -> jax.Array:
    return jnp.asarray(self.bias).astype(query.dtype).T[None, None]

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    farthest = q.table.size // 2
    distance = jnp.clip(k.position - q.position, -farthest, farthest)
    return scores + q.table.at(distance + farthest)


def relative_bias(num_heads: int, max_distance: int = 1024, *, rngs: nnx.Rngs) -> RelativeBias:
  """`RelativeBias` of M = `max_distance`, drawn from a normal distribution of deviation 0.02."""
  if max_distance < 1:
    raise ValueError(f"max_distance={max_distance} must be at least 1, the query itself")
  shape = (2 * max_distance - 1, num_heads)
  return RelativeBias(0.02 * jax.random.normal(rngs.params(), shape))


ENTRY = Entry(
  make=relative_bias, paper="arXiv:2209.10655", facts={"relative"}, tiny=dict(max_distance=5)
)
