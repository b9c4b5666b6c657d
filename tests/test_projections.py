"""Normalisers that project whole rows onto the simplex: thresholds and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import instance, weights_of

WEIGHTS = {  # of a threshold, for scores that are known
  "sparsemax": lambda scores, tau: np.maximum(scores - tau, 0),
  "entmax15": lambda scores, tau: np.maximum(scores / 2 - tau / 2, 0) ** 2,
}
projections = pytest.mark.parametrize("name", WEIGHTS)


def by_bisection(name: str, scores: np.ndarray) -> np.ndarray:
  low, high = scores.max() - 2, scores.max()
  for _ in range(60):
    middle = (low + high) / 2
    above = WEIGHTS[name](scores, middle).sum() > 1
    low, high = (middle, high) if above else (low, middle)
  return WEIGHTS[name](scores, low)


@projections
def test_the_threshold_is_that_of_bisection_also_where_keys_are_hidden(name):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    scores, visible = 3 * rng.standard_normal((4, 20, 11)), rng.random((4, 20, 11)) < 0.7
    visible[..., 0] = True
    actual = weights_of(instance("normalisers", name), scores, visible)
    for at in np.ndindex(4, 20):
      seen = visible[at]
      expected = by_bisection(name, scores[at][seen])
      np.testing.assert_allclose(actual[at][seen], expected, atol=1e-9)
      assert not actual[at][~seen].any()


@projections
def test_gradients_of_first_and_second_order_are_those_of_finite_differences(name):
  rng = np.random.default_rng(1)
  scores, values, d = rng.standard_normal((3, 9))
  with jax.enable_x64(True):
    weights = lambda s: weights_of(instance("normalisers", name), s)
    loss = lambda s: jnp.sum(jnp.sin(3 * weights(s)) * values)
    grad = jax.jit(jax.grad(loss))
    numeric = (loss(scores + 1e-6 * d) - loss(scores - 1e-6 * d)) / 2e-6
    np.testing.assert_allclose(grad(scores) @ d, numeric, rtol=1e-6)
    np.testing.assert_allclose(grad(scores).sum(), 0, atol=1e-12)
    numeric = (grad(scores + 1e-6 * d) - grad(scores - 1e-6 * d)) / 2e-6
    np.testing.assert_allclose(jax.hessian(loss)(jnp.asarray(scores)) @ d, numeric, rtol=1e-5)


@projections
def test_scores_of_any_size_are_finite(name):
  normaliser, scores = instance("normalisers", name), jnp.array([1e30, -1e30, 3.0, 1e30])
  weights, grad = jax.value_and_grad(lambda s: weights_of(normaliser, s)[0])(scores)
  np.testing.assert_allclose(weights, 0.5)
  assert np.isfinite(grad).all()
