"""TFDS datasets on disk: prepared once as array_record files, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import io
import os
import pathlib
import tempfile
from typing import Any

from absl import logging


def data_dir(chosen: str | None = None) -> pathlib.Path:
  """Where prepared datasets are: `chosen`, else $TFDS_DATA_DIR, else ~/.cache/attnx/data."""
  if not isinstance(chosen, str | os.PathLike | None):
    raise TypeError(f"data_dir={chosen!r} must be a path")
  default = os.environ.get("TFDS_DATA_DIR") or pathlib.Path.home() / ".cache" / "attnx" / "data"
  return pathlib.Path(chosen or default).expanduser()


def prepared(make: Callable[..., Any], where: str | None = None, *, quiet: bool = True) -> Any:
  """A TFDS builder whose files exist, made now if they do not.

  The files are written beside their final place and renamed into it, so that a reader never meets
  half a dataset, and of several processes that prepare it at once the first wins.

  Args:
    make: the builder, from `data_dir` and `file_format`.
    where: see `data_dir`.
    quiet: hides the progress bars of TFDS, which a download deserves.
  """
  root = data_dir(where)
  final = pathlib.Path(make(data_dir=os.fspath(root)).data_dir)
  if not written(final):
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".preparing-") as scratch:
      builder = make(data_dir=scratch, file_format="array_record")
      logging.info("preparing %s in %s, once", builder.name, final)
      with contextlib.ExitStack() as stack:
        if quiet:
          stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
          stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        builder.download_and_prepare(download_dir=os.fspath(root / "downloads"))
      final.parent.mkdir(parents=True, exist_ok=True)
      try:
        pathlib.Path(builder.data_dir).rename(final)
      except OSError:
        if not written(final):
          raise
  return make(data_dir=os.fspath(root))


def written(folder: pathlib.Path) -> bool:
  """Whether a dataset is whole: TFDS writes this file last, and folders are renamed when whole."""
  return (folder / "dataset_info.json").exists()
