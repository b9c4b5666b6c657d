"""Any other TFDS dataset of images or texts, prepared before or downloaded now."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attnx.data import dataset as datasets
from attnx.data import prepare
from attnx.data.dataset import Dataset, Description, Example, Source, at_least
from attnx.data.pipeline import Joined
from attnx.data.sources.digits import Images

ELSEWHERE = "~/tensorflow_datasets"  # where TFDS itself keeps its data


@functools.lru_cache
def builder(name: str, where: str | None) -> Any:
  """A TFDS builder whose files can be read: prepared in `where`, or by TFDS, or made now."""
  make = functools.partial(tfds.builder, name, try_gcs=False)
  roots = [prepare.data_dir(where)] + ([] if where else [pathlib.Path(ELSEWHERE).expanduser()])
  try:
    for root in roots:
      if prepare.written(pathlib.Path((found := make(data_dir=root)).data_dir)):
        break
    else:
      found = prepare.prepared(make, where, quiet=False)
  except tfds.core.DatasetNotFoundError:
    raise KeyError(f"TFDS has no dataset {name!r}, and none is prepared in {roots[0]}") from None
  except (OSError, ImportError, tfds.download.DownloadError) as error:
    raise OSError(
      f"{name} is not prepared in {roots[0]} and could not be prepared now, because "
      f"{reason(error)}; prepare it where there is a network and TensorFlow, with "
      "file_format='array_record', and copy it"
    ) from error
  if found.info.file_format not in tfds.core.FileFormat.with_random_access():
    raise ValueError(
      f"{found.data_dir} has the format {found.info.file_format.value}, which has no random access "
      "without TensorFlow; prepare it with file_format='array_record'"
    )
  return found


def reason(error: BaseException) -> str:
  """One line about what began it."""
  while error.__cause__ is not None:
    error = error.__cause__
  return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


class Texts:
  """Documents as bytes: inputs 0 b_1 .. b_n, targets b_1 .. b_n 0."""

  def __init__(self, source: Any, key: str):
    self.source, self.key = source, key

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Example:
    text = np.frombuffer(b"\0" + as_bytes(self.source[index][self.key]) + b"\0", np.uint8)
    ids = text.astype(np.int32)
    return dict(inputs=ids[:-1], targets=ids[1:], weights=np.ones(len(ids) - 1, np.float32))


def as_bytes(text: str | bytes) -> bytes:
  """UTF-8, whether TFDS has decoded it or not."""
  return text.encode() if isinstance(text, str) else bytes(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds(Dataset):
  """Images with labels (uint8, of one size, scaled to 0 .. 1), or texts as bytes.

  Texts are put end to end with their segments and cut every `length` bytes; 0 begins and ends one.
  Reading never needs TensorFlow; the first preparation of many TFDS datasets does.

  Args:
    dataset: its TFDS name, with config and version if wanted: "mnist", "lm1b:1.1.0".
    train, eval: TFDS splits, slices like "train[:90%]" included; eval None is "validation" or else
      "test".
    image, label, text: names of features; `text` is read where there are no images with labels.
    length: T, for texts.
    data_dir: where it is prepared; see `prepare.data_dir`.
  """

  dataset: str
  train: str = "train"
  eval: str | None = None
  image: str = "image"
  label: str = "label"
  text: str = "text"
  length: int = 512
  data_dir: str | None = None

  def __post_init__(self):
    at_least("length", self.length, 1)
    features = self.builder.info.features
    if not self.has_images and self.text not in features:
      raise ValueError(
        f"{self.dataset} has neither {self.image!r} with {self.label!r} nor {self.text!r}; it has "
        f"{', '.join(features)}"
      )
    if self.has_images and None in features[self.image].shape:
      raise NotImplementedError(f"{self.dataset} has images of several sizes, and none is resized")

  @property
  def builder(self) -> Any:
    return builder(self.dataset, self.data_dir)

  @property
  def has_images(self) -> bool:
    return {self.image, self.label} <= set(self.builder.info.features)

  @property
  def rows(self) -> Joined | None:
    return None if self.has_images else Joined(self.length)

  def describe(self) -> Description:
    if self.has_images:
      features = self.builder.info.features
      classes = features[self.label].num_classes
      return Description(kind="images", classes=classes, image=features[self.image].shape)
    return Description(
      kind="tokens",
      vocab=256,
      length=self.length,
      encode=datasets.encode_bytes,
      decode=datasets.decode_bytes,
      raw=lambda split: b"".join(as_bytes(x[self.text]) + b"\0" for x in self.examples(split)),
    )

  def examples(self, split: str) -> Any:
    """The TFDS source of a split of ours."""
    known = self.builder.info.splits
    held_out = self.eval or next((s for s in ("validation", "test") if s in known), None)
    if held_out is None:
      raise ValueError(
        f"{self.dataset} has only {', '.join(known)}; say what to hold out, such as "
        "train='train[:90%]', eval='train[90%:]'"
      )
    return self.builder.as_data_source(split=self.train if split == "train" else held_out)

  def source(self, split: str, seed: int) -> Source:
    if self.has_images:
      return Images(self.examples(split), largest=255, image=self.image, label=self.label)
    return Texts(self.examples(split), self.text)


DATASET = Tfds
