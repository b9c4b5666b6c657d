"""Causal sliding window."""

from __future__ import annotations

from attnx.attention.masks import Window
from attnx.core.registry import Entry


def sliding_window(window: int) -> Window:
  """0 <= position_q - position_k < window: itself and the window - 1 before (arXiv:2310.06825).

  Args:
    window: number of positions that a query sees; 1 is itself alone.

  Raises:
    ValueError: window is not positive.
  """
  if window < 1:
    raise ValueError(f"window={window} must be at least 1: a query sees itself")
  return Window(before=window - 1, after=0)


ENTRY = Entry(
  make=sliding_window, paper="arXiv:2310.06825", facts={"causal"}, tiny=dict(window=3)
)
