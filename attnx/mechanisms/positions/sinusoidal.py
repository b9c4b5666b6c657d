"""Fixed sinusoids of position."""

from __future__ import annotations

import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.position import Position, working_dtype
from attnx.nn.rotary import angles, frequencies


class Sinusoidal(Position):
  """x + (sin n w_0, cos n w_0, sin n w_1, cos n w_1, ...), w_j = base^(-2j / D).

  Where position is negative nothing is added. arXiv:1706.03762.

  Args:
    base: the slowest wave has a period of about 2 pi base tokens.

  Raises:
    ValueError: D is odd.
  """

  def __init__(self, *, base: float = 10_000.0):
    self.base = base

  def embed(self, x, position):
    dtype = working_dtype(x)
    angle = angles(position, frequencies(x.shape[-1], self.base), dtype)
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    waves = waves.reshape(*angle.shape[:-1], x.shape[-1])
    waves = jnp.where(jnp.asarray(position)[..., None] >= 0, waves, 0.0)
    return (x.astype(dtype) + waves).astype(x.dtype)


ENTRY = Entry(make=Sinusoidal, paper="arXiv:1706.03762", facts={"additive"})
