"""Learned positions: a table that is never read outside of its rows."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.positions.learned import Learned

D, LENGTH = 4, 6
X = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)


def make():
  return Learned(D, length=LENGTH, rngs=nnx.Rngs(0))


def test_each_token_gains_the_row_of_its_position():
  learned, at = make(), np.array([[0, 5, 2], [3, 3, 1]])
  expected = X + np.asarray(learned.table[...])[at]
  np.testing.assert_allclose(learned.embed(X, at), expected, rtol=1e-6)


def test_padding_gains_nothing_and_teaches_nothing():
  learned, at = make(), np.array([[-1, 0, 1], [-3, -2, 4]])
  out = learned.embed(X, at)
  np.testing.assert_array_equal(out[at < 0], X[at < 0])
  graph, params = nnx.split(learned)
  grad = jax.grad(lambda p: nnx.merge(graph, p).embed(X, at).sum())(params)["table"][...]
  counts = np.bincount(at[at >= 0], minlength=LENGTH)
  np.testing.assert_array_equal(grad, np.broadcast_to(counts[:, None], (LENGTH, D)))


def test_known_positions_beyond_the_table_are_refused():
  with pytest.raises(ValueError, match="position 6 is beyond the table"):
    make().embed(X, np.array([[4, 5, 6]]))


def test_traced_positions_beyond_the_table_are_not_a_number():
  learned = make()
  out = jax.jit(lambda at: learned.embed(X, at))(jnp.array([[4, 5, 6]]))
  assert np.isnan(out[:, 2]).all() and np.isfinite(out[:, :2]).all()
