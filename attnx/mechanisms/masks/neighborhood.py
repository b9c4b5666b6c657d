"""Neighbourhood attention: windows on a grid that shift at its borders (NAT, DiNAT, NATTEN)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attnx.attention.masks import Block, Mask, Range, Span
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class Neighborhood(Mask):
  """start_a(q) <= c_a(k) < start_a(q) + K_a on every axis a of a grid in row-major order.

  On an axis of length L without dilation, coordinate i looks from the leader of its stride,
  l = s floor(i / s) + floor(s / 2), at the K coordinates from clip(l - floor(K / 2), 0, L - K): the
  window is moved, not cut, at the border, so that every query sees exactly prod K keys. With
  dilation d the same holds for floor(i / d) among the coordinates that are i modulo d. On a causal
  axis l = min(s floor(i / s) + s - 1, L - 1), and the window max(l - K + 1, 0) .. i is cut.
  Tokens whose position is not on the grid meet nobody (arXiv:2204.07143, 2209.15001, 2403.04690).

  Attributes:
    shape: lengths of the axes; position = row-major place on the grid.
    window: K of each axis.
    dilation: d of each axis, K d <= L.
    stride: s of each axis, s <= K; s = K with d = 1 is attention in disjoint windows.
    causal: whether each axis is.
  """

  shape: tuple[int, ...] = struct.static()
  window: tuple[int, ...] = struct.static()
  dilation: tuple[int, ...] = struct.static()
  stride: tuple[int, ...] = struct.static()
  causal: tuple[bool, ...] = struct.static()

  def __post_init__(self):
    axes = list(zip(self.shape, self.window, self.dilation, self.stride, self.causal, strict=True))
    for L, K, d, s, _ in axes:
      if K < 1 or d < 1 or K * d > L or not 1 <= s <= K:
        raise ValueError(
          f"window={K}, dilation={d} and stride={s} must be positive on an axis of {L}, with "
          "window * dilation at most its length and stride at most the window"
        )

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    at, of = q.position, k.position
    size = math.prod(self.shape)
    visible = (at >= 0) & (of >= 0) & (at < size) & (of < size)
    for axis, L in enumerate(self.shape):
      inner = math.prod(self.shape[axis + 1 :])
      visible &= self._near(axis, at // inner % L, of // inner % L)
    return visible

  def _near(self, axis: int, i: jax.Array, j: jax.Array) -> jax.Array:
    """Whether coordinate j is in the window of coordinate i."""
    d = self.dilation[axis]
    same = i % d == j % d
    length = self.shape[axis] // d + (i % d < self.shape[axis] % d)  # of the residue class
    lead, (i, j), K = self._leader(axis, i // d), (i // d, j // d), self.window[axis]
    if self.causal[axis]:
      start = jnp.maximum(jnp.minimum(lead, length - 1) - K + 1, 0)
      return same & (j >= start) & (j <= i)
    start = jnp.clip(lead - K // 2, 0, length - K)
    return same & (j >= start) & (j < start + K)

  def _leader(self, axis: int, i):
    s = self.stride[axis]
    return i // s * s + (s - 1 if self.causal[axis] else s // 2)

  def block(self, q: Span, k: Span) -> Block:
    """From the first axis alone, along which the windows of successive tokens move forward."""
    inner = math.prod(self.shape[1:]) * self.dilation[0]
    shrink = lambda r: Range(r.lo // inner, r.hi // inner)
    at, of, K = shrink(q.position), shrink(k.position), self.window[0]
    last = self.shape[0] // self.dilation[0] - K  # the last start, of the shortest residue class
    rest = zip(self.shape[1:], self.window[1:], self.causal[1:], strict=True)
    slab = self.dilation[0] == 1 and all(L == K and not causal for L, K, causal in rest)
    size = math.prod(self.shape)
    slab = (q.position.hi < size) & (k.position.hi < size) & slab
    if self.causal[0]:
      lo, hi = (self._leader(0, c) - K + 1 for c in at)
      late = (of.hi < lo) & (of.hi < last)
      begun = (of.lo >= hi) | (of.lo >= last)
      return Block(empty=late | (of.lo > at.hi), full=slab & begun & (of.hi <= at.lo))
    lo, hi = (self._leader(0, c) - K // 2 for c in at)
    late = (of.hi < lo) & (of.hi < last)
    early = (of.lo >= K) & (of.lo >= hi + K)
    inside = ((of.lo >= hi) | (of.lo >= last)) & ((of.hi < K) | (of.hi < lo + K))
    return Block(empty=late | early, full=slab & inside)


def neighborhood(
  shape: int | tuple[int, ...],
  window: int | tuple[int, ...],
  dilation: int | tuple[int, ...] = 1,
  stride: int | tuple[int, ...] = 1,
  causal: bool | tuple[bool, ...] = False,
) -> Neighborhood:
  """`Neighborhood` where a number stands for the same on every axis.

  Raises:
    ValueError: the window does not fit the grid, or tuples are not of one length.
  """
  grid = (shape,) if isinstance(shape, int) else tuple(shape)
  rest: list[Any] = []
  for name, given in (
    ("window", window), ("dilation", dilation), ("stride", stride), ("causal", causal)
  ):  # fmt: skip
    each = (given,) * len(grid) if isinstance(given, int) else tuple(given)
    if len(each) != len(grid):
      raise ValueError(f"{name}={given} must be a number or have one for each axis of {grid}")
    rest.append(each)
  return Neighborhood(grid, *rest)


ENTRY = Entry(make=neighborhood, paper="arXiv:2204.07143", tiny=dict(shape=(4, 3), window=(3, 2)))
