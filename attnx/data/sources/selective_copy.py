"""Selective copying: symbols scattered among noise are to be written out in order."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnx.data.dataset import ENDLESS, Dataset, Description, Example, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Dataset):
  """n symbols at random places among noise, then n markers; at marker i the target is symbol i.

  Ids: 0 noise, 1 .. vocab-2 symbols, vocab-1 the marker. T = length + symbols. The distances are
  random, so that a fixed kernel cannot do it (arXiv:2312.00752, there length 4096, 16 symbols and
  vocab 16).

  Args:
    length: positions of symbols and noise before the markers.
    symbols: n.
    vocab: ids.
    train_examples: size of an epoch; by default examples never repeat.
    eval_examples: size of the evaluation split.
  """

  length: int = 256
  symbols: int = 16
  vocab: int = 16
  train_examples: int = ENDLESS
  eval_examples: int = 1024

  def __post_init__(self):
    at_least("symbols", self.symbols, 1)
    at_least("length", self.length, self.symbols, ", the number of symbols")
    at_least("vocab", self.vocab, 3, ": noise, a marker and a symbol")

  def describe(self) -> Description:
    return Description(kind="tokens", vocab=self.vocab, length=self.length + self.symbols)

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    symbols = rng.integers(1, self.vocab - 1, self.symbols)
    text = np.zeros(self.length, np.int32)
    text[np.sort(rng.choice(self.length, self.symbols, replace=False))] = symbols
    inputs = np.pad(text, (0, self.symbols), constant_values=self.vocab - 1)
    targets = np.concatenate([np.zeros(self.length), symbols]).astype(np.int32)
    scored = np.arange(len(inputs)) >= self.length
    return dict(inputs=inputs, targets=targets, weights=scored.astype(np.float32))


DATASET = SelectiveCopy
