"""Talking heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import N, inputs, instance, weights_of, wide

from attnx.attention import AttentionSpec, attend
from attnx.core import registry

TALKING = instance("normalisers", "talking_heads")
SCORES = np.random.default_rng(0).standard_normal((N, 3, 6))


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_logits_and_weights_are_mixed_over_heads():
  with jax.enable_x64(True):
    mixed = np.einsum("lts,ln->nts", SCORES, TALKING.logits)
    expected = np.einsum("nts,nm->mts", softmax(mixed), TALKING.weights)
    np.testing.assert_allclose(weights_of(wide(TALKING), SCORES), expected, rtol=1e-9, atol=1e-12)


def test_it_starts_as_the_normaliser_inside():
  for inner in (instance("normalisers", "softmax"), instance("normalisers", "cog")):
    start = registry.build("normalisers", dict(name="talking_heads", normaliser=inner), num_heads=N)
    np.testing.assert_allclose(
      weights_of(start, SCORES), weights_of(inner, SCORES), rtol=1e-5, atol=1e-6
    )
  with pytest.raises(TypeError, match="must be a Normaliser"):
    registry.build("normalisers", dict(name="talking_heads", normaliser="cog"), num_heads=N)


def test_matrices_that_permute_heads_permute_the_weights():
  order = [2, 0, 3, 1]
  swap = dataclasses.replace(TALKING, logits=np.eye(N)[:, order], weights=np.eye(N))
  np.testing.assert_allclose(weights_of(swap, SCORES), softmax(SCORES[order]), rtol=1e-5)


def test_a_head_hears_nothing_of_pairs_that_it_or_the_speaker_may_not_see():
  visible = np.ones(SCORES.shape, bool)
  visible[1, :, 2] = False
  seen = weights_of(TALKING, SCORES, visible)
  loud = np.where(visible, SCORES, 100.0)
  np.testing.assert_array_equal(weights_of(TALKING, loud, visible), seen)
  assert not seen[1, :, 2].any() and seen[0, :, 2].any()


def test_both_matrices_are_trained():
  q, k, v = inputs(dtype=np.float32)
  loss = lambda s: jnp.cos(attend(q, k, v, AttentionSpec(normaliser=s))).sum()
  grad = jax.grad(loss)(TALKING)
  assert np.abs(grad.logits).min() > 0 and np.abs(grad.weights).min() > 0
