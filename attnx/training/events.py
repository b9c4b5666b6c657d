"""Event files of TensorBoard, written by the thread that asks.

tensorboardX' own SummaryWriter hands rows to a thread, which a full disk ends; the run then waits
for it forever.
"""

from __future__ import annotations

from collections.abc import Mapping
import pathlib
import socket
import time
from typing import Any

from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

SECONDS = 5  # between flushes


class Events:
  """Appends scalars to a new event file.

  Args:
    folder: where event files are.
    begin: the step that training starts after; later steps of older files are dropped.
  """

  def __init__(self, folder: pathlib.Path, begin: int):
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{begin}"
    self.records = RecordWriter(str(folder / name))
    self.flushed = -float(SECONDS)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self.write(file_version="brain.Event:2")
    self.write(step=begin + 1, session_log=start)

  def add(self, row: Mapping[str, float | None], step: int) -> None:
    """One row; raises OSError where the disk does not take it."""
    for name, value in row.items():
      if name != "step" and value is not None:
        self.write(step=step, summary=summary.scalar(name, value))

  def write(self, **event: Any) -> None:
    self.records.write(event_pb2.Event(wall_time=time.time(), **event).SerializeToString())
    if time.monotonic() - self.flushed > SECONDS:
      self.records.flush()
      self.flushed = time.monotonic()

  def close(self) -> None:
    self.records.close()
