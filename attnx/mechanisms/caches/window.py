"""The last keys and values are kept."""

from __future__ import annotations

import dataclasses

from attnx.core.registry import Entry
from attnx.nn.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class Window:
  """(k_j, v_j) for t - size < j <= t, in a ring of slots (arXiv:2310.06825).

  Exact for a model whose mask is a sliding window of at most `size`, prompts longer than the window
  included: a prompt attends to itself before anything of it is forgotten. A mask that reaches
  further sees, beyond the tokens of its own step, `size` tokens.

  Attributes:
    size: tokens that are kept, at least the window of the mask less one.
    dtype: what keys and values are stored as.
  """

  size: int
  dtype: str = "float32"

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f"size={self.size} must be at least 1")

  def empty(self, batch, length, heads, key_dim, value_dim) -> KVCache:
    """`size` slots, or `length` where that is less."""
    size = min(self.size, length)
    return KVCache.empty(batch, size, heads, key_dim, value_dim, dtype=self.dtype, rolling=True)


ENTRY = Entry(
  make=Window,
  paper="arXiv:2310.06825",
  facts={"constant_state", "masked:sliding_window"},
  tiny=dict(size=3),
)
