"""What a decoded token costs on P devices, by the strategy: steps, and bytes that a device sends.

B rows, N query heads, K key heads of width H, t keys on each device. After arXiv:2408.04093, whose
V_ring = 2 b t d P, in numbers, counts a hop more than there are (d is K H where heads are grouped),
and whose V_tree = 2 (P - 1) / P (b d + 2 b n) is that of the two all-reduces.
"""

from __future__ import annotations

import math

FLOAT = 4  # bytes: partials are float32 whatever the keys are


def partial_bytes(B: int, N: int, H: int) -> int:
  """Output, mass, peak and count of one token."""
  return FLOAT * B * N * (H + 3)


def rounds(P: int) -> int:
  """Messages one after the other of a butterfly."""
  floor = P.bit_length() - 1
  return floor if P == 1 << floor else floor + 2


def butterfly(P: int, *, B: int, N: int, H: int, **_) -> tuple[int, int]:
  return rounds(P), rounds(P) * partial_bytes(B, N, H)


def all_reduce(P: int, *, B: int, N: int, H: int, **_) -> tuple[int, float]:
  """One of the peak, then one of output and mass; each as a tree, ceil(log2 P) steps.

  The bytes are those of its usual form, a reduce-scatter and an all-gather. The count is no part of
  a softmax, so that the compiler leaves it out.
  """
  return 2 * math.ceil(math.log2(P)), 2 * (P - 1) / P * FLOAT * B * N * (H + 2)


def ring_of_partials(P: int, *, B: int, N: int, H: int, **_) -> tuple[int, int]:
  return P - 1, (P - 1) * partial_bytes(B, N, H)


def ring_of_keys(P: int, *, B: int, K: int, H: int, t: int, itemsize: int, **_) -> tuple[int, int]:
  """A step sends keys and values, which may be two messages side by side."""
  return P - 1, (P - 1) * 2 * B * t * K * H * itemsize


FORMULAS = {
  "tree, butterfly": butterfly,
  "tree, all-reduce": all_reduce,
  "ring of partials": ring_of_partials,
  "ring of keys": ring_of_keys,
}
