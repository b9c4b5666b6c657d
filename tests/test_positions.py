"""The contract of positions, run for every file in attnx/mechanisms/positions."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core import registry

B, T, N, K, H = 2, 12, 4, 2, 8
D = N * H
NAMES = registry.names("positions")


def facts(name: str):
  return registry.get("positions", name).facts


def with_facts(*wanted: str):
  """Runs a test for every position that declares all of `wanted`."""
  return pytest.mark.parametrize("name", [n for n in NAMES if facts(n) >= set(wanted)])


@functools.cache
def make(name: str):
  config = {"name": name, **registry.get("positions", name).tiny}
  return registry.build("positions", config, dim=D, head_dim=H, num_heads=N, rngs=nnx.Rngs(0))


def inputs():
  rng = np.random.default_rng(1)
  return (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K))


def scores(name, q, k, q_position, k_position):
  """Products of every query and key, (B, N, T, S); additive positions come in as embeddings."""
  p = make(name)
  if "additive" in facts(name):
    embed = lambda x, at: p.embed(x.reshape(*x.shape[:2], -1), at).reshape(x.shape)
    k = embed(jnp.repeat(k, N // K, axis=2), k_position)
    q = embed(q, q_position)
  else:
    q, k = p.query(q, q_position), p.key(k, k_position)
    k = jnp.repeat(k, N // K, axis=2)
  return jnp.einsum("btnh,bsnh->bnts", q, k)


def everything(name, q, k, position):
  """All that a position can do to a query side, a key side and embeddings."""
  p = make(name)
  flat = q.reshape(*q.shape[:2], q.shape[2] * q.shape[3])
  return p.query(q, position), p.key(k, position), p.embed(flat, position)


@pytest.mark.parametrize("name", NAMES)
def test_scores_depend_on_differences_alone_where_declared_and_only_there(name):
  with jax.enable_x64(True):
    q, k = (np.random.default_rng(0).normal(size=x.shape) for x in inputs())
    q_at, k_at = np.arange(T)[None] + np.array([[3], [7]]), np.arange(T)[None] * 2
    here = scores(name, q, k, q_at, k_at)
    there = scores(name, q, k, q_at + 29, k_at + 29)
    assert np.allclose(here, there, rtol=1e-9, atol=1e-9) == ("relative" in facts(name))
    assert not np.allclose(here, scores(name, q, k, q_at + 1, k_at), rtol=1e-3, atol=1e-3)


@with_facts("identity_at_zero")
def test_position_zero_changes_nothing(name):
  q, k = inputs()
  zero = np.zeros((1, T), np.int32)
  np.testing.assert_array_equal(make(name).query(q, zero), q)
  np.testing.assert_array_equal(make(name).key(k, zero), k)


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_kept_where_declared_and_only_there(name):
  q, k = inputs()
  turned_q, turned_k, embedded = everything(name, q, k, np.arange(T)[None] + 90)
  keeps = np.allclose(norm(turned_q), norm(q), rtol=1e-5)
  keeps &= np.allclose(norm(turned_k), norm(k), rtol=1e-5)
  keeps &= np.array_equal(embedded, q.reshape(B, T, D))
  assert keeps == ("keeps_norm" in facts(name))


def norm(x):
  return np.linalg.norm(np.asarray(x), axis=-1)


@pytest.mark.parametrize("name", NAMES)
def test_additive_positions_are_embedded_and_the_others_are_not(name):
  q, k = inputs()
  turned_q, turned_k, embedded = everything(name, q, k, np.arange(T)[None] + 1)
  additive = "additive" in facts(name)
  assert (np.array_equal(turned_q, q) and np.array_equal(turned_k, k)) == additive
  assert np.array_equal(embedded, q.reshape(B, T, D)) == (not additive)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_have_positions_of_their_own(name):
  q, k = inputs()
  at = np.stack([np.arange(T), 40 + np.arange(T)])
  both = everything(name, q, k, at)
  for row in range(B):
    alone = everything(name, q[row : row + 1], k[row : row + 1], at[row : row + 1])
    for x, y in zip(both, alone, strict=True):
      np.testing.assert_allclose(x[row : row + 1], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_traced_positions_equal_static_ones(name):
  q, k = inputs()
  at = np.arange(T)[None]
  make(name)  # outside of the trace, in which it is used
  compiled = jax.jit(functools.partial(everything, name))(q, k, jnp.asarray(at))
  for x, y in zip(compiled, everything(name, q, k, at), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32_and_returned_as_bfloat16(name):
  q, k = (x.astype(jnp.bfloat16) for x in inputs())
  at = np.arange(T)[None] + 50
  wide = everything(name, q.astype(jnp.float32), k.astype(jnp.float32), at)
  for x, y in zip(everything(name, q, k, at), wide, strict=True):
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))  # rounded once, at the end


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_and_padding_are_safe(name):
  q, k = inputs()
  for x in everything(name, q[:, :0], k[:, :0], np.zeros((1, 0), np.int32)):
    assert x.shape[:2] == (B, 0)
  for x in everything(name, q, k, np.full((B, T), -1)):
    assert np.isfinite(x).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_reach_every_parameter_and_input(name):
  q, k = inputs()
  at = np.arange(T)[None]
  graph, params, rest = nnx.split(make(name), nnx.Param, ...)

  def loss(params, q, k):
    p = nnx.merge(graph, params, rest)
    out = p.query(q, at), p.key(k, at), p.embed(q.reshape(B, T, D), at)
    return sum(jnp.sum(jnp.sin(x)) for x in out)

  for g in jax.tree.leaves(jax.grad(loss, argnums=(0, 1, 2))(params, q, k)):
    assert np.isfinite(g).all() and np.abs(g).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
  with jax.enable_x64(True):
    rng = np.random.default_rng(2)
    q, k, dq, dk = (rng.normal(size=(1, 3, heads, H)) for heads in (N, K, N, K))
    at = np.arange(3)[None]
    loss = lambda q, k: sum(jnp.sum(jnp.sin(x)) for x in everything(name, q, k, at))
    _, slope = jax.jvp(loss, (q, k), (dq, dk))
    e = 1e-6
    rise = (loss(q + e * dq, k + e * dk) - loss(q - e * dq, k - e * dk)) / (2 * e)
    np.testing.assert_allclose(slope, rise, rtol=1e-6)
