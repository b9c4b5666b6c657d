"""How decoding is shown: one text as it comes, several side by side, or JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
import json
import os
import sys
import time

from rich import console as rich_console
from rich import live, panel, progress, text


def apart() -> None:
  """Sends what libraries in C++ print to stderr, such as Gloo's news of its peers."""
  ours = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  sys.stdout = ours


class Screen:
  """Where pieces of texts go; a context that leaves the terminal as it was.

  Args:
    head: what decodes, for the line at the end.
    prompts: of the requests.
    begin: `time.perf_counter` when work began.
    quiet: say nothing, as all processes but one.
  """

  def __init__(self, head: str, prompts: Sequence[str], begin: float, *, quiet: bool = False):
    self.head, self.prompts, self.quiet = head, prompts, quiet
    self.begin, self.first, self.taken = begin, 0.0, 0
    self.texts, self.ends = [""] * len(prompts), [""] * len(prompts)
    self.errors = rich_console.Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    terminal = sys.stdout.isatty() and not quiet
    self.live = self.bar = None
    if terminal and len(prompts) > 1:
      self.live = live.Live(self.panels(), refresh_per_second=8, vertical_overflow="visible")
    elif self.errors.is_terminal and not terminal:
      self.bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[rate]} tokens/s"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=self.errors,
      )
      self.task = self.bar.add_task("prompts", total=None, rate="-")

  def __enter__(self) -> Screen:
    for part in (self.live, self.bar):
      if part is not None:
        part.start()
    return self

  def __exit__(self, kind, error, trace) -> None:
    for part in (self.live, self.bar):
      if part is not None:
        part.stop()
    if not self.quiet and len(self.texts) == 1:
      print(flush=True)
    if error is None:
      seconds = time.perf_counter() - self.first
      rate = f"{(self.taken - len(self.texts)) / seconds:.1f} tokens/s" if seconds > 0 else ""
      self.errors.print(
        f"{self.head}: the first after {self.first - self.begin:.1f} s, then {rate}", markup=False
      )

  def add(self, request: int, more: str, end: str) -> None:
    """More text of a request, and why it ends, if it does."""
    self.texts[request] += more
    self.ends[request] = end or self.ends[request]
    if self.quiet or self.live is not None:
      return
    if len(self.texts) == 1:
      print(more, end="", flush=True)
      return
    for said in (dict(text=more) if more else {}, dict(end=end) if end else {}):
      if said:
        print(json.dumps(dict(request=request) | said), flush=True)

  def tick(self, taken: int, most: int) -> None:
    """How many tokens there are, of how many at the most."""
    if not self.taken:
      self.first = time.perf_counter()
    self.taken = taken
    if self.live is not None:
      self.live.update(self.panels())
    if self.bar is not None:
      rate = (taken - len(self.texts)) / max(time.perf_counter() - self.first, 1e-9)
      self.bar.update(
        self.task, description="tokens", completed=taken, total=most, rate=f"{rate:.1f}"
      )

  def panels(self) -> rich_console.Group:
    """A frame for each request."""
    parts = zip(self.prompts, self.texts, self.ends, strict=True)
    return rich_console.Group(*(
      panel.Panel(
        text.Text(prompt[-200:] + more),
        title=f"request {i}" + (f", {end}" if end else ""), title_align="left",
      )
      for i, (prompt, more, end) in enumerate(parts)
    ))  # fmt: skip
