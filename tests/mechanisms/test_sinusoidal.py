"""Sinusoids: the paper's two lines, channel by channel."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.positions.sinusoidal import Sinusoidal

D = 8


def test_even_channels_are_sines_and_odd_ones_cosines():
  at = np.array([[0, 1, 7, 300]])
  expected = np.zeros((1, 4, D))
  for t, n in enumerate(at[0]):
    for j in range(D // 2):
      expected[0, t, 2 * j] = math.sin(n / 10_000 ** (2 * j / D))
      expected[0, t, 2 * j + 1] = math.cos(n / 10_000 ** (2 * j / D))
  with jax.enable_x64(True):
    out = Sinusoidal().embed(jnp.ones((1, 4, D)), at)
    np.testing.assert_allclose(out - 1, expected, rtol=1e-12, atol=1e-12)


def test_products_of_two_codes_depend_on_their_distance_alone():
  codes = Sinusoidal().embed(jnp.zeros((1, 4, D)), np.array([[2, 5, 102, 105]]))[0]
  np.testing.assert_allclose(codes[0] @ codes[1], codes[2] @ codes[3], rtol=1e-4)


def test_padding_gains_nothing():
  x = jnp.ones((1, 2, D))
  np.testing.assert_array_equal(Sinusoidal().embed(x, np.array([[-1, -5]])), x)


def test_an_odd_width_is_refused():
  with pytest.raises(ValueError, match="7 channels has no pairs"):
    Sinusoidal().embed(jnp.zeros((1, 2, 7)), np.arange(2)[None])
