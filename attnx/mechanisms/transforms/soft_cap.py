"""Soft cap."""

from attnx.attention.transforms import SoftCap
from attnx.core.registry import Entry

ENTRY = Entry(make=SoftCap, paper="arXiv:2408.00118", facts={"relative"}, tiny=dict(cap=2.0))
