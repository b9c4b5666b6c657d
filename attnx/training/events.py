"""Event files of TensorBoard, written by the thread that asks.

tensorboardX' own SummaryWriter hands rows to a thread, which a full disk ends; the run then waits
for it forever.
"""

from __future__ import annotations

from collections.abc import Mapping
import pathlib
import time

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

SECONDS = 5  # between flushes


class Events:
  """Appends scalars to a new event file.

  Args:
    folder: where event files are.
    begin: the step that training starts after; older files' later steps are dropped.
  """

  def __init__(self, folder: pathlib.Path, begin: int):
    folder.mkdir(parents=True, exist_ok=True)
    self.writer = EventsWriter(str(folder / "events"))
    self.flushed = -SECONDS
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self.write(event_pb2.Event(step=begin + 1, session_log=start))

  def add(self, row: Mapping[str, float | None], step: int) -> None:
    """One row; raises OSError where the disk does not take it."""
    for name, value in row.items():
      if name != "step" and value is not None:
        self.write(event_pb2.Event(step=step, summary=summary.scalar(name, value)))

  def write(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time()
    self.writer.write_event(event)
    if time.monotonic() - self.flushed > SECONDS:
      self.writer.flush()
      self.flushed = time.monotonic()

  def close(self) -> None:
    self.writer.close()
