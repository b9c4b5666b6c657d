"""Normalisers: how scores become weights."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.partial import Partial
from attnx.core import struct


class Normaliser:
  """Turns scores into weights in two moves, so that the keys of a row may arrive in pieces.

  `weigh` sees some keys of a row, `finish` sees the merged sums. A normaliser that must see the
  whole row at once (top-k, entmax) says `needs = {"row"}` and is never given less.

  Attributes:
    needs: what it asks of an implementation; see `Need`.
    counts: whether `finish` reads `Partial.count`, which is zero where it does not: counting the
      keys of a masked tile costs a kernel a quarter of its time.
  """

  needs: ClassVar[frozenset[str]] = frozenset()
  counts: ClassVar[bool] = True

  def height(self, scores: jax.Array) -> jax.Array | None:
    """What the peak of a row is the maximum of, pair by pair; None: weights do not rescale."""
    del scores
    return None

  def peak(self, scores: jax.Array, visible: jax.Array) -> jax.Array:
    """The score (B, N, T) that the weights of these keys are best measured from.

    Zero, unless the normaliser rescales; then -inf where nothing is visible.
    """
    height = self.height(scores)
    if height is None:
      return jnp.zeros(scores.shape[:-1], scores.dtype)
    return jnp.where(visible, height, -jnp.inf).max(-1)

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    """Unnormalised weights (B, N, T, S) measured from `peak`, zero where not visible.

    Args:
      scores: (B, N, T, S), float32.
      visible: bool, broadcasts to `scores`.
      peak: (B, N, T, 1), finite, at least `self.peak` of these keys; carries no gradient.
    """
    raise NotImplementedError

  def finish(self, p: Partial) -> jax.Array:
    """The output (B, T, N, V). Rows that saw no key come out as zero."""
    raise NotImplementedError


@struct.dataclass
class Softmax(Normaliser):
  """exp(s_j) / sum_k exp(s_k)."""

  counts: ClassVar[bool] = False

  def height(self, scores):
    return scores

  def weigh(self, scores, visible, peak):
    return jnp.exp(jnp.where(visible, scores - peak, -jnp.inf))

  def finish(self, p):
    return p.out / jnp.where(p.mass > 0, p.mass, 1.0)[..., None] if p.whole is None else p.whole


class Projection(Normaliser):
  """project(slope * (s - max s)): whole rows to weights that sum to one, many of them exactly zero.

  A subclass gives `slope` and `project`.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"row"})
  slope: ClassVar[float] = 1.0

  @staticmethod
  def project(z: jax.Array) -> jax.Array:
    """Weights of the last axis, whose maximum is zero; -2 stands for whatever is further below."""
    raise NotImplementedError

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    best = jnp.where(visible, scores, -jnp.inf).max(-1, keepdims=True)
    best = jax.lax.stop_gradient(jnp.where(jnp.isneginf(best), 0.0, best))
    below = jnp.maximum(self.slope * (scores - best), -2.0)
    return jnp.where(visible, self.project(jnp.where(visible, below, -2.0)), 0.0)

  def finish(self, p: Partial) -> jax.Array:
    return p.out
