"""T5's relative bias."""

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
from attnx.mechanisms.transforms.t5_bias import T5Bias, buckets

N = 4
BOTH = {0: 0, -1: 1, 1: 17, -7: 7, -8: 8, -9: 8, -16: 10, -32: 12, -64: 14, -127: 15, -128: 15,
        8: 24, 64: 30, 128: 31}  # fmt: skip
BACK = {-15: 15, -16: 16, -20: 17, -32: 21, -64: 26, -127: 31, -128: 31, 0: 0, 1: 0, 128: 0}


@pytest.mark.parametrize("bidirectional, published", [(True, BOTH), (False, BACK)])
def test_buckets_are_those_of_the_released_code(bidirectional, published):
  found = buckets(32, 128, bidirectional)
  assert {distance: found[128 + distance] for distance in published} == published
  # The bucket of keys ahead at distance 0 has none.
  assert set(found) == set(range(32)) - ({16} if bidirectional else set())


@pytest.mark.parametrize("bidirectional", [True, False])
def test_attention_adds_the_number_of_the_bucket_of_key_less_query(bidirectional):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    q, k, v = inputs(9, 13)
    table = jnp.asarray(rng.standard_normal((8, N)))
    distance = np.arange(13) - np.arange(9)[:, None]
    of = buckets(8, 6, bidirectional)[np.clip(distance, -6, 6) + 6]

    def loss(make):
      out = lambda table: jnp.cos(attend(q, k, v, AttentionSpec(transforms=(make(table),)))).sum()
      return jax.value_and_grad(out)(table)

    sparse = loss(lambda table: T5Bias(table, 6, bidirectional))
    dense = loss(lambda table: Add(jnp.moveaxis(table[of], -1, 0)[None]))
    np.testing.assert_allclose(sparse[0], dense[0], rtol=1e-10)
    np.testing.assert_allclose(sparse[1], dense[1], rtol=1e-9, atol=1e-12)


def test_beyond_the_longest_distance_all_keys_share_a_bucket():
  bias = registry.build("transforms", "t5_bias", num_heads=N, rngs=nnx.Rngs(0))
  assert bias.bias.shape == (32, N) and bias.bias.dtype == jnp.float32
  q, k = Tokens.of_length(1, offset=400).rows(1, N), Tokens.of_length(401).columns()
  scores = edited(bias, jnp.zeros((1, N, 1, 401)), q, k)[0, :, 0]
  np.testing.assert_array_equal(scores[:, :300], np.tile(bias.bias[15][:, None], 300))
  np.testing.assert_array_equal(scores[:, 400], bias.bias[0])


@pytest.mark.parametrize("given", [
  dict(num_buckets=7), dict(num_buckets=2), dict(num_buckets=1, bidirectional=False),
  dict(max_distance=8),
], ids=str)  # fmt: skip
def test_buckets_that_make_no_sense_are_refused(given):
  with pytest.raises(ValueError, match="num_buckets=.* must be even .*max_distance="):
    registry.build("transforms", dict(given, name="t5_bias"), num_heads=N, rngs=nnx.Rngs(0))
