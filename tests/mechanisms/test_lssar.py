"""Softplus attention with re-weighting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import instance, weights_of

from attnx.core import registry


def build(**kwargs):
  return registry.build("normalisers", dict(name="lssar", **kwargs))


def by_hand(scores: np.ndarray, power: int) -> np.ndarray:
  n = len(scores)
  f = np.log1p(np.exp(np.log(n) * scores))
  excess = n * f / f.sum() - (1 if n > 3 else 0)
  r = np.maximum(excess, 0) ** power
  return r / (r.sum() + 1e-8)


@pytest.mark.parametrize("power", [1, 3, 15])
def test_weights_are_the_formula_of_the_paper_for_rows_of_any_length(power):
  with jax.enable_x64(True):
    scores = np.random.default_rng(0).standard_normal((1, 8, 8))
    actual = weights_of(build(power=power), scores, np.tri(8, dtype=bool))[0]
    for n in range(1, 9):
      np.testing.assert_allclose(actual[n - 1, :n], by_hand(scores[0, n - 1, :n], power), rtol=1e-8)


def test_power_one_without_an_offset_is_lssa():
  scores = np.random.default_rng(1).standard_normal(9).astype(np.float32)
  np.testing.assert_allclose(
    weights_of(build(power=1, offset=0.0), scores),
    weights_of(instance("normalisers", "lssa"), scores),
    rtol=1e-5,
  )


def test_long_rows_of_keys_that_are_all_alike_are_zero_and_short_ones_a_mean():
  np.testing.assert_allclose(weights_of(build(), np.full(5, 0.3, np.float32)), 0, atol=1e-6)
  np.testing.assert_allclose(weights_of(build(), np.full(3, 0.3)), 1 / 3, rtol=1e-6)


def test_powers_sharpen_and_long_rows_do_not_overflow():
  scores = np.random.default_rng(2).standard_normal(4096).astype(np.float32)
  tops = [weights_of(build(power=p), scores).max() for p in (1, 5, 15)]
  assert tops == sorted(tops)
  one = jnp.zeros(4096).at[7].set(300.0) - 5.0
  weights, grad = jax.value_and_grad(lambda s: weights_of(build(), s)[7])(one)
  np.testing.assert_allclose(weights, 1.0, rtol=1e-6)
  assert np.isfinite(grad).all()


def test_a_power_of_zero_raises():
  with pytest.raises(ValueError, match="power=0 must be at least 1"):
    build(power=0)
