"""What a run says: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
from rich import console as rich_console
from rich import progress

from attnx.training.config import Mistake


class Console:
  """Shows and records how training goes; only process 0 says anything.

  Args:
    workdir: where metrics go, or None.
    steps: steps in all.
    begin: the step that training starts after; older metrics of later steps are dropped.
    unit: what is counted, "tokens" or "images".
    every: steps from one row of metrics to the next.
    tensorboard: whether to write event files beside metrics.jsonl.
  """

  def __init__(
    self,
    workdir: pathlib.Path | None,
    steps: int,
    begin: int,
    unit: str,
    *,
    every: int = 10,
    tensorboard: bool = True,
  ):
    if every < 1:
      raise Mistake(f"log.every={every} must be at least 1")
    self.steps, self.unit, self.every = steps, unit, every
    self.first = jax.process_index() == 0
    self.file = self.events = self.bar = None
    self.screen = rich_console.Console(highlight=False, soft_wrap=True, quiet=not self.first)
    if workdir is not None and self.first:
      self.file = open_metrics(workdir / "metrics.jsonl", begin)
      if tensorboard:
        from attnx.training.events import Events  # here: tensorboardX imports torch if it is there

        self.events = Events(workdir / "tensorboard", begin)
    if self.screen.is_terminal:
      self.bar = progress.Progress(
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[news]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=False),
        console=self.screen,
      )
      self.task = self.bar.add_task("train", total=steps, completed=begin, news="compiling")
      self.bar.start()

  def say(self, text: str) -> None:
    """A line above the bar."""
    self.screen.print(text, markup=False)

  def tick(self, step: int) -> None:
    """A step was started."""
    if self.bar is not None:
      self.bar.update(self.task, completed=step)

  def show(self, row: Mapping[str, float], left: float) -> None:
    """One row of training metrics, recorded and shown; `left` in seconds."""
    self.record(row)
    parts = [f"loss {row['loss']:.4f}"]
    if not math.isnan(per_second := row[f"{self.unit}_per_second"]):
      parts.append(f"{si(per_second)} {self.unit}/s")
    if not math.isnan(row["mfu"]):
      parts.append(f"MFU {row['mfu']:.0%}")
    if self.bar is not None:
      self.bar.update(self.task, news="  ".join(parts))
    else:
      eta = [] if math.isnan(left) else [f"ETA {int(left) // 60}:{int(left) % 60:02}"]
      self.say("  ".join([f"step {row['step']}/{self.steps}", *parts, *eta]))

  def record(self, row: Mapping[str, Any]) -> None:
    """A row of metrics.jsonl and of TensorBoard; numbers that are not finite are null."""
    numbers = {k: v if math.isfinite(v) else None for k, v in row.items()}
    if self.file is not None:
      self.file.write(json.dumps(numbers) + "\n")
      self.file.flush()
    if self.events is not None:
      self.events.add(numbers, row["step"])

  def close(self) -> None:
    """Gives the terminal back and closes the files."""
    if self.bar is not None:
      self.bar.stop()
    for open_file in (self.file, self.events):
      if open_file is not None:
        with contextlib.suppress(OSError):  # of a disk that is full, which `record` has told
          open_file.close()


def open_metrics(path: pathlib.Path, begin: int):
  """The file, to append to, without rows that will be written again and without half a row."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    rows += [line] if row["step"] <= begin else []
  fresh = path.with_suffix(".new")
  fresh.write_text("".join(f"{row}\n" for row in rows))
  os.replace(fresh, path)
  return open(path, "a")


def si(x: float) -> str:
  """1234567 as 1.23M."""
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if x >= size:
      return f"{x / size:.3g}{unit}"
  return f"{x:.3g}"


def complain(text: str) -> None:
  """A sentence where there is no console yet."""
  print(text, file=sys.stderr)
