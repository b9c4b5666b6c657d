"""Sigmoid attention (Ramapuram et al., 2024)."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class Sigmoid(Normaliser):
  """w_j = sigmoid(s_j + bias), which no other key of the row has a part in (arXiv:2409.04431).

  Attributes:
    bias: -log(n) for training on rows of n keys; with 0 outputs grow like n.
  """

  counts: ClassVar[bool] = False

  bias: float = struct.static()

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    return jnp.where(visible, jax.nn.sigmoid(scores + self.bias), 0.0)

  def finish(self, p: Partial) -> jax.Array:
    return p.out


@struct.dataclass
class SigmoidOfRow(Sigmoid):
  """w_j = sigmoid(s_j - log n), where n is the number of keys that the row can see.

  Ours: the paper keeps the n of training. The bias is then that of the row at any length, but the
  weight of a key depends on how many others there are, so that the whole row is needed.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"row"})

  bias: float = struct.static(0.0)

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    count = jnp.broadcast_to(visible, scores.shape).sum(-1, keepdims=True, dtype=scores.dtype)
    return super().weigh(scores - jnp.log(jnp.maximum(count, 1.0)), visible, peak)


def sigmoid(length: int | None = None, bias: float | None = None, row: bool = False) -> Sigmoid:
  """`Sigmoid` of bias -log(length) or `bias`; `row`: `SigmoidOfRow`.

  Raises:
    ValueError: not exactly one of the three is given, or length is not positive.
  """
  if (length is not None) + (bias is not None) + row != 1:
    raise ValueError(
      f"length={length}, bias={bias}, row={row}: give exactly one, such as the training length"
    )
  if length is not None and length < 1:
    raise ValueError(f"length={length} must be at least 1: it is the length of training")
  if row:
    return SigmoidOfRow()
  return Sigmoid(float(bias) if bias is not None else -math.log(length or 1))


ENTRY = Entry(
  make=sigmoid, paper="arXiv:2409.04431", facts={"nonnegative"}, tiny=dict(length=12)
)
