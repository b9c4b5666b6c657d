"""Focused features: they keep the norm and sharpen the direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.features.focused import Focused

N, K, H = 4, 2, 8
X = np.random.default_rng(0).normal(size=(2, 5, N, H))
SCALE = np.random.default_rng(1).normal(size=(N, H))


def make(**options):
  feature = Focused(H, N, **options)
  feature.scale.set_value(jnp.asarray(SCALE[: feature.scale.shape[0]]))
  return feature


def phi(x, scale, power, axes):
  y = (np.maximum(x, 0) + 1e-6) / np.log1p(np.exp(scale))
  norm = lambda z: np.sqrt((z**2).sum(axes, keepdims=True))
  return norm(y) * y**power / norm(y**power)


@pytest.mark.parametrize("norm_axis, axes", [("full", (-2, -1)), ("head", (-1,))])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_features_are_the_formula(norm_axis, axes, power):
  with jax.enable_x64(True):
    feature = make(norm_axis=norm_axis, power=power)
    np.testing.assert_allclose(feature.query(X), phi(X, SCALE, power, axes), rtol=1e-6, atol=1e-12)


def test_norms_are_kept_and_a_power_of_one_is_the_identity():
  feature, plain = make(norm_axis="head"), make(power=1.0)
  x = X.astype(np.float32)
  y = (np.maximum(x, 0) + 1e-6) / np.log1p(np.exp(SCALE))
  norm = lambda z: np.linalg.norm(z, axis=-1)
  np.testing.assert_allclose(norm(feature.key(x)), norm(y), rtol=1e-5)
  np.testing.assert_allclose(plain.key(x), y, rtol=1e-5)


def test_powers_draw_vectors_of_one_peak_together_and_others_apart():
  a, b, c = np.eye(H)[[0, 0, 3]] + 0.5 * np.random.default_rng(3).random((3, H))
  vectors = np.tile(np.stack([a, b, c])[None, :, None].astype(np.float32), (1, 1, N, 1))
  cosines = []
  for power in (1.0, 3.0):
    u = np.asarray(Focused(H, N, power=power, norm_axis="head").key(vectors))[0, :, 0]
    u = u / np.linalg.norm(u, axis=-1, keepdims=True)
    cosines.append((u[0] @ u[1], u[0] @ u[2]))
  assert cosines[1][0] > cosines[0][0] and cosines[1][1] < cosines[0][1]


def test_queries_share_the_scale_of_their_key_head():
  grouped, full = make(num_kv_heads=K, norm_axis="head"), make(norm_axis="head")
  full.scale.set_value(jnp.repeat(grouped.scale[...], N // K, axis=0))
  x = X.astype(np.float32)
  np.testing.assert_allclose(grouped.query(x), full.query(x), rtol=1e-6)
  np.testing.assert_allclose(grouped.key(x[:, :, ::2]), full.query(x)[:, :, ::2], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_high_powers_stay_inside_float32(size):
  feature = Focused(H, N, power=6.0)
  out = np.asarray(feature.query((size * X).astype(np.float32)), float)
  expected = phi((size * X).astype(np.float32).astype(float), np.zeros((N, H)), 6.0, (-2, -1))
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_heads_and_norms_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="norm_axis='token' is neither"):
    Focused(H, N, norm_axis="token")
  with pytest.raises(ValueError, match="got 3 heads; expected a multiple of num_kv_heads=2"):
    Focused(H, N, num_kv_heads=K).key(X[:, :, :3])
