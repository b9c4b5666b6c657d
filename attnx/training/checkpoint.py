"""Checkpoints: Orbax writes arrays in the background, a manifest vouches for every byte.

`<directory>/<step>` is whole or absent. Arrays and manifest are written to `<step>.saving`, which
is flushed and takes its name in one rename; what is deleted is renamed first. On disk there are
global arrays under dotted names, so any number of devices or processes can restore them. Nothing
that is read is executed: arrays are bytes, the manifest is JSON and vouches for itself too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import traceback
from typing import Any
import weakref

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from attnx.training.config import Mistake, Stopped, sentence

MANIFEST = "manifest.json"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
FULL = ("No space left", "File too large", "Disk quota", "Read-only file")  # in TensorStore's words


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: where they are.
    say: shows a sentence to the user.
    every: steps from one to the next; the last step is always saved.
    keep: how many of the newest stay.

  Raises:
    Mistake: the directory cannot be used, or another run uses it.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    say: Callable[[str], None] = print,
    *,
    every: int = 500,
    keep: int = 3,
  ):
    if every < 1 or keep < 1:
      raise Mistake(f"checkpoint.every={every} and checkpoint.keep={keep} must be at least 1")
    self.directory, self.say, self.every, self.keep = directory.absolute(), say, every, keep
    self.first = jax.process_index() == 0
    for name in ("absl", "asyncio"):
      logging.getLogger(name).addFilter(not_told_twice)
    self.orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    self.pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self.pending: concurrent.futures.Future | None = None
    self.saving = 0
    if self.first:
      try:
        self.directory.mkdir(parents=True, exist_ok=True)
        weakref.finalize(self, os.close, claim(self.directory))
        for pattern in ("*.saving", "*.deleting"):
          for left in self.directory.glob(pattern):
            shutil.rmtree(left)
      except OSError as error:
        raise Mistake(f"{self.directory} cannot keep checkpoints: {reason(error)}") from error
    barrier("checkpoints are tidy")

  def steps(self) -> list[int]:
    """Of what is committed, in order."""
    return steps(self.directory)

  def save(self, step: int, arrays: Mapping[str, jax.Array], host: Any) -> None:
    """Starts to save; returns when the arrays may be donated.

    Args:
      step: how many updates are in it.
      arrays: by dotted name.
      host: JSON, of which process 0's is kept.

    Raises:
      Stopped: this or the last checkpoint could not be written.
    """
    self.wait()
    self.saving = step
    try:
      scratch = self.directory / f"{step}.saving"
      if self.first:
        scratch.mkdir()
      barrier("checkpoint has a place")
      self.orbax.save(scratch / "arrays", args=ocp.args.StandardSave(dict(arrays)))
    except Exception as error:
      self.failed(error)
    shapes = {name: [*map(int, x.shape), str(x.dtype)] for name, x in arrays.items()}
    self.pending = self.pool.submit(self.commit, step, scratch, dict(arrays=shapes, host=host))

  def commit(self, step: int, scratch: pathlib.Path, about: dict[str, Any]) -> None:
    """Waits for the arrays, vouches for them, and gives them their name."""
    self.orbax.wait_until_finished()
    if not self.first:
      return
    inside = sorted(scratch.rglob("*"))
    files = {str(p.relative_to(scratch)): p for p in inside if p.is_file()}
    about["files"] = {name: fingerprint(path) for name, path in files.items()}
    (scratch / MANIFEST).write_text(json.dumps(dict(about=about, seal=seal(about))))
    for path in (*inside, scratch / MANIFEST, scratch):
      flush(path)
    scratch.rename(self.directory / str(step))
    flush(self.directory)
    for old in self.steps()[: -self.keep]:
      away = (self.directory / str(old)).rename(self.directory / f"{old}.deleting")
      shutil.rmtree(away)

  def check(self) -> None:
    """Raises what went wrong in the background so far."""
    if self.pending is not None and self.pending.done():
      self.wait()

  def wait(self) -> None:
    """Until the checkpoint that is being saved is on disk."""
    pending, self.pending = self.pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception as error:
        self.failed(error)

  def failed(self, error: Exception) -> None:
    """Stops the run if the disk is to blame, else raises the error."""
    known = isinstance(error, OSError) and error.errno in NO_ROOM | {errno.EACCES, errno.EIO}
    if not known and not any(text in str(error) for text in FULL):
      raise error
    whole = ", ".join(map(str, self.steps())) or "none"
    raise Stopped(
      f"stopped: the checkpoint of step {self.saving} cannot be written to {self.directory} "
      f"({reason(error)}); whole checkpoints there: {whole}; make room, and the same command "
      "goes on"
    ) from error

  def restore(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[int, dict, Any] | None:
    """The newest whole checkpoint: its step, its arrays, and what process 0 put beside them.

    Damaged ones are told, and moved aside so that their steps can be saved again.

    Args:
      targets: the arrays that are wanted, with shardings.

    Raises:
      Mistake: the checkpoint is of another model or optimiser, or Orbax cannot read it.
    """
    step = int(multihost_utils.broadcast_one_to_all(np.int32(self.newest() if self.first else 0)))
    if step < 0:
      return None
    checkpoint = self.directory / str(step)
    about = read(checkpoint)
    words = lambda shape, dtype: f"{dtype}[{', '.join(map(str, shape))}]"
    here = {name: words(x.shape, x.dtype) for name, x in targets.items()}
    there = {name: words(shape, dtype) for name, (*shape, dtype) in about["arrays"].items()}
    for name in sorted(here.keys() | there.keys()):
      if (was := there.get(name, "nothing")) != (now := here.get(name, "nothing")):
        raise Mistake(
          f"the checkpoint of step {step} in {self.directory} is of another model or optimizer: "
          f"{name} is {was} there and {now} here; take another workdir"
        )
    try:
      args = ocp.args.StandardRestore(dict(targets))
      return step, self.orbax.restore(checkpoint / "arrays", args=args), about["host"]
    except Exception as error:  # of many kinds, by the format that Orbax wrote in
      raise Mistake(
        f"Orbax {ocp.__version__} cannot read {checkpoint}, though it is as it was written "
        f"({sentence(error)[:200]}); move it away, and the same command goes on from the one before"
      ) from error

  def newest(self) -> int:
    """The last step whose checkpoint is whole, -1 if none is."""
    for step in reversed(self.steps()):
      if (fault := damage(self.directory / str(step))) is None:
        return step
      aside = self.directory / f"damaged-{step}"
      shutil.rmtree(aside, ignore_errors=True)
      (self.directory / str(step)).rename(aside)
      self.say(
        f"the checkpoint of step {step} is damaged ({fault}) and is now {aside.name}; "
        "going back to the one before"
      )
    return -1


def steps(directory: pathlib.Path) -> list[int]:
  """Of the checkpoints in a folder, in order; none where there is no folder."""
  names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def damage(checkpoint: pathlib.Path) -> str | None:
  """What is wrong with the files of a checkpoint."""
  try:
    expected = read(checkpoint)["files"]
  except (OSError, ValueError, KeyError, TypeError):
    return f"{MANIFEST} is missing or not what was written"
  for name, (size, digest) in expected.items():
    path = checkpoint / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes of {size}"
    if fingerprint(path)[1] != digest:
      return f"{name} has other bytes than were saved"
  return None


def read(checkpoint: pathlib.Path) -> dict[str, Any]:
  """What the manifest says; ValueError if that is not what was written."""
  manifest = json.loads((checkpoint / MANIFEST).read_text())
  if manifest["seal"] != seal(manifest["about"]):
    raise ValueError(f"{MANIFEST} does not fit its seal")
  return manifest["about"]


def seal(about: Mapping[str, Any]) -> str:
  """SHA-256 of a value as JSON; the same after it was written and read."""
  return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def fingerprint(path: pathlib.Path) -> tuple[int, str]:
  """Size and SHA-256 of a file."""
  with open(path, "rb") as f:
    return path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()


def flush(path: pathlib.Path) -> None:
  """Forces a file, or the names in a directory, to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def claim(directory: pathlib.Path) -> int:
  """A lock that keeps other processes from saving there; closing it, or any death, frees it."""
  descriptor = os.open(directory / "lock", os.O_CREAT | os.O_WRONLY)
  try:
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise Mistake(f"another run saves to {directory}; end it, or take another workdir") from None
  except OSError:  # some network file systems have no locks
    pass
  return descriptor


@contextlib.contextmanager
def writing(where: pathlib.Path | None) -> Iterator[None]:
  """A disk that is full while other results are written stops the run with a sentence."""
  try:
    yield
  except OSError as error:
    if error.errno not in NO_ROOM:
      raise
    raise Stopped(
      f"stopped: results cannot be written to {where} ({reason(error)}); checkpoints that are "
      "there stay whole; make room, and the same command goes on"
    ) from error


def not_told_twice(record: logging.LogRecord) -> bool:
  """Whether to log: not the tracebacks of Orbax's threads, whose errors `wait` raises."""
  trace = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
  return not any("orbax" in frame.filename for frame in trace)


def reason(error: Exception) -> str:
  """The operating system's words within a long message."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror.lower()
  return next((text for text in FULL if text in str(error)), sentence(error)).lower()


def barrier(name: str) -> None:
  """All processes meet here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
