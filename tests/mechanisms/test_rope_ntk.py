"""NTK-aware rope: the two ends of the spectrum, and the base that gives them."""

import numpy as np
import pytest

from attnx.core import registry
from attnx.mechanisms.positions.rope_ntk import RopeNTK


@pytest.mark.parametrize("R", [4, 16, 128])
def test_frequencies_are_those_of_the_larger_base(R):
  base = 10_000.0 * 8.0 ** (R / (R - 2))
  expected = base ** (-2.0 * np.arange(R // 2) / R)
  np.testing.assert_allclose(RopeNTK(8.0).frequencies(R), expected, rtol=1e-12)


def test_the_fastest_pair_keeps_its_frequency_and_the_slowest_is_divided():
  w, slowed = registry.build("positions", "rope").frequencies(32), RopeNTK(8.0).frequencies(32)
  assert slowed[0] == w[0] == 1
  np.testing.assert_allclose(slowed[-1], w[-1] / 8, rtol=1e-12)
  assert (np.diff(slowed / w) < 0).all()


def test_a_factor_of_one_is_rope_and_a_single_pair_stays():
  rope = registry.build("positions", "rope")
  np.testing.assert_array_equal(RopeNTK(1.0).frequencies(8), rope.frequencies(8))
  np.testing.assert_array_equal(RopeNTK(8.0).frequencies(2), [1.0])


def test_a_factor_below_one_is_refused():
  with pytest.raises(ValueError, match="factor=0.9 must be at least 1"):
    RopeNTK(0.9)
