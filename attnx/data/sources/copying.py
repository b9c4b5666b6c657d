"""Copy a random string after a separator: the smallest task that needs memory."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnx.data.dataset import ENDLESS, Dataset, Description, Example, at_least
from attnx.data.pipeline import Padded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copying(Dataset):
  """Rows "x_1 .. x_n 0 x_1 .. x_n" with symbols in 1 .. vocab-1; only the copy is scored.

  Args:
    length: n, so that T = 2 n.
    vocab: ids, of which 0 is the separator.
    shortest: draws n from shortest .. length and pads the row; None for always `length`.
    reverse: the copy is backwards.
    train_examples: size of an epoch; by default examples never repeat.
    eval_examples: size of the evaluation split.
  """

  length: int = 16
  vocab: int = 16
  shortest: int | None = None
  reverse: bool = False
  train_examples: int = ENDLESS
  eval_examples: int = 1024

  def __post_init__(self):
    at_least("length", self.length, 1)
    at_least("vocab", self.vocab, 2, ": one is the separator")
    if self.shortest is not None and not 1 <= self.shortest <= self.length:
      raise ValueError(f"shortest={self.shortest} must be in 1 .. length={self.length}")

  @property
  def rows(self) -> Padded | None:
    return Padded(2 * self.length) if self.shortest is not None else None

  def describe(self) -> Description:
    return Description(kind="tokens", vocab=self.vocab, length=2 * self.length)

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    size = rng.integers(self.shortest or self.length, self.length, endpoint=True)
    text = rng.integers(1, self.vocab, size, dtype=np.int32)
    ids = np.concatenate([text, [0], text[::-1] if self.reverse else text]).astype(np.int32)
    scored = np.arange(2 * size) >= size
    return dict(inputs=ids[:-1], targets=ids[1:], weights=scored.astype(np.float32))


DATASET = Copying
