"""The contract of combiners, run for every file in attnx/mechanisms/combiners."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core import registry
from attnx.core.tokens import Tokens

B, T, N, V, D = 2, 12, 4, 8, 16
NAMES = registry.names("combiners")
RNG = np.random.default_rng(0)
HEADS, X = RNG.normal(size=(B, T, N, V)), RNG.normal(size=(B, T, D))


def facts(name: str):
  return registry.get("combiners", name).facts


@functools.cache
def make(name: str):
  config = {"name": name, **registry.get("combiners", name).tiny}
  return registry.build("combiners", config, dim=D, num_heads=N, head_dim=V, rngs=nnx.Rngs(0))


def inputs(dtype=jnp.float32):
  return jnp.asarray(HEADS, dtype), jnp.asarray(X, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shape_and_dtype_are_kept(name, dtype):
  heads, x = inputs(dtype)
  out = make(name)(heads, x)
  assert out.shape == heads.shape and out.dtype == dtype
  wide = make(name)(heads.astype(jnp.float32), x.astype(jnp.float32))
  np.testing.assert_allclose(out.astype(jnp.float32), wide, rtol=8e-3)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_as_the_identity_where_declared_and_only_there(name):
  heads, x = inputs()
  assert np.array_equal(make(name)(heads, x), heads) == ("identity" in facts(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_combined_alone(name):
  heads, x = inputs()
  whole = make(name)(heads, x)
  for t in (slice(0, 1), slice(3, 9)):
    np.testing.assert_allclose(make(name)(heads[:, t], x[:, t]), whole[:, t], rtol=1e-5)
  assert make(name)(heads[:, :0], x[:, :0]).shape == (B, 0, N, V)


@pytest.mark.parametrize("name", NAMES)
def test_heads_that_read_nothing_stay_zero(name):
  heads, x = inputs()
  np.testing.assert_array_equal(make(name)(0 * heads, x), 0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gradients_are_finite_and_reach_every_parameter(name, size):
  graph, params, rest = nnx.split(make(name), nnx.Param, ...)

  def loss(params, heads, x):
    return jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(heads, x)))

  heads, x = inputs()
  grads = jax.grad(loss, argnums=(0, 1, 2))(params, size * heads, size * x)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  if size == 1:
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads[:2]))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
  with jax.enable_x64(True):
    dheads, dx = np.random.default_rng(1).normal(size=HEADS.shape), X[::-1]
    loss = lambda heads, x: jnp.sum(jnp.sin(make(name)(heads, x)))
    _, slope = jax.jvp(loss, (HEADS, X), (dheads, dx))
    e = 1e-6
    rise = loss(HEADS + e * dheads, X + e * dx) - loss(HEADS - e * dheads, X - e * dx)
    np.testing.assert_allclose(slope, rise / (2 * e), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_balance_loss_exists_where_declared_and_leaves_padding_out(name):
  _, x = inputs()
  if "balanced" not in facts(name):
    with pytest.raises(NotImplementedError, match="routes nothing"):
      make(name).balance_loss(x)
    return
  tokens = Tokens.of_lengths(jnp.array([5, 5]), T)
  loss = make(name).balance_loss(x, tokens=tokens)
  np.testing.assert_allclose(loss, make(name).balance_loss(x[:, :5]), rtol=1e-6)
  assert np.isfinite(make(name).balance_loss(x, tokens=Tokens.of_lengths(jnp.array([0, 0]), T)))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit_are_refused(name):
  heads, x = inputs()
  with pytest.raises(ValueError, match="heads have shape"):
    make(name)(heads[:, :, 1:], x)
  with pytest.raises(ValueError, match="x has shape"):
    make(name)(heads, x[:, 1:])
