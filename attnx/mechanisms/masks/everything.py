"""Every pair may meet."""

from attnx.attention.masks import Everything
from attnx.core.registry import Entry

ENTRY = Entry(make=Everything, paper="arXiv:1706.03762")
