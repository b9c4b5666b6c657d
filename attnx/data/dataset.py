"""Dataset: what one file under `attnx/data/sources/` defines, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal, Protocol

import numpy as np

Example = Mapping[str, np.ndarray]
ENDLESS = 2**31 - 1  # examples of a generator that never repeats itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
  """What a model and a report must know about a dataset.

  Attributes:
    kind: "tokens" (inputs and targets (B, T) int32) or "images" (inputs (B, H, W, C) float32,
      targets (B,) int32).
    splits: the splits that `batches` takes; "train" is always the first.
    vocab: number of token ids, inputs and targets; None for images.
    classes: number of labels; None where targets are tokens.
    length: T, for tokens.
    image: (H, W, C), for images.
    encode: text to ids (T,) int32, where the tokens stand for text.
    decode: ids to text.
    raw: split to the bytes that its tokens stand for, for byte corpora: what a compressor is given.
  """

  kind: Literal["tokens", "images"]
  splits: tuple[str, ...] = ("train", "eval")
  vocab: int | None = None
  classes: int | None = None
  length: int | None = None
  image: tuple[int, int, int] | None = None
  encode: Callable[[str], np.ndarray] | None = None
  decode: Callable[[Sequence[int]], str] | None = None
  raw: Callable[[str], bytes] | None = None


class Source(Protocol):
  """Random access to examples; the i-th is always the same."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Example: ...


class Dataset:
  """A dataset with its arguments; a file ends with `DATASET = ` the class that they build.

  Attributes:
    rows: how examples become rows: None if each example is one row of the final shape, else
      `pipeline.Padded`, `pipeline.Fitted` or `pipeline.Joined`.
    augment: (example, rng) to example, for training examples, anew in every epoch; None for none.
  """

  rows: Any = None
  augment: Callable[[Example, np.random.Generator], Example] | None = None

  def describe(self) -> Description:
    raise NotImplementedError

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    """Draws an example, for synthetic tasks; others have `source`."""
    raise NotImplementedError

  def source(self, split: str, seed: int) -> Source:
    """The examples of a split. Only generated training examples depend on the seed."""
    return Generated(self, split, seed)


class Generated:
  """Examples drawn by `dataset.sample(rng, split)`, each from its own (seed, split, index).

  Evaluation splits are the same for every seed, so that runs with different seeds compare.
  """

  def __init__(self, dataset: Dataset, split: str, seed: int):
    self.dataset, self.split = dataset, split
    self.size = getattr(dataset, f"{split}_examples")
    at_least(f"{split}_examples", self.size, 1)
    self.key = (seed, 0) if split == "train" else (0, dataset.describe().splits.index(split))

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Example:
    rng = np.random.default_rng((*self.key, index))
    return self.dataset.sample(rng, self.split)


def at_least(name: str, value: int, least: int, why: str = "") -> None:
  """Refuses a value of an argument that is no integer, or too small."""
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise ValueError(f"{name}={value!r} must be an integer of at least {least}{why}")


def encode_bytes(text: str) -> np.ndarray:
  """Ids of a text in UTF-8, one a byte."""
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode_bytes(ids: Sequence[int]) -> str:
  """The text of ids that are bytes; what is no UTF-8 becomes a replacement character."""
  return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")
