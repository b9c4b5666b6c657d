"""Checkpoints: Orbax writes arrays in the background, a manifest vouches for every byte.

`<directory>/<step>` is whole or absent. Arrays and manifest are written to `<step>.saving`, which
is flushed and takes its name in one rename; what is deleted is renamed first. On disk there are
global arrays under dotted names, so any number of devices or processes can restore them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import concurrent.futures
import errno
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from attnx.training.config import Mistake, Stopped

MANIFEST = "manifest.json"
OURS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
FULL = ("RESOURCE_EXHAUSTED", "No space left", "File too large", "Disk quota")


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: where they are.
    say: shows a sentence to the user.
    every: steps from one to the next; the last step is always saved.
    keep: how many of the newest stay.
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
    self.orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    self.pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self.pending: concurrent.futures.Future | None = None
    self.saving = 0
    if self.first:
      self.directory.mkdir(parents=True, exist_ok=True)
      for pattern in ("*.saving", "*.deleting"):
        for left in self.directory.glob(pattern):
          shutil.rmtree(left)
    barrier("checkpoints are tidy")

  def steps(self) -> list[int]:
    """Of what is committed, in order."""
    return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

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
    files = {str(p.relative_to(scratch)): p for p in scratch.rglob("*") if p.is_file()}
    about["files"] = {name: fingerprint(path, flush=True) for name, path in files.items()}
    with open(scratch / MANIFEST, "w") as f:
      json.dump(about, f)
      f.flush()
      os.fsync(f.fileno())
    scratch.rename(self.directory / str(step))
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
    known = isinstance(error, OSError) and error.errno in OURS
    if not known and not any(text in str(error) for text in FULL):
      raise error
    whole = ", ".join(map(str, self.steps())) or "none"
    raise Stopped(
      f"stopped at step {self.saving}: the checkpoint cannot be written to {self.directory} "
      f"({reason(error)}); whole checkpoints there: {whole}; make room, and the same command goes on"
    ) from error

  def restore(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[int, dict, Any] | None:
    """The newest whole checkpoint: its step, its arrays, and what process 0 put beside them.

    Damaged ones are told, and moved aside so that their steps can be saved again.

    Args:
      targets: the arrays that are wanted, with shardings.

    Raises:
      Mistake: the checkpoint is of another model or optimiser.
    """
    step = int(multihost_utils.broadcast_one_to_all(np.int32(self.newest() if self.first else 0)))
    if step < 0:
      return None
    about = json.loads((self.directory / str(step) / MANIFEST).read_text())
    for name in sorted(targets.keys() | about["arrays"].keys()):
      there, here = about["arrays"].get(name), targets.get(name)
      if here is None or there != [*here.shape, str(here.dtype)]:
        wanted = "nothing" if here is None else f"{here.dtype}{list(here.shape)}"
        raise Mistake(
          f"the checkpoint of step {step} in {self.directory} is of another model or optimizer: "
          f"{name} is {there} there and {wanted} here; take another workdir"
        )
    where = self.directory / str(step) / "arrays"
    return step, self.orbax.restore(where, args=ocp.args.StandardRestore(dict(targets))), about["host"]

  def newest(self) -> int:
    """The last step whose checkpoint is whole, -1 if none is."""
    for step in reversed(self.steps()):
      if (fault := damage(self.directory / str(step))) is None:
        return step
      aside = self.directory / f"damaged-{step}"
      shutil.rmtree(aside, ignore_errors=True)
      (self.directory / str(step)).rename(aside)
      self.say(f"the checkpoint of step {step} is damaged ({fault}); going back to the one before")
    return -1


def damage(checkpoint: pathlib.Path) -> str | None:
  """What is wrong with the files of a checkpoint."""
  try:
    expected = json.loads((checkpoint / MANIFEST).read_text())["files"]
  except (OSError, ValueError, KeyError):
    return f"{MANIFEST} cannot be read"
  for name, (size, digest) in expected.items():
    path = checkpoint / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes of {size}"
    if fingerprint(path)[1] != digest:
      return f"{name} has other bytes than were saved"
  return None


def fingerprint(path: pathlib.Path, flush: bool = False) -> tuple[int, str]:
  """Size and SHA-256 of a file, and whether to force it to the disk first."""
  with open(path, "rb") as f:
    if flush:
      os.fsync(f.fileno())
    return path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()


def reason(error: Exception) -> str:
  """The operating system's words within a long message."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror.lower()
  return next((text for text in FULL if text in str(error)), "").lower()


def barrier(name: str) -> None:
  """All processes meet here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
