"""NTK-aware rotary embedding: a larger base instead of squeezed positions."""

from __future__ import annotations

import numpy as np

from attnx.core.registry import Entry
from attnx.nn.rotary import Stretched, frequencies


class RopeNTK(Stretched):
  """w_j = (base factor^(R / (R - 2)))^(-2j / R).

  The fastest pair keeps its frequency and the slowest is slowed down by exactly `factor`. The
  factor is fixed, so that rotated keys may be cached; one that grows with the text would turn every
  cached key anew and is not offered. arXiv:2309.00071, section 3.1.

  Args:
    factor: how many times longer the context is than in training; at least 1.
    base, rotary_dim: see `Rotary`.

  Raises:
    ValueError: `factor` is below 1, or `rotary_dim` is odd or wider than the head.
  """

  def frequencies(self, width):
    slowest = max(width // 2 - 1, 1)  # a single pair is the fastest one, and stays
    slowed = self.factor ** (-np.arange(width // 2) / slowest)
    return frequencies(width, self.base) * slowed


ENTRY = Entry(
  make=RopeNTK,
  paper="arXiv:2309.00071",
  facts={"relative", "identity_at_zero", "keeps_norm"},
  tiny=dict(factor=4.0),
)
