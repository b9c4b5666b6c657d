"""Sigmoid attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import inputs, weights_of

from attnx.attention import AttentionSpec, attend
from attnx.core import registry


def build(**kwargs):
  return registry.build("normalisers", dict(name="sigmoid", **kwargs))


def test_weights_are_sigmoids_of_biased_scores():
  scores = np.array([2.0, -1.0, 80.0, -80.0])
  with jax.enable_x64(True):
    expected = 1 / (1 + 4 * np.exp(-scores))
    np.testing.assert_allclose(weights_of(build(length=4), scores), expected, rtol=1e-12)
    np.testing.assert_allclose(
      weights_of(build(bias=0.0), scores), 1 / (1 + np.exp(-scores)), rtol=1e-12
    )


def test_scores_of_zero_are_nearly_the_mean():
  np.testing.assert_allclose(weights_of(build(length=9), np.zeros(9)), 1 / 10, rtol=1e-6)


def test_every_key_adds_its_own_part():
  q, k, v = inputs(dtype=np.float32)
  spec = AttentionSpec(normaliser=build(length=11))
  parts = attend(q, k[:, :4], v[:, :4], spec) + attend(q, k[:, 4:], v[:, 4:], spec)
  np.testing.assert_allclose(attend(q, k, v, spec), parts, rtol=1e-5, atol=1e-6)


def test_the_bias_may_follow_the_number_of_keys_of_a_row():
  scores = np.random.default_rng(0).standard_normal((1, 4, 4)).astype(np.float32)
  actual = weights_of(build(row=True), scores, np.tri(4, dtype=bool))[0]
  for n in range(1, 5):
    alone = weights_of(build(length=n), scores[0, n - 1, :n])
    np.testing.assert_allclose(actual[n - 1, :n], alone, rtol=1e-5)


def test_gradients_of_large_scores_are_finite_and_minus_infinity_is_nothing():
  grad = jax.grad(lambda s: weights_of(build(length=4), s).sum())(jnp.array([90.0, -90.0, 1e9]))
  assert np.isfinite(grad).all()
  assert not weights_of(build(bias=-np.inf), np.ones(3)).any()


def test_exactly_one_bias_must_be_given():
  with pytest.raises(ValueError, match="give exactly one"):
    build()
  with pytest.raises(ValueError, match="give exactly one"):
    build(length=3, bias=0.0)
  with pytest.raises(ValueError, match="length=0 must be at least 1"):
    build(length=0)
