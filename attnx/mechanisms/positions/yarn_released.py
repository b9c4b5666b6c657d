"""YaRN as its released code computes it: the ramp runs over the index of the pair."""

from __future__ import annotations

import math

import numpy as np

from attnx.core.registry import Entry
from attnx.nn.rotary import Rotary, frequencies


class YarnReleased(Rotary):
  """w'_j = ramp_j w_j / factor + (1 - ramp_j) w_j, ramp_j = clip((j - low) / (high - low), 0, 1).

  low = max(0, floor(c(fast))) and high = min(R - 1, ceil(c(slow))), where the pair with index
  c(r) = R ln(original_length / 2 pi r) / (2 ln base) turns r times in the context of training.
  Between `low` and `high` this differs from the paper's ramp, which `yarn` has; checkpoints are
  trained with this one. Queries and keys are multiplied by 0.1 ln(factor) + 1, passed-through
  channels included. arXiv:2309.00071.

  Args:
    factor: how many times longer the context is than in training; at least 1.
    original_length: context length of training.
    slow, fast: turns within `original_length` that end and begin the ramp.
    base, rotary_dim: see `Rotary`.

  Raises:
    ValueError: `factor` is below 1, `fast` is not above `slow`, or `rotary_dim` is odd or wider
      than the head.
  """

  def __init__(
    self,
    factor: float,
    original_length: int,
    *,
    slow: float = 1.0,
    fast: float = 32.0,
    base: float = 10_000.0,
    rotary_dim: int | None = None,
  ):
    if factor < 1:
      raise ValueError(f"factor={factor} must be at least 1: it says how much longer texts become")
    if fast <= slow:
      raise ValueError(f"fast={fast} turns must be more than slow={slow}")
    super().__init__(base=base, rotary_dim=rotary_dim, gain=0.1 * math.log(factor) + 1)
    self.factor, self.original_length = factor, original_length
    self.slow, self.fast = slow, fast

  def ends(self, width: int) -> tuple[int, int]:
    """low and high, the pairs between which the ramp runs."""
    pair = lambda turns: (
      width * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(self.base))
    )
    return max(math.floor(pair(self.fast)), 0), min(math.ceil(pair(self.slow)), width - 1)

  def frequencies(self, width):
    w = frequencies(width, self.base)
    low, high = self.ends(width)
    run = high - low if high != low else 0.001  # an empty ramp is a step
    ramp = np.clip((np.arange(width // 2) - low) / run, 0, 1)
    return ramp * w / self.factor + (1 - ramp) * w


ENTRY = Entry(
  make=YarnReleased,
  paper="arXiv:2309.00071",
  facts={"relative"},
  tiny=dict(factor=4.0, original_length=64),
)
