"""ReLU attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import inputs, weights_of

from attnx.attention import AttentionSpec, attend
from attnx.core import registry


def build(power: int = 1):
  return registry.build("normalisers", dict(name="relu", power=power))


@pytest.mark.parametrize("power", [1, 2])
def test_weights_are_powers_of_the_positive_part_over_the_number_of_visible_keys(power):
  scores, visible = np.array([2.0, -1.0, 3.0, 0.5]), np.array([True, True, False, True])
  expected = np.array([2.0**power, 0, 0, 0.5**power]) / 3
  np.testing.assert_allclose(weights_of(build(power), scores, visible), expected, rtol=1e-6)


def test_seeing_everything_twice_changes_nothing():
  q, k, v = inputs(dtype=np.float32)
  twice = attend(q, jnp.tile(k, (1, 2, 1, 1)), jnp.tile(v, (1, 2, 1, 1)), AttentionSpec(
    normaliser=build()))  # fmt: skip
  np.testing.assert_allclose(
    twice, attend(q, k, v, AttentionSpec(normaliser=build())), rtol=1e-5, atol=1e-6
  )


def test_where_all_scores_are_positive_attention_is_linear_in_the_queries():
  with jax.enable_x64(True):
    q, k, v = (jnp.abs(x) for x in inputs())
    state = jnp.einsum("bskh,bskv->bkhv", k, v) / k.shape[1] * k.shape[-1] ** -0.5
    expected = jnp.einsum("btnh,bnhv->btnv", q, jnp.repeat(state, 2, axis=1))
    actual = attend(q, k, v, AttentionSpec(normaliser=build()))
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_a_row_of_negative_scores_is_zero_and_a_power_of_zero_raises():
  assert not weights_of(build(), np.array([-1.0, -2.0, 0.0])).any()
  with pytest.raises(ValueError, match="power=0 must be at least 1"):
    build(0)
