"""What attention kernels are handed: what becomes of a tile of products, in plain `jnp`.

A kernel multiplies queries and keys, folds tiles, and multiplies weights and values. What stands
between the two products is an `Algebra`: functions of tiles that are traced into the kernel and
differentiated in place. No kernel knows a mask or a softmax.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
FLOOR = float(jnp.finfo(jnp.float32).min)


class Side(NamedTuple):
  """Facts about the tokens of one side of a tile, int32 each: (Q, 1) or (1, K), or turned."""

  index: jax.Array
  position: jax.Array
  segment: jax.Array


class Facts(NamedTuple):
  """Where a tile of pairs sits.

  Attributes:
    q, k: its tokens; the sides broadcast to the tile.
    batch, head: scalars; the head is that of the query.
    operands: a tile of each array that was handed to the kernel.
    turned: whether the tile is (K, Q).
  """

  q: Side
  k: Side
  batch: jax.Array
  head: jax.Array
  operands: tuple[jax.Array, ...] = ()
  turned: bool = False


@dataclasses.dataclass(frozen=True)
class Algebra:
  """Products q k^T of a tile to weights; all arrays are float32 tiles of one shape.

  Attributes:
    score: (products, facts) -> scores.
    visible: facts -> bool, which pairs meet; broadcasts to the tile. Called on PARTIAL tiles only.
    weigh: (scores, visible, peak) -> weights, zero where not visible; `visible` is True on FULL
      tiles, and `peak` is finite and broadcasts to the tile.
    edit: (weights, facts) -> the weights that read values.
    height: scores -> what the running peak of a row is the maximum of; None: weights are measured
      from zero.
    exp: the exponential in whose unit peaks are, `jnp.exp` or `jnp.exp2`: a partial that is
      measured from peak a is exp(a - b) times as large measured from b.
    signed: whether weights may be negative.
    turns: whether all of this may be asked about (K, Q) tiles; False where it looks along an axis.
  """

  score: Callable[[jax.Array, Facts], jax.Array]
  visible: Callable[[Facts], Any]
  weigh: Callable[[jax.Array, Any, jax.Array], jax.Array]
  edit: Callable[[jax.Array, Facts], jax.Array]
  height: Callable[[jax.Array], jax.Array] | None = None
  exp: Callable[[jax.Array], jax.Array] = jnp.exp
  signed: bool = True
  turns: bool = True

  def peak(self, scores: jax.Array, visible: Any, axis: int) -> jax.Array:
    """The height of the highest visible pair along the keys, -inf where there is none."""
    assert self.height is not None
    height = self.height(scores)
    height = height if visible is True else jnp.where(visible, height, -jnp.inf)
    return jnp.max(height, axis=axis, keepdims=True)
