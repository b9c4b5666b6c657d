"""TFDS datasets on disk: prepared once as array_record files, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import os
import pathlib
import tempfile
from typing import Any

import tensorflow_datasets as tfds

Examples = Callable[[], Mapping[str, Iterator[dict[str, Any]]]]


def data_dir(chosen: str | None = None) -> pathlib.Path:
  """Where prepared datasets are: `chosen`, else $TFDS_DATA_DIR, else ~/.cache/attnx/data."""
  default = os.environ.get("TFDS_DATA_DIR") or pathlib.Path.home() / ".cache" / "attnx" / "data"
  return pathlib.Path(chosen or default).expanduser()


def prepared(builder: type[tfds.core.GeneratorBasedBuilder], where: str | None = None, **kwargs):
  """A builder of our own whose files exist, prepared now if they do not.

  The files are written beside their final place and renamed into it, so that a reader never meets
  half a dataset, and of several processes that prepare it at once the first wins.

  Args:
    builder: the class.
    where: see `data_dir`.
    **kwargs: for the class.
  """
  root = data_dir(where)
  final = pathlib.Path(builder(data_dir=os.fspath(root), **kwargs).data_dir)
  if not (final / "dataset_info.json").exists():
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".preparing-") as scratch:
      tfds.disable_progress_bar()
      made = builder(data_dir=scratch, file_format="array_record", **kwargs)
      made.download_and_prepare()
      try:
        pathlib.Path(made.data_dir).rename(final)
      except OSError:
        if not (final / "dataset_info.json").exists():
          raise
  return builder(data_dir=os.fspath(root), file_format="array_record", **kwargs)
