"""Position interpolation: rope at fractions of positions."""

import numpy as np
import pytest

from attnx.core import registry
from attnx.mechanisms.positions.rope_linear import RopeLinear

X = np.random.default_rng(0).normal(size=(2, 6, 3, 8)).astype(np.float32)


def test_a_factor_squeezes_positions():
  rope = registry.build("positions", "rope")
  at = np.arange(6)[None]
  actual = RopeLinear(4.0).key(X, 4 * at)
  np.testing.assert_allclose(actual, rope.key(X, at), rtol=1e-5, atol=1e-6)


def test_every_frequency_is_divided():
  w = registry.build("positions", "rope").frequencies(16)
  np.testing.assert_allclose(RopeLinear(3.0).frequencies(16), w / 3, rtol=1e-14)


def test_a_factor_of_one_is_rope():
  rope = registry.build("positions", dict(name="rope", rotary_dim=4, base=100.0))
  linear, at = RopeLinear(1.0, rotary_dim=4, base=100.0), np.arange(6)[None]
  np.testing.assert_array_equal(linear.query(X, at), rope.query(X, at))


def test_a_factor_below_one_is_refused():
  with pytest.raises(ValueError, match="factor=0.5 must be at least 1"):
    RopeLinear(0.5)
