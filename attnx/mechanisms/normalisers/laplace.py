"""Laplace attention: weights that are the Gaussian integral of their scores (Mega)."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry

MEAN, DEVIATION = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))


@struct.dataclass
class Laplace(Normaliser):
  """w_j = (1 + erf((s_j - mu) / (sigma sqrt(2)))) / 2, mu = sqrt(1 / 2), sigma = sqrt(1 / (4 pi)).

  A squared ReLU that is bounded by 1: at mu both have the value 1 / 2 and the slope sqrt(2). No
  other key of the row has a part in a weight, and nothing is divided; instead the paper's scores
  are q k^T / n + bias, with n the number of keys that the row can see. The `mega` mixer scales
  queries so; elsewhere outputs grow with n. Scores (B, N, T, S) of any float dtype
  (arXiv:2209.10655).
  """

  counts: ClassVar[bool] = False

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    w = (1 + jax.scipy.special.erf((scores - MEAN) / (DEVIATION * math.sqrt(2)))) / 2
    return jnp.where(visible, w, 0.0)

  def finish(self, p: Partial) -> jax.Array:
    return p.out


ENTRY = Entry(make=Laplace, paper="arXiv:2209.10655", facts={"nonnegative"})
