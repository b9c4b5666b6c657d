"""The contract of features, run for every file in attnx/mechanisms/features."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core import registry

B, T, S, N, K, H = 2, 7, 9, 4, 2, 8
NAMES = registry.names("features")


def facts(name: str):
  return registry.get("features", name).facts


def make(name: str, seed: int = 0, num_kv_heads: int = K):
  return registry.build(
    "features",
    {"name": name, **registry.get("features", name).tiny},
    head_dim=H,
    num_heads=N,
    num_kv_heads=num_kv_heads,
    rngs=nnx.Rngs(seed),
  )


built = functools.cache(make)


def inputs(dtype=np.float32):
  rng = np.random.default_rng(1)
  return rng.normal(size=(B, T, N, H)).astype(dtype), rng.normal(size=(B, S, K, H)).astype(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_queries_and_keys_have_features_of_the_same_width_in_float32(name):
  feature, (q, k) = built(name), inputs()
  M = feature.width(H)
  for dtype in (jnp.float32, jnp.bfloat16):
    a, b = feature.query(jnp.asarray(q, dtype)), feature.key(jnp.asarray(k, dtype))
    assert a.shape == (B, T, N, M) and b.shape == (B, S, K, M)
    assert a.dtype == b.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_mapped_alone(name):
  feature, (q, k) = built(name), inputs()
  for f, x in ((feature.query, q), (feature.key, k)):
    np.testing.assert_allclose(f(x[:, 2:5]), f(x)[:, 2:5], rtol=1e-6, atol=1e-7)
    assert f(x[:, :0]).shape == (B, 0, *f(x).shape[2:])


@pytest.mark.parametrize("name", NAMES)
def test_features_are_nonnegative_where_declared_and_only_there(name):
  feature, (q, k) = built(name), inputs()
  smallest = min(feature.query(3 * q).min(), feature.key(3 * k).min())
  assert (smallest >= 0) == ("nonnegative" in facts(name))


@pytest.mark.parametrize("name", NAMES)
def test_products_estimate_exponentials_where_declared_and_only_there(name):
  q, k = (0.4 * x for x in inputs())
  draws = []
  for seed in range(200 if "exponential" in facts(name) else 1):
    feature = make(name, seed)
    a, b = feature.query(q), jnp.repeat(feature.key(k), N // K, axis=2)
    if "exponential" in facts(name):  # undo the factor of the query, which depends on the draw
      a = a * jnp.exp(feature.exponents(q).max(-1, keepdims=True))
    draws.append(np.einsum("btnm,bsnm->bnts", a, b))
  expected = np.exp(np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, axis=2)) / np.sqrt(H))
  error = np.abs(np.mean(draws, 0) - expected)
  if "exponential" in facts(name):
    deviation = np.std(draws, 0) / np.sqrt(len(draws))
    assert np.mean(error < 3 * deviation) > 0.97 and error.max() < 0.1 * expected.max()
  else:
    assert error.mean() > 0.1 * expected.mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4])
def test_gradients_are_finite_however_large_the_inputs(name, size):
  graph, params, rest = nnx.split(built(name), nnx.Param, ...)

  def loss(params, q, k):
    feature = nnx.merge(graph, params, rest)
    return jnp.sum(jnp.sin(feature.query(q))) + jnp.sum(jnp.sin(feature.key(k)))

  q, k = inputs()
  grads = jax.grad(loss, argnums=(0, 1, 2))(params, size * q, size * k)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  if size == 1:
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", NAMES)
def test_normalised_attention_has_gradients_of_finite_differences(name):
  with jax.enable_x64(True):
    feature, (q, k) = built(name), inputs(np.float64)
    rng = np.random.default_rng(2)
    dq, dk, v = rng.normal(size=q.shape), rng.normal(size=k.shape), rng.normal(size=k.shape)

    def loss(q, k):
      a, b = feature.query(q), jnp.repeat(feature.key(k), N // K, axis=2)
      weights = jnp.einsum("btnm,bsnm->bnts", a, b)
      weights = weights / weights.sum(-1, keepdims=True)
      out = jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(v, N // K, axis=2))
      return jnp.sum(jnp.sin(out))

    _, slope = jax.jvp(loss, (q, k), (dq, dk))
    e = 1e-6
    rise = (loss(q + e * dq, k + e * dk) - loss(q - e * dq, k - e * dk)) / (2 * e)
    np.testing.assert_allclose(slope, rise, rtol=1e-5, atol=1e-7)
