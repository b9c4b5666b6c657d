"""Bytes of the source of the running Python's standard library: real text on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import pathlib
import sys
import sysconfig

import numpy as np
import tensorflow_datasets as tfds

from attnx.data import dataset, prepare
from attnx.data.dataset import Dataset, Description, Example, Source, at_least

SEPARATOR = 0  # between files; no Python source holds a NUL
HELD_OUT = 0.08  # of the files, by the hash of their path
NOT_OURS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLES = {"encodings", "pydoc_data"}  # written by programs, and a tenth of all bytes


class StdlibBytesBuilder(tfds.core.GeneratorBasedBuilder):
  """Files `*.py` of the standard library, sorted by path; one version for each version of Python.

  Tests, generated tables and installed packages are left out. The hash of its path says whether a
  file is held out, so that the split hardly changes from one Python to the next.
  """

  name = "stdlib_bytes"
  VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Tensor(shape=(None,), dtype=np.uint8)
    features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": text})
    return tfds.core.DatasetInfo(
      builder=self,
      description="Source of the Python standard library.",
      features=features,
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
      path.relative_to(root).as_posix()
      for path in root.rglob("*.py")
      if not (NOT_OURS | TABLES) & set(path.relative_to(root).parts)
    )
    if not paths:
      raise FileNotFoundError(f"this Python keeps no source of its standard library in {root}")
    held_out = [p for p in paths if is_held_out(p)]
    train = [p for p in paths if not is_held_out(p)]
    return {
      "train": self._generate_examples(root, train),
      "eval": self._generate_examples(root, held_out),
    }

  def _generate_examples(self, root: pathlib.Path, paths: Sequence[str]) -> Iterator:
    for i, path in enumerate(paths):
      yield i, {"path": path, "text": np.frombuffer((root / path).read_bytes(), np.uint8)}


def is_held_out(path: str) -> bool:
  """Whether a file belongs to the evaluation split."""
  digest = hashlib.sha256(path.encode()).digest()
  return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


@functools.lru_cache
def corpus(split: str, data_dir: str | None) -> np.ndarray:
  """All bytes of a split, uint8: its files in order of their paths, each followed by a NUL."""
  files = prepare.prepared(StdlibBytesBuilder, data_dir).as_data_source(split=split)
  end = np.array([SEPARATOR], np.uint8)
  return np.concatenate([part for file in files for part in (file["text"], end)])


class Windows:
  """Rows of T inputs and T targets, cut every T bytes: each byte but the first is a target once.

  The last row is filled up with weight 0.
  """

  def __init__(self, text: np.ndarray, length: int):
    self.text, self.length = text, length

  def __len__(self) -> int:
    return -(-(len(self.text) - 1) // self.length)

  def __getitem__(self, index: int) -> Example:
    window = self.text[index * self.length : (index + 1) * self.length + 1].astype(np.int32)
    room = self.length + 1 - len(window)
    ids = np.pad(window, (0, room), constant_values=SEPARATOR)
    scored = np.arange(self.length) < self.length - room
    return dict(inputs=ids[:-1], targets=ids[1:], weights=scored.astype(np.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibBytes(Dataset):
  """Windows of T bytes of the concatenated files; ids are bytes, 0 separates files.

  Args:
    length: T.
    data_dir: where it is prepared; see `prepare.data_dir`.
  """

  length: int = 512
  data_dir: str | None = None

  def __post_init__(self):
    at_least("length", self.length, 1)

  def describe(self) -> Description:
    return Description(
      kind="tokens",
      vocab=256,
      length=self.length,
      encode=dataset.encode_bytes,
      decode=dataset.decode_bytes,
      raw=lambda split: corpus(split, self.data_dir).tobytes(),
    )

  def source(self, split: str, seed: int) -> Source:
    return Windows(corpus(split, self.data_dir), self.length)


DATASET = StdlibBytes
