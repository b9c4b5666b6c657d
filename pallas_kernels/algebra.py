"""What attention kernels are handed: what becomes of a tile of products, in plain `jnp`.

A kernel multiplies queries and keys, folds tiles, and multiplies weights and values. What stands
between the two products is an `Algebra`: functions of tiles that are traced into the kernel and
differentiated in place. No kernel knows a mask or a softmax.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.scaled import Scaled

LANES = 128
FLOOR = float(jnp.finfo(jnp.float32).min)


class Side(NamedTuple):
  """Facts about the tokens of one side of a tile, int32 each: (Q, 1) or (1, K), or turned."""

  index: jax.Array  # type: ignore[assignment]  # hides the method of tuples, as it should
  position: jax.Array
  segment: jax.Array


class Facts(NamedTuple):
  """Where a tile of pairs sits.

  Attributes:
    q, k: its tokens; the sides broadcast to the tile.
    batch, head: scalars; the head is that of the query.
    operands: a tile of each array that was handed to the kernel.
    turned: whether the tile is (K, Q).
    origin: (1, 1), a position near to those of the queries, where the sides cannot be sliced.
  """

  q: Side
  k: Side
  batch: Any
  head: Any
  operands: tuple[jax.Array, ...] = ()
  turned: bool = False
  origin: Any = None


@dataclasses.dataclass(frozen=True)
class Algebra:
  """Products q k^T of a tile to weights; all arrays are float32 tiles of one shape.

  Attributes:
    score: (products, facts) -> scores. Where there is `leading`, a third argument may tell by what
      products have been multiplied already.
    visible: facts -> bool, which pairs meet; broadcasts to the tile. Called on PARTIAL tiles only.
    weigh: (scores, visible, peak) -> weights, zero where not visible; `visible` is True on FULL
      tiles, and `peak` is finite and broadcasts to the tile.
    edit: (weights, facts) -> the weights that read values; None: they are.
    height: scores -> what the running peak of a row is the maximum of; None: weights are measured
      from zero.
    unit: what the peaks of heights are multiplied by: `weigh` does so to scores, pair by pair,
      where it subtracts the peak at once.
    exp: the exponential in whose unit peaks are, `jnp.exp` or `jnp.exp2`: a partial that is
      measured from peak a is exp(a - b) times as large measured from b.
    signed: whether weights may be negative.
    drops: whether a score of -inf has weight zero, so that masking scores is enough; `weigh` is
      then told True for `visible`.
    turns: whether all of this may be asked about (K, Q) tiles; False where it looks along an axis.
    counts: whether the visible keys of a row are counted; their number is 0 otherwise.
    leading: (shape of products, facts) -> the number by which `score` multiplies products before
      anything else, 1 if there is none: a kernel may do so to queries, and tell `masked`.
  """

  score: Callable[..., jax.Array]
  visible: Callable[[Facts], Any]
  weigh: Callable[[jax.Array, Any, jax.Array], jax.Array]
  edit: Callable[[jax.Array, Facts], jax.Array] | None = None
  height: Callable[[jax.Array], jax.Array] | None = None
  unit: float = 1.0
  exp: Callable[[jax.Array], jax.Array] = jnp.exp
  signed: bool = True
  drops: bool = False
  turns: bool = True
  counts: bool = True
  leading: Callable[[jax.ShapeDtypeStruct, Facts], float] = lambda products, facts: 1.0

  @property
  def base(self) -> float:
    """The natural logarithm of what `exp` is a power of."""
    return math.log(2) if self.exp is jnp.exp2 else 1.0

  def told(
    self, size: jax.Array, slope: jax.Array, pulled: Callable[[], jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    """What gradients measure weights from, and the cotangent of what they are divided by.

    Where the algebra has peaks, the weights of a row add up to 1, measured from the logarithm of
    their mass. One that sees nothing is measured from so far above that all its weights are 0.

    Args:
      size: the logarithm of the mass in the unit of peaks, or the mass where there are none.
      slope: the cotangent of `size`.
      pulled: the sums of output and cotangent along values, for each row; asked for with peaks.
    """
    if self.height is None:
      return jnp.zeros_like(size), slope
    return jnp.where(jnp.isneginf(size), -FLOOR, size), slope / self.base - pulled()

  def masked(
    self, products: jax.Array, facts: Facts, mask: bool, exist: Any = True, given: float = 1.0
  ) -> tuple[jax.Array, Any, Any]:
    """Scores, what is visible, and what `weigh` has to be told of it; all if not `mask`.

    Only pairs that `exist` are visible, for kernels that know of some that do not. Products have
    been multiplied by `given`, which is 1 or what `leading` says.
    """
    scores = self.score(products, facts, *([] if given == 1 else [given]))
    if not mask:
      return scores, True, True
    visible = jnp.broadcast_to(self.visible(facts) & exist, scores.shape)
    if not self.drops:
      return scores, visible, visible
    return jnp.where(visible, scores, -jnp.inf), visible, True

  def edited(self, weights: jax.Array, facts: Facts) -> jax.Array:
    """The weights that read values."""
    return weights if self.edit is None else self.edit(weights, facts)

  def peak(self, scores: jax.Array, visible: Any, axis: int) -> jax.Array:
    """The height of the highest visible pair along the keys, -inf where there is none."""
    assert self.height is not None
    height = self.height(scores)
    height = height if visible is True else jnp.where(visible, height, -jnp.inf)
    highest = jnp.max(height, axis=axis, keepdims=True)
    return highest if self.unit == 1 else highest * self.unit


def softmax(
  scale: float,
  *,
  score: Callable[[jax.Array, Facts], jax.Array] | None = None,
  visible: Callable[[Facts], Any] = lambda facts: True,
  edit: Callable[[jax.Array, Facts], jax.Array] | None = None,
  turns: bool = True,
  counts: bool = True,
  late: bool = False,
) -> Algebra:
  """exp(s) = 2^(s log2 e), with s = score(scale * product), as the exponential unit takes it.

  Factors are gathered: where no `score` stands between, scale and log2 e are one. The unit of
  peaks is that of base 2, so that peaks in nats are off by their rounding: meant for inputs below
  float32.

  Args:
    scale: factor on the products.
    score: edits of the scaled products; None for none.
    visible, edit, turns, counts: as in `Algebra`.
    late: scale, if there is no `score`, where the peak is subtracted, which is one instruction on
      GPUs; a TPU has the two apart.
  """
  unit = math.log2(math.e)
  factor = scale * unit if late and score is None and scale > 0 else 1.0  # of scores to peaks

  def scores_of(products: jax.Array, facts: Facts, given: float = 1.0) -> jax.Array:
    if score is None:
      return products if factor != 1 or given != 1 else products * (scale * unit)
    return Scaled(lambda products: score(products, facts), scale, unit)(products, given)

  def leading(products: jax.ShapeDtypeStruct, facts: Facts) -> float:
    if score is None:
      return scale * unit if factor == 1 else 1.0
    return Scaled(lambda products: score(products, facts), scale, unit).leading(products)

  def weigh(scores: jax.Array, seen: Any, peak: jax.Array) -> jax.Array:
    assert seen is True
    return jnp.exp2((scores if factor == 1 else scores * factor) - peak)

  return Algebra(
    scores_of, visible, weigh, edit,
    height=lambda scores: scores, unit=factor, exp=jnp.exp2, signed=False, drops=True, turns=turns,
    counts=counts, leading=leading,
  )  # fmt: skip
