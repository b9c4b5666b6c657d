"""Softmax."""

from attnx.attention.normalisers import Softmax
from attnx.core.registry import Entry

ENTRY = Entry(
  make=Softmax,
  paper="arXiv:1706.03762",
  facts={"nonnegative", "sums_to_one", "shift_invariant"},
)
