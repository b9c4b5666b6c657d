"""Dropout of weights."""

import numpy as np

from attnx.attention.transforms import Dropout
from attnx.core.registry import Entry

ENTRY = Entry(
  make=Dropout,
  paper="arXiv:1706.03762",
  facts={"unbiased"},
  tiny=dict(key=np.array([0, 7], np.uint32), rate=0.4),  # a JAX key would start a backend
)
