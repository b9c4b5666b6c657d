"""xPos: rotary embedding whose pairs also decay with distance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core.registry import Entry
from attnx.nn.position import working_dtype
from attnx.nn.rotary import Rotary, angles, frequencies, rotate


class XPos(Rotary):
  """q rotated by n w_j and multiplied by z_j^(n / B), k rotated by m w_j and by z_j^(-m / B).

  z_j = (2j / R + gamma) / (1 + gamma), so that a score carries z_j^((n - m) / B) in pair j: fast
  pairs fade with distance n - m >= 0. Meant for causal attention: the same factor grows for keys
  ahead. float32 holds |n - centre| up to about 35,000 at the defaults. arXiv:2212.10554.

  Args:
    gamma: 0.4 in the paper; larger fades less.
    scale_base: B, the distance at which pair j has faded to z_j.
    centre: position at which queries and keys are not scaled; scores do not depend on it.
    base, rotary_dim: see `Rotary`.

  Raises:
    ValueError: `gamma` or `scale_base` is not positive, or `rotary_dim` is odd or wider than the
      head.
  """

  def __init__(
    self,
    *,
    gamma: float = 0.4,
    scale_base: float = 512.0,
    centre: int = 0,
    base: float = 10_000.0,
    rotary_dim: int | None = None,
  ):
    if gamma <= 0 or scale_base <= 0:
      raise ValueError(f"gamma={gamma} and scale_base={scale_base} must be positive")
    super().__init__(base=base, rotary_dim=rotary_dim)
    self.gamma, self.scale_base, self.centre = gamma, scale_base, centre

  def frequencies(self, width):
    return frequencies(width, self.base)

  def query(self, x, position):
    return self._fade(x, position, 1)

  def key(self, x, position):
    return self._fade(x, position, -1)

  def _fade(self, x: jax.Array, position: jax.Array, sign: int) -> jax.Array:
    R, dtype = self.width(x.shape[-1]), working_dtype(x)
    turned = rotate(x.astype(dtype), angles(position, self.frequencies(R), dtype))
    z = (2 * np.arange(R // 2) / max(R, 1) + self.gamma) / (1 + self.gamma)
    far = angles(jnp.asarray(position) - self.centre, sign * np.log(z) / self.scale_base, dtype)
    scale = jnp.tile(jnp.exp(far), 2)[..., None, :]  # both halves of a pair alike
    return jnp.concatenate([turned[..., :R] * scale, turned[..., R:]], axis=-1).astype(x.dtype)


ENTRY = Entry(make=XPos, paper="arXiv:2212.10554", facts={"relative", "identity_at_zero"})
