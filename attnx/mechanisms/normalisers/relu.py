"""ReLU attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class ReLU(Normaliser):
  """w_j = relu(s_j)^power / n, where n is the number of keys that the row can see.

  Dividing by n keeps the size of the output independent of the length, which softmax has for free;
  the paper finds no power of n better than the first. A row whose scores are all negative outputs
  zero. Scores (B, N, T, S) of any float dtype (arXiv:2309.08586).

  Attributes:
    power: 1 is the paper's choice for vision; 2 is the squared ReLU of Primer (arXiv:2109.08668).
  """

  power: int = struct.static(1)

  def __post_init__(self):
    if self.power < 1:
      raise ValueError(f"power={self.power} must be at least 1; use 1 for plain ReLU")

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    return jnp.where(visible, jax.nn.relu(scores) ** self.power, 0.0)

  def finish(self, p: Partial) -> jax.Array:
    return p.out / jnp.maximum(p.count, 1.0)[..., None]


ENTRY = Entry(make=ReLU, paper="arXiv:2309.08586", facts={"nonnegative"}, tiny=dict(power=2))
