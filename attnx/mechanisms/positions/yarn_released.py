"""YaRN as its released code computes it: the ramp runs over the index of the pair."""

from __future__ import annotations

import math

import numpy as np

from attnx.core.registry import Entry
from attnx.nn.rotary import ByParts


class YarnReleased(ByParts):
  """w'_j = (1 - g_j) w_j / factor + g_j w_j, with g_j = 1 - clip((j - low) / (high - low), 0, 1).

  low = max(0, floor(c(fast))) and high = min(R - 1, ceil(c(slow))), where the pair with index
  c(r) = R ln(original_length / 2 pi r) / (2 ln base) turns r times in the context of training.
  Between `low` and `high` this differs from the paper's ramp, which `yarn` has; checkpoints are
  trained with this one. Arguments, temperature and errors are those of `ByParts`.
  arXiv:2309.00071.
  """

  def ends(self, width: int) -> tuple[int, int]:
    """low and high, the pairs between which the ramp runs."""
    pair = lambda turns: (
      width * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(self.base))
    )
    return max(math.floor(pair(self.fast)), 0), min(math.ceil(pair(self.slow)), width - 1)

  def kept(self, width):
    low, high = self.ends(width)
    run = high - low if high != low else 0.001  # an empty ramp is a step
    return 1 - np.clip((np.arange(width // 2) - low) / run, 0, 1)


ENTRY = Entry(
  make=YarnReleased,
  paper="arXiv:2309.00071",
  facts={"relative"},
  tiny=dict(factor=4.0, original_length=64),
)
