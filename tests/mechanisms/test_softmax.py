"""Softmax."""

import jax
import jax.numpy as jnp
import numpy as np
from specs import instance, weights_of

SOFTMAX = instance("normalisers", "softmax")


def test_weights_are_exponentials_over_their_sum():
  scores = np.random.default_rng(0).standard_normal((4, 3, 7))
  with jax.enable_x64(True):
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights_of(SOFTMAX, scores), expected, rtol=1e-12)


def test_equal_scores_are_a_mean_and_enormous_ones_a_maximum():
  np.testing.assert_allclose(weights_of(SOFTMAX, np.full(5, -1e30, np.float32)), 0.2, rtol=1e-6)
  np.testing.assert_array_equal(
    weights_of(SOFTMAX, np.array([1e30, 3e30, -3e30], np.float32)), [0, 1, 0]
  )


def test_keys_that_are_not_visible_take_no_weight_however_large():
  seen = weights_of(SOFTMAX, np.array([0.0, 1e9, 0.0]), np.array([True, False, True]))
  np.testing.assert_array_equal(seen, [0.5, 0, 0.5])


def test_the_gradient_is_the_covariance():
  with jax.enable_x64(True):
    scores, values = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.0, 5.0, -2.0])
    p = weights_of(SOFTMAX, scores)
    grad = jax.grad(lambda s: weights_of(SOFTMAX, s) @ values)(scores)
    np.testing.assert_allclose(grad, p * (values - p @ values), rtol=1e-10)
