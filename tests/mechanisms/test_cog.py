"""Cog attention."""

import jax
import jax.numpy as jnp
import numpy as np
from specs import inputs, instance, weights_of

from attnx.attention import AttentionSpec, attend

COG, SOFTMAX = instance("normalisers", "cog"), instance("normalisers", "softmax")
SCORES = np.array([1.5, -2.0, 0.3, -0.7, 4.0])


def test_weights_are_signs_times_the_softmax_of_magnitudes():
  with jax.enable_x64(True):
    visible = np.array([True, True, True, True, False])
    size = np.exp(np.abs(SCORES)) * visible
    np.testing.assert_allclose(
      weights_of(COG, SCORES, visible), np.sign(SCORES) * size / size.sum(), rtol=1e-12
    )


def test_positive_scores_are_softmax_and_one_key_gives_its_sign():
  np.testing.assert_allclose(
    weights_of(COG, np.abs(SCORES)), weights_of(SOFTMAX, np.abs(SCORES)), rtol=1e-6
  )
  np.testing.assert_array_equal(weights_of(COG, np.array([-0.4])), [-1])


def test_the_gradient_is_the_published_one():
  with jax.enable_x64(True):
    values = jnp.arange(5.0) ** 2
    p = weights_of(COG, SCORES)
    grad = jax.grad(lambda s: weights_of(COG, s) @ values)(jnp.asarray(SCORES))
    np.testing.assert_allclose(
      grad, np.abs(p) * (values - np.sign(SCORES) * (p @ values)), rtol=1e-10
    )


def test_opposite_queries_give_opposite_outputs():
  q, k, v = inputs(dtype=np.float32)
  spec = AttentionSpec(normaliser=COG)
  np.testing.assert_allclose(attend(-q, k, v, spec), -attend(q, k, v, spec), rtol=1e-5, atol=1e-6)


def test_a_single_head_can_subtract_one_value_from_another():
  np.testing.assert_allclose(weights_of(COG, np.array([20.0, -20.0, 0.0])), [0.5, -0.5, 0],
                             atol=1e-6)  # fmt: skip
