"""Induction heads: what came after the special token the first time?"""

from __future__ import annotations

import dataclasses

import numpy as np

from attnx.data.dataset import ENDLESS, Dataset, Description, Example, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Dataset):
  """Random ids, the special id once among them and once at the end; the target is what followed it.

  Ids: 0 .. vocab-2 ordinary, vocab-1 special. Only the last position is scored (arXiv:2212.14052;
  arXiv:2312.00752 has length 256 and vocab 16 in training, and tests 64 to 2^20).

  Args:
    length: T in training.
    eval_length: T in evaluation, to see whether it extrapolates; None for `length`.
    vocab: ids.
    train_examples: size of an epoch; by default examples never repeat.
    eval_examples: size of the evaluation split.
  """

  length: int = 256
  eval_length: int | None = None
  vocab: int = 16
  train_examples: int = ENDLESS
  eval_examples: int = 1024

  def __post_init__(self):
    at_least("length", self.length, 3)
    at_least("eval_length", self.eval_length or self.length, 3)
    at_least("vocab", self.vocab, 3, ": one is special")

  def describe(self) -> Description:
    return Description(kind="tokens", vocab=self.vocab, length=self.length)

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    length = self.length if split == "train" else self.eval_length or self.length
    inputs = rng.integers(0, self.vocab - 1, length, dtype=np.int32)
    first = int(rng.integers(length - 2))
    inputs[first] = inputs[-1] = self.vocab - 1
    last = np.arange(length) == length - 1
    targets = np.where(last, inputs[first + 1], 0).astype(np.int32)
    return dict(inputs=inputs, targets=targets, weights=last.astype(np.float32))


DATASET = Induction
