"""T5 relative bias: one learned number for each head and bucket of distances (Raffel et al.)."""

from __future__ import annotations

import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention.transforms import Transform
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class T5Bias(Transform):
  """s + bias[bucket(position_k - position_q), n].

  With m buckets for a direction and x = |distance|, the bucket is x below m / 2, from there on
  m / 2 + floor(log(2 x / m) / log(2 reach / m) m / 2), and m - 1 from `max_distance` = reach on.
  Bidirectional: m is half of the buckets, and keys after the query have the second half. Otherwise
  m is all, and keys after the query share the bucket of distance 0. The bias is not scaled; T5
  itself sets `AttentionSpec.scale` to 1, and shares one table between the layers of a stack
  (arXiv:1910.10683).

  Attributes:
    bias: (num_buckets, N), float32.
    max_distance: where the last bucket ends at the latest.
    bidirectional: whether the sign of the distance matters.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"parameters"})

  bias: jax.Array
  max_distance: int = struct.static(128)
  bidirectional: bool = struct.static(True)

  def table(self, query: jax.Array) -> jax.Array:
    of_distance = buckets(self.bias.shape[0], self.max_distance, self.bidirectional)
    return jnp.asarray(self.bias)[of_distance].astype(query.dtype).T[None, None]

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    reach = self.max_distance
    distance = jnp.clip(k.position - q.position, -reach, reach)
    return scores + q.table.at(distance + reach)


@functools.cache
def buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
  """The bucket of every distance key - query from -max_distance to max_distance."""
  each = num_buckets // 2 if bidirectional else num_buckets
  exact = each // 2
  steps = each - exact

  def bucket(x: int) -> int:
    if x < exact:
      return x
    # floor of a logarithm in whole numbers: x / exact >= (max_distance / exact)^(j / steps)
    reached = lambda j: x**steps * exact**j >= exact**steps * max_distance**j
    return exact + max(j for j in range(steps) if reached(j))

  behind = [bucket(x) for x in range(max_distance, 0, -1)]
  ahead = [each + bucket(x) for x in range(1, max_distance + 1)]
  order = [*behind, 0, *(ahead if bidirectional else [0] * max_distance)]
  return np.array(order, np.int32)


def t5_bias(
  num_heads: int,
  num_buckets: int = 32,
  max_distance: int = 128,
  bidirectional: bool = True,
  *,
  rngs: nnx.Rngs,
) -> T5Bias:
  """`T5Bias` with a table drawn from the standard normal distribution.

  Raises:
    ValueError: fewer than two buckets a direction, or a max_distance that these count exactly.
  """
  each = num_buckets // 2 if bidirectional else num_buckets
  if each < 2 or num_buckets % (1 + bidirectional) or max_distance <= each // 2:
    raise ValueError(
      f"num_buckets={num_buckets} must be even where bidirectional, at least 2 a direction, and "
      f"max_distance={max_distance} above half of those"
    )
  table = jax.random.normal(rngs.params(), (num_buckets, num_heads))
  return T5Bias(table, max_distance, bidirectional)


ENTRY = Entry(
  make=t5_bias,
  paper="arXiv:1910.10683",
  facts={"relative"},
  tiny=dict(num_buckets=8, max_distance=6),
)
