"""Rotary position embedding."""

from __future__ import annotations

from attnx.core.registry import Entry
from attnx.nn.rotary import Rotary, frequencies


class Rope(Rotary):
  """(x_j, x_{j + R/2}) turned by n w_j at position n, with w_j = base^(-2j / R).

  Scores depend on n - m alone. Pairs are in two halves; see `rotate`. Arguments: see `Rotary`.
  arXiv:2104.09864.

  Raises:
    ValueError: `rotary_dim` (or the head width without it) is odd, or wider than the head.
  """

  def frequencies(self, width):
    return frequencies(width, self.base)


ENTRY = Entry(
  make=Rope, paper="arXiv:2104.09864", facts={"relative", "identity_at_zero", "keeps_norm"}
)
