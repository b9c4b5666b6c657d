"""Multi-query associative recall, the task of Zoology."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from attnx.data.dataset import ENDLESS, Dataset, Description, Example, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mqar(Dataset):
  """Rows "k_1 v_1 .. k_n v_n, then every key once more"; at a repeated key the target is its value.

  Keys are distinct ids of 1 .. vocab/2 - 1, values distinct ids of vocab/2 .. vocab-1. After the
  pairs come (T - 2n)/2 slots of two positions; the n queries stand at the first positions of
  distinct slots, slot g = 1, 2, .. being drawn with weight g^(power - 1): most come soon, some
  late. All other positions hold 0. Only the queries are scored, and the answers are not in the
  inputs (arXiv:2312.04927, section 3 and its appendix on the task: vocab 8192, T 64 to 512 with 4
  to 64 pairs, power 0.1; the authors' published runs use power 0.01 and 100,000 training examples).

  Args:
    length: T.
    pairs: n.
    vocab: ids.
    power: the exponent above; 1 is uniform.
    random_filler: random ids of the whole vocabulary in place of 0, a harder task that the
      authors' code has too.
    train_examples: size of an epoch; by default examples never repeat.
    eval_examples: size of the evaluation split.
  """

  length: int = 64
  pairs: int = 4
  vocab: int = 8192
  power: float = 0.1
  random_filler: bool = False
  train_examples: int = ENDLESS
  eval_examples: int = 3000

  def __post_init__(self):
    at_least("pairs", self.pairs, 1)
    why = f" to hold pairs={self.pairs} and their queries"
    at_least("length", self.length, 4 * self.pairs, why)
    at_least("vocab", self.vocab, 2 * self.pairs + 2, f" to hold pairs={self.pairs} distinct keys")
    if self.length % 2 or self.vocab % 2:
      raise ValueError(f"length={self.length} and vocab={self.vocab} must be even")
    if not self.power > 0:
      raise ValueError(f"power={self.power} must be positive")

  def describe(self) -> Description:
    return Description(kind="tokens", vocab=self.vocab, length=self.length)

  @functools.cached_property
  def gaps(self) -> np.ndarray:
    """The probability of each slot."""
    weights = np.arange(1, self.length // 2 - self.pairs + 1) ** (self.power - 1.0)
    return weights / weights.sum()

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    half, start = self.vocab // 2, 2 * self.pairs
    keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
    values = half + rng.choice(half, self.pairs, replace=False)
    slots = rng.choice(len(self.gaps), self.pairs, replace=False, p=self.gaps)
    queries = start + 2 * slots
    inputs, targets = np.zeros((2, self.length), np.int32)
    inputs[:start] = np.stack([keys, values], axis=1).ravel()
    if self.random_filler:
      inputs[start:] = rng.integers(0, self.vocab, self.length - start)
    inputs[queries], targets[queries] = keys, values
    weights = np.zeros(self.length, np.float32)
    weights[queries] = 1.0
    return dict(inputs=inputs, targets=targets, weights=weights)


DATASET = Mqar
