"""Entropy of attention rows."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core import registry

T, S = 5, 7
RNG = np.random.default_rng(0)


def entropy(weights) -> np.ndarray:
  (found,) = registry.build("analyses", "entropy")({"mixer/weights": jnp.asarray(weights)}).values()
  return np.asarray(found)


def test_a_row_that_sees_n_keys_alike_has_log_n():
  counts = np.arange(1, T + 1)
  weights = np.tri(T) / counts[:, None]
  np.testing.assert_allclose(entropy(weights[None, None])[0, 0], np.log(counts), atol=1e-6)


def test_one_key_or_none_has_no_entropy():
  np.testing.assert_array_equal(entropy(np.eye(T)[None, None]), 0.0)
  np.testing.assert_array_equal(entropy(np.zeros((1, 2, T, S))), 0.0)


def test_it_is_the_log_sum_exp_less_the_mean_score():
  with jax.enable_x64(True):
    scores = 30 * RNG.normal(size=(2, 3, T, S))
    shifted = scores - scores.max(-1, keepdims=True)
    lse = np.log(np.exp(shifted).sum(-1))
    p = np.exp(shifted - lse[..., None])
    np.testing.assert_allclose(entropy(p), lse - (p * shifted).sum(-1), rtol=1e-9, atol=1e-12)


def test_size_and_sign_of_a_map_do_not_matter():
  weights = RNG.normal(size=(1, 2, T, S)).astype(np.float32)
  scale = np.logspace(-6, 6, T)[:, None]
  np.testing.assert_allclose(entropy(-scale * weights), entropy(weights), rtol=1e-5)


def test_as_many_copies_of_the_keys_add_their_log():
  weights = RNG.uniform(size=(1, 2, T, S)).astype(np.float32)
  both = np.concatenate([weights] * 4, axis=-1)
  np.testing.assert_allclose(entropy(both), entropy(weights) + np.log(4), rtol=1e-5)


def test_its_gradient_to_scores_is_finite_under_a_mask_and_true():
  with jax.enable_x64(True):
    visible, scores = np.tri(T, dtype=bool), RNG.normal(size=(T, T))
    build = registry.build("analyses", "entropy")

    def total(scores):
      weights = jax.nn.softmax(scores, where=visible)
      return build({"weights": weights[None, None]})[""].sum()

    p = np.where(visible, np.exp(scores), 0.0)
    p /= p.sum(-1, keepdims=True)
    log = np.log(np.where(visible, p, 1.0))
    expected = -p * (log - (p * log).sum(-1, keepdims=True))
    np.testing.assert_allclose(jax.grad(total)(scores), expected, rtol=1e-9, atol=1e-12)
