"""Causal mask."""

from attnx.attention.masks import Causal
from attnx.core.registry import Entry

ENTRY = Entry(make=Causal, paper="arXiv:1706.03762", facts={"causal"})
