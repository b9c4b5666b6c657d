"""YaRN: rotary embedding interpolated by parts, with a temperature."""

from __future__ import annotations

import math

import numpy as np

from attnx.core.registry import Entry
from attnx.nn.rotary import Rotary, frequencies


class Yarn(Rotary):
  """w'_j = (1 - g_j) w_j / factor + g_j w_j, with g_j = clip((r_j - slow) / (fast - slow), 0, 1).

  r_j = original_length w_j / 2 pi is how often pair j turns in the context of training: pairs that
  turn often are left alone, pairs that never complete a turn are interpolated. Queries and keys are
  multiplied by 0.1 ln(factor) + 1, so that all of q k^T, passed-through channels included, has the
  paper's temperature. The ramp is linear in r_j, as the paper defines it; `yarn_released` has that
  of the released code. arXiv:2309.00071.

  Args:
    factor: how many times longer the context is than in training; at least 1.
    original_length: context length of training.
    slow, fast: turns within `original_length` below which a pair is interpolated, and above which
      it is left alone; alpha and beta of the paper.
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

  def frequencies(self, width):
    w = frequencies(width, self.base)
    turns = self.original_length * w / (2 * math.pi)
    kept = np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
    return (1 - kept) * w / self.factor + kept * w


ENTRY = Entry(
  make=Yarn,
  paper="arXiv:2309.00071",
  facts={"relative"},
  tiny=dict(factor=4.0, original_length=64),
)
