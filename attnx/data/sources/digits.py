"""Scikit-learn's handwritten digits: 1797 images of 8x8, no download."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from attnx.data import prepare
from attnx.data.dataset import Dataset, Description, Example, Source

EVERY = 5  # of each digit, every fifth image is held out: writers come one after the other


def is_held_out(labels: np.ndarray) -> np.ndarray:
  """Which images belong to the evaluation split, bool (n,).

  Places in the whole order would not do: most writers write 0 to 9 in turn, so that every fifth
  image is nearly always a 4 or a 9.
  """
  held_out = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    held_out[np.flatnonzero(labels == label)[EVERY - 1 :: EVERY]] = True
  return held_out


class DigitsBuilder(tfds.core.GeneratorBasedBuilder):
  """The UCI test set of optical recognition of handwritten digits, in their order."""

  name = "digits"
  VERSION = tfds.core.Version("1.1.0")

  def _info(self) -> tfds.core.DatasetInfo:
    image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
    features = tfds.features.FeaturesDict({"image": image, "label": np.int32})
    return tfds.core.DatasetInfo(
      builder=self, description="8x8 digits.", features=features, disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    import sklearn.datasets  # takes seconds, and is wanted once

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    held_out = is_held_out(labels)
    return {
      "train": self._generate_examples(images[~held_out], labels[~held_out]),
      "eval": self._generate_examples(images[held_out], labels[held_out]),
    }

  def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
    for i, (image, label) in enumerate(zip(images, labels)):
      yield i, {"image": image.reshape(8, 8, 1).astype(np.uint8), "label": int(label)}


class Images:
  """Examples of a TFDS source of images and labels: inputs float32 in 0 .. 1, weight 1."""

  def __init__(self, source: Source, largest: int, image: str = "image", label: str = "label"):
    self.source, self.largest, self.image, self.label = source, largest, image, label

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Example:
    example = self.source[index]
    return dict(
      inputs=np.asarray(example[self.image], np.float32) / self.largest,
      targets=np.asarray(example[self.label], np.int32),
      weights=np.ones((), np.float32),
    )


def warped(image: np.ndarray, shift: np.ndarray, angle: float) -> np.ndarray:
  """An image (H, W, C) moved by `shift` (2,) pixels after a turn about its middle; 0 outside."""
  size = np.array(image.shape[:2])
  middle = (size - 1) / 2
  turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
  grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)  # (H, W, 2)
  source = (grid - middle - shift) @ turn + middle

  # Bilinear: the four pixels around each point of the source, of an image with a margin of 0.
  source = np.clip(source, -1, size) + 1
  first = np.minimum(np.floor(source).astype(int), size)
  i, j = np.moveaxis(first, -1, 0)
  u, v = np.moveaxis(source - first, -1, 0)[..., None]
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  upper = (1 - v) * padded[i, j] + v * padded[i, j + 1]
  lower = (1 - v) * padded[i + 1, j] + v * padded[i + 1, j + 1]
  return ((1 - u) * upper + u * lower).astype(image.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
  """Images (8, 8, 1) in 0 .. 1 with labels 0 .. 9: 1442 to train on, 355 to evaluate.

  Args:
    shift: moves a training image by up to so many pixels each way.
    turn: turns it by up to so many degrees each way.
    data_dir: where it is prepared; see `prepare.data_dir`.
  """

  shift: float = 0.0
  turn: float = 0.0
  data_dir: str | None = None

  def __post_init__(self):
    if not (0 <= self.shift < np.inf and 0 <= self.turn < np.inf):
      raise ValueError(f"shift={self.shift} and turn={self.turn} must be at least 0 and finite")

  def describe(self) -> Description:
    return Description(kind="images", classes=10, image=(8, 8, 1))

  def source(self, split: str, seed: int) -> Source:
    files = prepare.prepared(DigitsBuilder, self.data_dir)
    return Images(files.as_data_source(split=split), largest=16)

  def augment(self, example: Example, rng: np.random.Generator) -> Example:
    shift = rng.uniform(-self.shift, self.shift, 2)
    angle = np.deg2rad(rng.uniform(-self.turn, self.turn))
    return dict(example) | {"inputs": warped(example["inputs"], shift, angle)}


DATASET = Digits
