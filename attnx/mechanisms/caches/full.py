"""Every key and value is kept."""

from __future__ import annotations

import dataclasses

from attnx.core.registry import Entry
from attnx.nn.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class Full:
  """(k_1, v_1), ..., (k_t, v_t): exact, 2 K H numbers a token (arXiv:1911.02150).

  Attributes:
    dtype: what keys and values are stored as; bfloat16 halves the memory of float32.
    shards: parts that fill by turns, block by block, for as many devices; see `KVCache`.
  """

  dtype: str = "float32"
  shards: int = 1

  def empty(self, batch, length, heads, key_dim, value_dim) -> KVCache:
    """Room for `length` tokens; values of later ones are NaN, so that overflow is seen."""
    return KVCache.empty(
      batch, length, heads, key_dim, value_dim, dtype=self.dtype, shards=self.shards
    )


ENTRY = Entry(make=Full, paper="arXiv:1911.02150", facts={"exact"})
