"""YaRN: interpolation by parts and the temperature of the paper."""

import math

import jax
import numpy as np
import pytest

from attnx.core import registry
from attnx.mechanisms.positions.yarn import Yarn

H = 64
X = np.random.default_rng(0).normal(size=(2, 6, 3, H))


def paper(j, factor, L, R=H, base=10_000.0, alpha=1.0, beta=32.0):
  """h(theta_j) written one pair at a time, as in the definition."""
  theta = base ** (-2 * j / R)
  r = L / (2 * math.pi / theta)
  gamma = 0.0 if r < alpha else 1.0 if r > beta else (r - alpha) / (beta - alpha)
  return (1 - gamma) * theta / factor + gamma * theta


@pytest.mark.parametrize("factor, L", [(16.0, 4096), (4.0, 64), (1.0, 128)])
def test_frequencies_follow_the_definition(factor, L):
  expected = [paper(j, factor, L) for j in range(H // 2)]
  np.testing.assert_allclose(Yarn(factor, L).frequencies(H), expected, rtol=1e-13)


def test_pairs_that_turn_often_stay_and_pairs_that_never_turn_are_interpolated():
  w, mixed = registry.build("positions", "rope").frequencies(H), Yarn(8.0, 4096).frequencies(H)
  turns = 4096 * w / (2 * np.pi)
  np.testing.assert_array_equal(mixed[turns > 32], w[turns > 32])
  np.testing.assert_array_equal(mixed[turns < 1], w[turns < 1] / 8)
  between = (turns < 32) & (turns > 1)
  assert between.any() and (mixed[between] < w[between]).all()


@pytest.mark.parametrize("rotary_dim", [None, 16])
def test_scores_gain_the_square_of_the_temperature(rotary_dim):
  m = 0.1 * math.log(16) + 1
  with jax.enable_x64(True):
    yarn, here = Yarn(16.0, 4096, rotary_dim=rotary_dim), np.full((1, 6), 77)
    q, k = yarn.query(X, here), yarn.key(X[::-1], here)
    actual, plain = (q * k).sum(-1), (X * X[::-1]).sum(-1)  # equal positions: nothing turns
    np.testing.assert_allclose(actual, m**2 * plain, rtol=1e-10)


def test_a_factor_of_one_is_rope():
  rope, at = registry.build("positions", "rope"), np.arange(6)[None]
  x = X.astype(np.float32)
  np.testing.assert_allclose(Yarn(1.0, 128).query(x, at), rope.query(x, at), rtol=1e-5, atol=1e-6)


def test_ramps_that_run_backwards_and_factors_below_one_are_refused():
  with pytest.raises(ValueError, match="fast=1.0 turns must be more than slow=2.0"):
    Yarn(4.0, 128, slow=2.0, fast=1.0)
  with pytest.raises(ValueError, match="factor=0.5 must be at least 1"):
    Yarn(0.5, 128)
