"""Ablated heads: some heads read nothing.

An edit sees weights before a row is divided by its mass, so that all it can do is multiply them.
Heads that look everywhere alike are the same change of scores, `transforms.uniform_heads`; heads
that read a mean or what they read elsewhere are patched, `attnx.analysis.intervene`.
"""

from attnx.attention.transforms import ZeroHeads
from attnx.core.registry import Entry

ENTRY = Entry(make=ZeroHeads, paper="arXiv:1905.10650", tiny=dict(num_heads=4, heads=(1, 2)))
