"""elu + 1: exact where rounding would lose it."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.mechanisms.features.elu import Elu


def phi(x):
  return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def test_features_are_elu_plus_one():
  x = np.random.default_rng(0).normal(size=(2, 5, 3, 4))
  with jax.enable_x64(True):
    np.testing.assert_allclose(Elu().query(x), phi(x), rtol=1e-14)
    np.testing.assert_allclose(Elu().key(x), jax.nn.elu(x) + 1, rtol=1e-12)


def test_small_features_are_not_rounded_to_zero():
  x = np.full((1, 1, 1, 1), -60.0, np.float32)
  np.testing.assert_allclose(Elu().key(x), np.exp(-60.0), rtol=1e-5)


def test_the_slope_is_one_at_zero_and_to_the_right_and_the_value_to_the_left():
  x = jnp.array([-2.0, -1e-3, 0.0, 1e-3, 5.0]).reshape(1, 1, 1, 5)
  slope = jax.grad(lambda x: Elu().query(x).sum())(x).ravel()
  np.testing.assert_allclose(slope, [np.exp(-2), np.exp(-1e-3), 1, 1, 1], rtol=1e-6)
