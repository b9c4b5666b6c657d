"""Heads that look everywhere alike."""

import numpy as np
from specs import N, T, inputs, weights_of

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry

QKV = inputs(T, T, np.float32)
UNIFORM = registry.build("transforms", dict(name="uniform_heads", heads=[0, 3]), num_heads=N)


def read(*transforms, **parts) -> np.ndarray:
  spec = AttentionSpec(mask=masks.Causal(), transforms=transforms, **parts)
  return np.asarray(attend(*QKV, spec))


def test_they_read_the_mean_of_what_they_see_and_the_others_what_they_did():
  out, (_, _, v) = read(UNIFORM), QKV
  mean = np.cumsum(v, axis=1) / np.arange(1, T + 1)[:, None, None]
  for head, key_head in ((0, 0), (3, 1)):
    np.testing.assert_allclose(out[:, :, head], mean[:, :, key_head], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(out[:, :, 1:3], read()[:, :, 1:3])


def test_what_comes_after_it_counts_and_what_comes_before_does_not():
  alibi = registry.build("transforms", "alibi", num_heads=N)
  np.testing.assert_allclose(read(alibi, UNIFORM)[:, :, 0], read(UNIFORM)[:, :, 0], rtol=1e-6)
  assert np.abs(read(UNIFORM, alibi)[:, :, 0] - read(UNIFORM)[:, :, 0]).max() > 1e-3


def test_scores_of_zero_are_what_every_shift_invariant_normaliser_makes_uniform():
  for name in registry.names("normalisers"):
    facts = registry.get("normalisers", name).facts
    if {"shift_invariant", "sums_to_one"} <= facts:
      normaliser = registry.build("normalisers", name, num_heads=N)
      found = weights_of(normaliser, np.zeros((N, 2, 5), np.float32))
      np.testing.assert_allclose(found, 0.2, rtol=1e-5)
