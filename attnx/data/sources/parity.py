"""Parity: whether the ones so far are odd; the smallest state that must be tracked."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnx.data.dataset import ENDLESS, Dataset, Description, Example, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Dataset):
  """target_t = x_1 + .. + x_t mod 2 for random bits x; every position is scored.

  Args:
    length: T in training.
    eval_length: T in evaluation, to see whether it extrapolates; None for `length`.
    train_examples: size of an epoch; by default examples never repeat.
    eval_examples: size of the evaluation split.
  """

  length: int = 40
  eval_length: int | None = None
  train_examples: int = ENDLESS
  eval_examples: int = 1024

  def __post_init__(self):
    at_least("length", self.length, 1)
    at_least("eval_length", self.eval_length or self.length, 1)

  def describe(self) -> Description:
    return Description(kind="tokens", vocab=2, length=self.length)

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    length = self.length if split == "train" else self.eval_length or self.length
    bits = rng.integers(0, 2, length, dtype=np.int32)
    targets = (np.cumsum(bits) % 2).astype(np.int32)
    return dict(inputs=bits, targets=targets, weights=np.ones(length, np.float32))


DATASET = Parity
