"""YaRN: rotary embedding interpolated by parts, with a temperature."""

from __future__ import annotations

import math

import numpy as np

from attnx.core.registry import Entry
from attnx.nn.rotary import ByParts, frequencies


class Yarn(ByParts):
  """w'_j = (1 - g_j) w_j / factor + g_j w_j, with g_j = clip((r_j - slow) / (fast - slow), 0, 1).

  r_j = original_length w_j / 2 pi is how often pair j turns in the context of training. The ramp is
  linear in r_j, as the paper defines it; `yarn_released` has that of the released code. Arguments,
  temperature and errors are those of `ByParts`. arXiv:2309.00071.
  """

  def kept(self, width):
    turns = self.original_length * frequencies(width, self.base) / (2 * math.pi)
    return np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)


ENTRY = Entry(
  make=Yarn,
  paper="arXiv:2309.00071",
  facts={"relative"},
  tiny=dict(factor=4.0, original_length=64),
)
