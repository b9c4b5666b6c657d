"""Entmax15."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import instance, weights_of

NORMALISER = instance("normalisers", "entmax15")


@pytest.mark.parametrize(
  "scores, expected",
  [
    ([1.0, 0.5, -1.0], [0.67399264, 0.32600736, 0.0]),
    ([0.1, 0.0, -0.1], [0.39175718, 0.33166667, 0.27657616]),
    ([2.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ([0.4, 0.4, 0.4, 0.4], [0.25, 0.25, 0.25, 0.25]),
  ],
)
def test_weights_are_those_of_the_closed_form(scores, expected):
  with jax.enable_x64(True):
    np.testing.assert_allclose(weights_of(NORMALISER, np.array(scores)), expected, atol=1e-7)


def by_bisection(scores: np.ndarray) -> np.ndarray:
  weights = lambda tau: np.maximum(scores / 2 - tau, 0) ** 2
  low, high = scores.max() / 2 - 1, scores.max() / 2
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if weights(middle).sum() > 1 else (low, middle)
  return weights(low)


def test_the_threshold_is_that_of_bisection_also_where_keys_are_hidden():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    scores, visible = 3 * rng.standard_normal((4, 20, 11)), rng.random((4, 20, 11)) < 0.7
    visible[..., 0] = True
    actual = weights_of(NORMALISER, scores, visible)
    for at in np.ndindex(4, 20):
      seen = visible[at]
      np.testing.assert_allclose(actual[at][seen], by_bisection(scores[at][seen]), atol=1e-9)
      assert not actual[at][~seen].any()


def test_gradients_of_first_and_second_order_are_those_of_finite_differences():
  rng = np.random.default_rng(1)
  scores, values, d = rng.standard_normal((3, 9))
  with jax.enable_x64(True):
    loss = lambda s: jnp.sum(jnp.sin(3 * weights_of(NORMALISER, s)) * values)
    grad = jax.jit(jax.grad(loss))
    numeric = (loss(scores + 1e-6 * d) - loss(scores - 1e-6 * d)) / 2e-6
    np.testing.assert_allclose(grad(scores) @ d, numeric, rtol=1e-6)
    np.testing.assert_allclose(grad(scores).sum(), 0, atol=1e-12)
    numeric = (grad(scores + 1e-6 * d) - grad(scores - 1e-6 * d)) / 2e-6
    np.testing.assert_allclose(jax.hessian(loss)(jnp.asarray(scores)) @ d, numeric, rtol=1e-5)


def test_scores_of_any_size_are_finite():
  scores = jnp.array([1e30, -1e30, 3.0, 1e30], jnp.float32)
  weights, grad = jax.value_and_grad(lambda s: weights_of(NORMALISER, s)[0])(scores)
  np.testing.assert_allclose(weights, 0.5)
  assert np.isfinite(grad).all()
