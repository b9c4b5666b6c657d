"""What is asked for, and the text that ids become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Request(NamedTuple):
  """A prompt, how many tokens may follow it, and what ends it."""

  prompt: str
  most: int
  stop: tuple[str, ...] = ()


class Text:
  """What has become of a request: ids come in, and text that cannot change any more goes out.

  Bytes that may be the beginning of a letter, or of what ends the request, are held back.
  """

  def __init__(self, request: Request, decode: Callable[[Sequence[int]], str]):
    self.request, self.decode = request, decode
    self.ids: list[int] = []  # not yet text
    self.held, self.taken, self.end = "", 0, ""

  def feed(self, id: int) -> str:
    """The text that one more id lets out."""
    if self.end:
      return ""
    self.taken += 1
    self.ids.append(int(id))
    last = self.taken == self.request.most
    text = self.decode(self.ids)
    if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.ids) < 4 and not last:
      return ""
    self.held, self.ids = self.held + text, []
    found = [at for s in self.request.stop if (at := self.held.find(s)) >= 0]
    if found or last:
      self.end = "stop" if found else "length"
      return self.held[: min(found)] if found else self.held
    starts = (
      n for s in self.request.stop for n in range(len(s) - 1, 0, -1) if self.held.endswith(s[:n])
    )
    keep = max(starts, default=0)
    out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
    return out
