"""A needle in a haystack: find the value of one key in a long random text."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnx.data.dataset import ENDLESS, Dataset, Description, Example, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Dataset):
  """Random text with needles "0 key v_1 .. v_m" in it, then "1 key v_1 .. v_m" for one of the keys.

  Ids: 0 begins a needle, 1 the question, 2 .. vocab-1 are text, keys and values alike, so that
  nothing but the mark tells a needle from hay. Keys are distinct; needles do not overlap. The
  values after the question are scored (as passkey retrieval, arXiv:2305.16300, and the single and
  multi-key needles of RULER, arXiv:2404.06654).

  Args:
    length: T.
    needles: needles in the text; all but the one asked for distract.
    size: m, ids in a value.
    vocab: ids.
    depth: where the needle asked for stands, from 0 (first) to 1 (last); None for anywhere.
    train_examples: size of an epoch; by default examples never repeat.
    eval_examples: size of the evaluation split.
  """

  length: int = 256
  needles: int = 1
  size: int = 1
  vocab: int = 64
  depth: float | None = None
  train_examples: int = ENDLESS
  eval_examples: int = 1024

  def __post_init__(self):
    at_least("size", self.size, 1)
    at_least("needles", self.needles, 1)
    at_least("vocab", self.vocab, self.needles + 3, ": two marks and distinct keys")
    why = f" to hold needles={self.needles} of size={self.size} and the question"
    at_least("length", self.length, (self.needles + 1) * (2 + self.size) - 1, why)
    if self.depth is not None and not 0 <= self.depth <= 1:
      raise ValueError(f"depth={self.depth} must be in 0 .. 1")

  def describe(self) -> Description:
    return Description(kind="tokens", vocab=self.vocab, length=self.length)

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    width = 2 + self.size
    hay = self.length + 1 - width * (self.needles + 1)
    keys = 2 + rng.choice(self.vocab - 2, self.needles, replace=False)
    values = rng.integers(2, self.vocab, (self.needles, self.size))
    marks = np.zeros((self.needles, 1), int)
    needles = np.concatenate([marks, keys[:, None], values], axis=1)

    # How much hay stands before each needle; needle 0 is the one asked for.
    places = rng.integers(0, hay, self.needles, endpoint=True)
    if self.depth is not None:
      places[0] = round(self.depth * hay)
    text = rng.integers(2, self.vocab, hay)
    order = np.argsort(places, kind="stable")
    pieces = np.split(text, places[order])
    question = np.concatenate([[1], needles[0, 1:]])
    parts = [x for pair in zip(pieces, needles[order]) for x in pair]
    ids = np.concatenate([*parts, pieces[-1], question]).astype(np.int32)
    scored = np.arange(self.length) >= self.length - self.size
    return dict(inputs=ids[:-1], targets=ids[1:], weights=scored.astype(np.float32))


DATASET = Needle
