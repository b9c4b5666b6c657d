"""The first keys and the last ones."""

import numpy as np
import pytest
from specs import pairs, visited

from attnx.core import registry


def build(start: int, recent: int):
  return registry.build("masks", dict(name="sink_window", start=start, recent=recent))


def test_a_query_sees_the_first_keys_and_the_recent_ones():
  actual = pairs(build(2, 3), 10)[0, 0]
  for i in range(10):
    assert set(np.flatnonzero(actual[i])) == {j for j in range(i + 1) if j < 2 or i - j < 3}
  assert actual.sum(-1).max() == 2 + 3


def test_without_sinks_it_is_a_sliding_window():
  window = registry.build("masks", dict(name="sliding_window", window=4))
  np.testing.assert_array_equal(pairs(build(0, 4), 10), pairs(window, 10))


def test_while_all_keys_fit_it_is_causal():
  causal = registry.build("masks", "causal")
  np.testing.assert_array_equal(pairs(build(4, 6), 10), pairs(causal, 10))


def test_visited_tiles_grow_with_the_length_and_not_with_its_square():
  assert visited(build(4, 8), 64, 8) == 15 + 6 and visited(build(4, 8), 128, 8) == 31 + 14


def test_a_window_without_the_query_itself_raises():
  with pytest.raises(ValueError, match="recent=0 must be at least 1"):
    build(4, 0)
