"""Uniform heads: some heads look everywhere alike, which learned weights are held against.

As the last of the transforms; under softmax each key that is seen weighs as much as any other.
"""

from attnx.attention.transforms import ZeroHeads
from attnx.core.registry import Entry

ENTRY = Entry(
  make=ZeroHeads,
  paper="arXiv:1908.04626",
  facts={"relative"},
  tiny=dict(num_heads=4, heads=(1, 2)),
)
