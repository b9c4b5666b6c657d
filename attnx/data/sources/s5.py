"""The word problem of the symmetric group: compose permutations, one a step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from attnx.data.dataset import ENDLESS, Dataset, Description, Example, at_least


@functools.cache
def products(symbols: int) -> np.ndarray:
  """products[a, b] is the id of "first a, then b"; ids number the permutations in sorted order."""
  all_of_them = np.array(list(itertools.permutations(range(symbols))))  # (n!, n)
  powers = symbols ** np.arange(symbols - 1, -1, -1)
  then = all_of_them[:, all_of_them].swapaxes(0, 1)  # [a, b, i] = b[a[i]]
  return np.searchsorted(all_of_them @ powers, then @ powers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class S5(Dataset):
  """target_t = x_1 x_2 .. x_t, a product of random permutations of n symbols; all are scored.

  For n = 5 the problem is complete for NC1: no model of constant depth that is a fixed number of
  parallel sums can do it at any length (arXiv:2404.08819). n = 2 is parity; 3 and 4 are solvable
  groups. vocab = n!, id 0 the identity.

  Args:
    length: T in training.
    eval_length: T in evaluation, to see whether it extrapolates; None for `length`.
    symbols: n, 2 to 6.
    train_examples: size of an epoch; by default examples never repeat.
    eval_examples: size of the evaluation split.
  """

  length: int = 40
  eval_length: int | None = None
  symbols: int = 5
  train_examples: int = ENDLESS
  eval_examples: int = 1024

  def __post_init__(self):
    at_least("length", self.length, 1)
    at_least("eval_length", self.eval_length or self.length, 1)
    at_least("symbols", self.symbols, 2)
    if self.symbols > 6:
      raise ValueError(f"symbols={self.symbols} must be at most 6: there are symbols! ids")

  def describe(self) -> Description:
    return Description(kind="tokens", vocab=math.factorial(self.symbols), length=self.length)

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    length = self.length if split == "train" else self.eval_length or self.length
    table = products(self.symbols)
    inputs = rng.integers(0, len(table), length, dtype=np.int32)
    targets = np.array(list(itertools.accumulate(inputs, lambda a, b: table[a, b])), np.int32)
    return dict(inputs=inputs, targets=targets, weights=np.ones(length, np.float32))


DATASET = S5
