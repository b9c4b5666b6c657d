"""Scikit-learn's handwritten digits: 1797 images of 8x8, no download."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from attnx.data import prepare
from attnx.data.dataset import Dataset, Description, Example, Source, at_least

TRAIN = 1437  # of 1797; the images come writer by writer, so the rest is by others


class DigitsBuilder(tfds.core.GeneratorBasedBuilder):
  """The UCI test set of optical recognition of handwritten digits, in its own order."""

  name = "digits"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
    features = tfds.features.FeaturesDict({"image": image, "label": np.int32})
    return tfds.core.DatasetInfo(
      builder=self, description="8x8 digits.", features=features, disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    import sklearn.datasets  # takes seconds, and is wanted once

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return {
      "train": self._generate_examples(images[:TRAIN], labels[:TRAIN]),
      "eval": self._generate_examples(images[TRAIN:], labels[TRAIN:]),
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
  """Images (8, 8, 1) in 0 .. 1 with labels 0 .. 9: 1437 to train on, 360 to evaluate.

  Args:
    shift: moves a training image by up to so many pixels each way, filling with 0.
    data_dir: where it is prepared; see `prepare.data_dir`.
  """

  shift: int = 0
  data_dir: str | None = None

  def __post_init__(self):
    at_least("shift", self.shift, 0)

  def describe(self) -> Description:
    return Description(kind="images", classes=10, image=(8, 8, 1))

  def source(self, split: str, seed: int) -> Source:
    files = prepare.prepared(DigitsBuilder, self.data_dir)
    return Images(files.as_data_source(split=split), largest=16)

  def augment(self, example: Example, rng: np.random.Generator) -> Example:
    padded = np.pad(example["inputs"], ((self.shift, self.shift), (self.shift, self.shift), (0, 0)))
    i, j = rng.integers(0, 2 * self.shift, 2, endpoint=True)
    return dict(example) | {"inputs": padded[i : i + 8, j : j + 8]}


DATASET = Digits
