"""ALiBi."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import inputs

from attnx.attention import AttentionSpec, attend, masks
from attnx.attention.transforms import Add
from attnx.core.tokens import Tokens
from attnx.mechanisms.transforms.alibi import Alibi


def bias(num_heads: int, t: int, s: int) -> np.ndarray:
  q, k = Tokens.of_length(t).rows(1, num_heads), Tokens.of_length(s).columns()
  return np.asarray(Alibi(num_heads)(jnp.zeros((1, num_heads, t, s)), q, k)[0])


@pytest.mark.parametrize("num_heads", [1, 2, 8, 16])
def test_slopes_of_a_power_of_two_are_a_geometric_series(num_heads):
  slopes = 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)
  np.testing.assert_allclose(-bias(num_heads, 2, 2)[:, 1, 0], slopes, rtol=1e-6)


def test_slopes_of_twelve_heads_are_those_of_eight_and_every_other_of_sixteen():
  slopes = -bias(12, 2, 2)[:, 1, 0]
  np.testing.assert_allclose(slopes[:8], 2.0 ** -np.arange(1, 9), rtol=1e-6)
  np.testing.assert_allclose(slopes[8:], [0.70711, 0.35355, 0.17678, 0.08839], rtol=1e-4)


def test_the_bias_is_the_distance_times_the_slope_both_ways():
  distance = np.abs(np.arange(5)[:, None] - np.arange(7))
  np.testing.assert_allclose(bias(4, 5, 7), -np.array([0.25, 1 / 16, 1 / 64, 1 / 256])[
    :, None, None] * distance, rtol=1e-6)  # fmt: skip


def test_causal_softmax_only_knows_how_far_a_key_is_from_the_end():
  """s - m (i - j) and s + m j differ by a number of the row."""
  with jax.enable_x64(True):
    q, k, v = inputs(9, 9)
    slopes = 2.0 ** (-2.0 * np.arange(1, 5))
    by_key = Add(slopes[None, :, None, None] * np.arange(9.0))
    actual, expected = (
      attend(q, k, v, AttentionSpec(masks.Causal(), (t,))) for t in (Alibi(4), by_key)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_distances_stay_whole_beside_bfloat16_queries():
  q, k, v = (jnp.zeros((1, 600, 1, 2), jnp.bfloat16) for _ in range(3))
  v = v.at[0, 0].set(1)
  out = attend(q[:, -1:], k, v, AttentionSpec(transforms=(Alibi(1),)),
               q_tokens=Tokens.of_length(1, offset=599))  # fmt: skip
  m = 2.0**-8
  expected = np.exp(-m * 599) / np.exp(-m * np.arange(600)).sum()
  np.testing.assert_allclose(out[0, 0, 0, 0].astype(np.float32), expected, rtol=2**-8)
