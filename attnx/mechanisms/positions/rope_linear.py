"""Rotary position interpolation: positions squeezed by a factor."""

from __future__ import annotations

from attnx.core.registry import Entry
from attnx.nn.rotary import Stretched, frequencies


class RopeLinear(Stretched):
  """w_j = base^(-2j / R) / factor: rotary embedding at position n / factor.

  Serves `factor` times the context of training after a little tuning. arXiv:2306.15595.

  Args:
    factor: how many times longer the context is than in training; at least 1.
    base, rotary_dim: see `Rotary`.

  Raises:
    ValueError: `factor` is below 1, or `rotary_dim` is odd or wider than the head.
  """

  def frequencies(self, width):
    return frequencies(width, self.base) / self.factor


ENTRY = Entry(
  make=RopeLinear,
  paper="arXiv:2306.15595",
  facts={"relative", "identity_at_zero", "keeps_norm"},
  tiny=dict(factor=4.0),
)
