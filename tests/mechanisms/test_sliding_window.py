"""The causal sliding window."""

import numpy as np
import pytest
from specs import inputs, pairs, visited

from attnx.attention import AttentionSpec, attend
from attnx.core import registry


def build(window: int):
  return registry.build("masks", dict(name="sliding_window", window=window))


def test_a_query_sees_itself_and_the_window_less_one_before():
  expected = np.tri(9, dtype=bool) & ~np.tri(9, k=-3, dtype=bool)
  np.testing.assert_array_equal(pairs(build(3), 9)[0, 0], expected)


def test_a_window_of_one_copies_the_value():
  q, k, v = inputs(6, 6, np.float32)
  out = attend(q, k, v, AttentionSpec(mask=build(1)))
  np.testing.assert_allclose(out, np.repeat(v, 2, axis=2), rtol=1e-6)


def test_a_window_of_the_whole_length_is_causal():
  np.testing.assert_array_equal(pairs(build(9), 9), pairs(registry.build("masks", "causal"), 9))


def test_visited_tiles_grow_with_the_length_and_not_with_its_square():
  assert visited(build(8), 64, 8) == 15 and visited(build(8), 128, 8) == 31


def test_a_window_of_nothing_raises():
  with pytest.raises(ValueError, match="window=0 must be at least 1"):
    build(0)
