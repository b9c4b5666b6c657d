"""Hedgehog: two softmaxes over the features of a trained layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.features.hedgehog import Hedgehog

N, K, H, F = 4, 2, 8, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, N, H))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_features_are_softmaxes_of_a_layer_and_of_its_negative():
  with jax.enable_x64(True):
    hedgehog = Hedgehog(H, N, num_kv_heads=K, num_features=F)
    w, b = RNG.normal(size=(N, H, F)), RNG.normal(size=(N, F))
    for name, heads in (("query", N), ("key", K)):
      getattr(hedgehog, f"{name}_kernel").set_value(jnp.asarray(w[:heads]))
      getattr(hedgehog, f"{name}_bias").set_value(jnp.asarray(b[:heads]))
    y = np.einsum("btnh,nhf->btnf", X, w) + b
    expected = np.concatenate([softmax(y), softmax(-y)], -1)
    np.testing.assert_allclose(hedgehog.query(X), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(hedgehog.key(X[:, :, :K]), expected[:, :, :K], rtol=1e-6, atol=1e-9)


def test_it_begins_as_the_identity():
  hedgehog, x = Hedgehog(H, N), X.astype(np.float32)
  expected = np.concatenate([softmax(X), softmax(-X)], -1)
  np.testing.assert_allclose(hedgehog.query(x), expected, rtol=1e-5)
  np.testing.assert_allclose(hedgehog.key(x), expected, rtol=1e-5)


def test_the_features_of_a_token_sum_to_two_however_large_it_is():
  out = Hedgehog(H, N).key(1e6 * X.astype(np.float32))
  np.testing.assert_allclose(out.sum(-1), 2.0, rtol=1e-6)


def test_spiky_features_can_tell_keys_apart_as_softmax_does():
  hedgehog = Hedgehog(H, 1)
  keys = np.eye(H, dtype=np.float32)[None, :, None] * 12
  weights = np.einsum("btnm,bsnm->bts", hedgehog.query(keys), hedgehog.key(keys))[0]
  weights = weights / weights.sum(-1, keepdims=True)
  assert (weights.argmax(-1) == np.arange(H)).all() and np.diag(weights).min() > 3 / H


def test_another_number_of_heads_is_refused():
  with pytest.raises(ValueError, match="got 2 heads; expected 4: pass num_heads"):
    Hedgehog(H, N).key(X[:, :, :2])
