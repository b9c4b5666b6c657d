"""Scaled weights: gates of heads, tokens or pairs."""

from __future__ import annotations

import jax
import numpy as np

from attnx.attention.masks import pick
from attnx.attention.transforms import Transform
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class Scale(Transform):
  """w * factor, an array indexed by place that broadcasts to (B, N, T, S).

  Of shape (1, N, 1, 1) these are the gates of heads by which the importance of a head is measured
  (arXiv:1905.10650): what head n reads is multiplied by factor_n, in the dtype of the weights.
  Weights are not normalised again. The factor has a gradient.

  Attributes:
    factor: (#B, #N, #T, #S).
  """

  needs = frozenset({"index", "parameters"})

  factor: jax.Array

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    return scores * pick(self.factor, q, k).astype(scores.dtype)

  @property
  def by_place(self) -> tuple[str, jax.Array]:
    """The array that is indexed by place, for `attend` to check."""
    return "factor", self.factor


ENTRY = Entry(
  make=Scale,
  paper="arXiv:1905.10650",
  tiny=dict(factor=np.array([1.0, 0.0, 0.5, 2.0], np.float32).reshape(1, 4, 1, 1)),
)
