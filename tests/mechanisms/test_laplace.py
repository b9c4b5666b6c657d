"""Laplace attention."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from specs import inputs, weights_of

from attnx.attention import AttentionSpec, attend
from attnx.core import registry

LAPLACE = registry.build("normalisers", "laplace")


def test_weights_are_the_distribution_function_of_the_normal_law_of_the_paper():
  scores = np.array([-3.0, 0.0, 0.5, 0.707107, 1.0, 4.0])
  erf = np.vectorize(math.erf)
  expected = 0.5 * (1 + erf((scores - 0.707107) / (0.282095 * math.sqrt(2))))
  with jax.enable_x64(True):
    np.testing.assert_allclose(weights_of(LAPLACE, scores), expected, atol=1e-6)
    assert not weights_of(LAPLACE, scores, np.arange(6) < 0).any()


def test_it_touches_the_squared_relu_where_that_is_one_half():
  with jax.enable_x64(True):
    at = jnp.array([0.5**0.5])
    value, slope = jax.value_and_grad(lambda s: weights_of(LAPLACE, s)[0])(at)
    np.testing.assert_allclose(value, at[0] ** 2, rtol=1e-12)
    np.testing.assert_allclose(slope[0], 2 * at[0], rtol=1e-12)


def test_every_key_adds_its_own_part_and_weights_never_pass_one():
  q, k, v = inputs(dtype=np.float32)
  spec = AttentionSpec(normaliser=LAPLACE)
  parts = attend(q, k[:, :4], v[:, :4], spec) + attend(q, k[:, 4:], v[:, 4:], spec)
  np.testing.assert_allclose(attend(q, k, v, spec), parts, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(weights_of(LAPLACE, np.float32([-1e9, 1e9])), [0, 1])


def test_gradients_of_large_scores_vanish_and_are_finite():
  grad = jax.grad(lambda s: weights_of(LAPLACE, s).sum())(jnp.array([-1e9, -30.0, 0.7, 30.0, 1e9]))
  np.testing.assert_array_equal(grad[jnp.array([0, 1, 3, 4])], 0.0)
  assert grad[2] > 1
