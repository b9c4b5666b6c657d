"""Attention over parts of the keys, and how the parts are merged."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.algebra import FLOOR, Algebra


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partials:
  """Unfinished attention over a part of the keys each, float32; `combined` adds them up.

  Attributes:
    out: (splits, B, N, T, V), sums of weight * value.
    mass: (splits, B, N, T), sums of |weight|.
    peak: (splits, B, N, T), what weights are measured from: -inf where nothing was seen, 0 where
      the algebra has no peak.
    count: (splits, B, N, T), visible keys.
  """

  out: jax.Array
  mass: jax.Array
  peak: jax.Array
  count: jax.Array


def combined(parts: Partials, algebra: Algebra) -> Partials:
  """The partial over the keys of all splits: the same without its first axis."""
  peak = parts.peak.max(0)
  factor = algebra.exp(parts.peak - jnp.maximum(peak, FLOOR))
  out = (parts.out * factor[..., None]).sum(0)
  return Partials(out, (parts.mass * factor).sum(0), peak, parts.count.sum(0))
