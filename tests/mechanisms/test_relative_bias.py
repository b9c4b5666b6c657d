"""Relative bias."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import edited, inputs

from attnx.attention import AttentionSpec, attend
from attnx.attention.transforms import Add
from attnx.core import registry
from attnx.core.tokens import Tokens

N = 4


def build(max_distance, **given):
  config = dict(name="relative_bias", max_distance=max_distance, **given)
  return registry.build("transforms", config, num_heads=N, rngs=nnx.Rngs(0))


def test_the_first_row_is_the_query_looking_farthest_back():
  bias = build(6)
  assert bias.bias.shape == (11, N) and 0.01 < bias.bias.std() < 0.03
  where = Tokens.of_length(6)
  scores = edited(bias, jnp.zeros((1, N, 6, 6)), where.rows(1, N), where.columns())
  for t, s in np.ndindex(6, 6):
    np.testing.assert_array_equal(scores[0, :, t, s], bias.bias[5 + s - t])


def test_attention_adds_the_toeplitz_matrix_of_the_table():
  with jax.enable_x64(True):
    q, k, v = inputs(7, 7)
    bias = build(7)
    at = 6 + np.arange(7) - np.arange(7)[:, None]
    dense = Add(jnp.moveaxis(jnp.asarray(bias.bias)[at], -1, 0)[None])
    actual, expected = (attend(q, k, v, AttentionSpec(transforms=(t,))) for t in (bias, dense))
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_beyond_the_table_the_last_number_holds():
  bias, where = build(3), Tokens.of_length(9)
  scores = edited(bias, jnp.zeros((1, N, 9, 9)), where.rows(1, N), where.columns())[0]
  np.testing.assert_array_equal(scores[:, 8, 0], bias.bias[0])
  np.testing.assert_array_equal(scores[:, 0, 8], bias.bias[4])


def test_a_table_without_the_query_itself_is_refused():
  with pytest.raises(ValueError, match="max_distance=0 must be at least 1"):
    build(0)
