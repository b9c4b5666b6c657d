"""Windows with gaps."""

import numpy as np
import pytest
from specs import pairs, visited

from attnx.core import registry


def build(**kwargs):
  return registry.build("masks", dict(name="dilated", **kwargs))


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_those_of_the_formula(dilation, causal):
  actual = pairs(build(window=3, dilation=dilation, causal=causal), 14)[0, 0]
  steps = range(3) if causal else range(-3, 4)
  for i in range(14):
    expected = {i - j * dilation for j in steps} & set(range(14))
    assert set(np.flatnonzero(actual[i])) == expected


def test_a_dilation_of_one_is_the_sliding_window():
  window = registry.build("masks", dict(name="sliding_window", window=4))
  np.testing.assert_array_equal(pairs(build(window=4, dilation=1), 12), pairs(window, 12))


def test_every_head_may_have_its_own_dilation():
  actual = pairs(build(window=3, dilation=(1, 2, 4)), 14, heads=3)[0]
  for head, dilation in enumerate((1, 2, 4)):
    alone = pairs(build(window=3, dilation=dilation), 14)[0, 0]
    np.testing.assert_array_equal(actual[head], alone)


def test_tiles_beyond_the_farthest_key_are_skipped():
  assert visited(build(window=5, dilation=2), 64, 8) == 15


def test_windows_and_dilations_must_be_positive():
  with pytest.raises(ValueError, match="window=0 must be at least 1"):
    build(window=0)
  with pytest.raises(ValueError, match=r"dilation=\(1, 0\) must be at least 1"):
    build(window=2, dilation=(1, 0))
