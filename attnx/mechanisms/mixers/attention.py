"""Multi-head attention (Vaswani et al., 2017)."""

from __future__ import annotations

from attnx.core.registry import Entry
from attnx.nn.attention import Attention

ENTRY = Entry(
  make=Attention,
  paper="arXiv:1706.03762",
  facts={"streaming", "linear_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4, num_kv_heads=2, position="rope"),
  patterns={
    "causal_self": {},
    "causal_cross": {},
    "noncausal_self": dict(mask="everything"),
    "noncausal_cross": dict(mask="everything"),
  },
)
