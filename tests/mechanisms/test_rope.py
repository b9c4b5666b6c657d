"""Rope: complex multiplication of pairs, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.positions.rope import Rope

B, T, N, H = 2, 5, 3, 8
X = np.random.default_rng(0).normal(size=(B, T, N, H))


def turned(x, position, w):
  """The formula in complex numbers, in float64."""
  half = len(w)
  pairs = x[..., :half] + 1j * x[..., half : 2 * half]
  pairs = pairs * np.exp(1j * position[..., None, None] * w)
  return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


@pytest.mark.parametrize("rotary_dim", [None, 6, 0])
def test_pairs_are_complex_numbers_times_a_phase(rotary_dim):
  R = H if rotary_dim is None else rotary_dim
  at = np.array([[0, 1, 2, 3, 70_000], [9, 8, 3, 3, -1]])
  expected = turned(X, at, 500.0 ** (-2 * np.arange(R // 2) / max(R, 1)))
  with jax.enable_x64(True):
    rope = Rope(base=500.0, rotary_dim=rotary_dim)
    np.testing.assert_allclose(rope.query(X, at), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(rope.key(X, at), expected, rtol=1e-10, atol=1e-10)


def test_the_gradient_turns_back():
  at = np.arange(T)[None] + 3
  w = 10_000.0 ** (-2 * np.arange(H // 2) / H)
  with jax.enable_x64(True):
    _, pull = jax.vjp(lambda x: Rope().query(x, at), jnp.asarray(X))
    np.testing.assert_allclose(pull(jnp.asarray(X))[0], turned(X, -at, w), rtol=1e-12, atol=1e-12)


def test_halves_and_neighbours_agree_after_a_permutation_of_channels():
  at = np.arange(T)[None]
  w = 10_000.0 ** (-2 * np.arange(H // 2) / H)
  pairs = (X[..., 0::2] + 1j * X[..., 1::2]) * np.exp(1j * at[..., None, None] * w)
  neighbours = np.stack([pairs.real, pairs.imag], -1).reshape(X.shape)
  order = np.r_[0:H:2, 1:H:2]
  actual = Rope().query(jnp.asarray(X[..., order], jnp.float32), at)
  np.testing.assert_allclose(actual, neighbours[..., order], rtol=1e-5, atol=1e-5)


def test_bfloat16_counts_beyond_256():
  at = np.array([[256, 257, 1000, 1001, 4097]])
  x = jnp.asarray(X, jnp.bfloat16)
  expected = turned(np.asarray(x, float), at, 10_000.0 ** (-2 * np.arange(H // 2) / H))
  np.testing.assert_allclose(Rope().query(x, at).astype(float), expected, rtol=8e-3, atol=4e-3)


@pytest.mark.parametrize("rotary_dim, message", [(5, "no pairs"), (10, "does not fit a head of 8")])
def test_widths_that_cannot_turn_are_refused(rotary_dim, message):
  with pytest.raises(ValueError, match=message):
    Rope(rotary_dim=rotary_dim).query(X, np.arange(T)[None])
