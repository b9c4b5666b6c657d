"""Neighbourhoods on a grid."""

import itertools

import numpy as np
import pytest
from specs import inputs, pairs, visited

from attnx.attention import AttentionSpec, attend, plan
from attnx.core import registry
from attnx.core.tokens import Tokens


def build(shape, window, **kwargs):
  return registry.build("masks", dict(name="neighborhood", shape=shape, window=window, **kwargs))


def window_of(i: int, L: int, K: int, d: int, s: int, causal: bool) -> set[int]:
  """Coordinates that coordinate i sees, by the published case distinction."""
  group, c = i % d, i // d
  length = L // d + (group < L % d)
  if causal:
    leader = min(c // s * s + s - 1, length - 1)
    return {group + j * d for j in range(max(leader - K + 1, 0), min(c + 1, length))}
  left, right = K // 2, K // 2 - 1 + K % 2
  leader = min(c // s * s + s // 2, length - 1)
  start = max(leader - left, 0)
  if leader + right >= length:
    start += length - right - leader - 1
  return {group + j * d for j in range(start, start + K)}


LINES = [
  (L, K, d, s, causal)
  for L, K, d, s, causal in itertools.product(
    (5, 8, 13), (1, 2, 3, 5, 6), (1, 2, 3), (1, 2, 3, 5), (False, True)
  )
  if K * d <= L and s <= K
]


def test_every_line_has_the_published_windows_and_tiles_agree():
  assert len(LINES) > 100
  for L, K, d, s, causal in LINES:
    mask = build(L, K, dilation=d, stride=s, causal=causal)
    actual = pairs(mask, L)[0, 0]
    for i in range(L):
      assert set(np.flatnonzero(actual[i])) == window_of(i, L, K, d, s, causal), (L, K, d, s, i)
    for chunk in (1, 2, 3):
      ends = -(-L // chunk) * chunk
      where = plan.pad(Tokens.of_length(L), ends)
      found = plan.tiles(mask, where, where, chunk, chunk)
      padded = np.pad(actual, ((0, ends - L),) * 2).reshape(ends // chunk, chunk, -1, chunk)
      assert not (found.empty & padded.any((1, 3))).any()
      assert (found.full <= padded.all((1, 3))).all()


def test_axes_multiply_and_tiles_of_a_grid_agree():
  shape, window, dilation, stride = (4, 3, 5), (2, 3, 2), (2, 1, 2), (1, 2, 2)
  for causal in ((False,) * 3, (True, False, False)):
    mask = build(shape, window, dilation=dilation, stride=stride, causal=causal)
    actual = pairs(mask, 60)[0, 0].reshape(*shape, *shape)
    for at in np.ndindex(shape):
      axes = [window_of(*x) for x in zip(at, shape, window, dilation, stride, causal)]
      seen = np.zeros(shape, bool)
      seen[np.ix_(*map(sorted, axes))] = True
      np.testing.assert_array_equal(actual[at], seen)
    where = Tokens.of_length(60)
    tiled = actual.reshape(10, 6, 10, 6)
    assert not (plan.tiles(mask, where, where, 6, 6).empty & tiled.any((1, 3))).any()


def test_every_query_of_a_grid_sees_the_product_of_the_windows():
  assert (pairs(build((5, 6), (3, 4)), 30).sum(-1) == 12).all()


def test_a_window_of_the_whole_grid_is_everything():
  q, k, v = inputs(12, 12, np.float32)
  spec = AttentionSpec(mask=build((3, 4), (3, 4)))
  np.testing.assert_allclose(attend(q, k, v, spec), attend(q, k, v), rtol=1e-5, atol=1e-6)
  assert not pairs(build((2, 2), 2), 5)[0, 0, 4].any()  # off the grid


def test_a_stride_of_the_window_is_attention_in_disjoint_windows():
  blocks = np.kron(np.eye(3, dtype=bool), np.ones((4, 4), bool))
  np.testing.assert_array_equal(pairs(build(12, 4, stride=4), 12)[0, 0], blocks)


def test_tiles_far_from_the_rows_of_the_window_are_skipped():
  assert visited(build((16, 8), (3, 3)), 128, 8) == 2 * 3 + 14 * 3
  assert visited(build(64, 8, stride=8), 64, 8) == 8


def test_what_does_not_fit_raises():
  with pytest.raises(ValueError, match="window=3, dilation=3"):
    build(8, 3, dilation=3)
  with pytest.raises(ValueError, match=r"window=\(3,\) must be a number or have one for each axis"):
    build((4, 4), (3,))
