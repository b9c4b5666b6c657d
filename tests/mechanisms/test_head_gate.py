"""Head gate: the formula, and gates that shut or open a head."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.combiners.head_gate import HeadGate

B, T, N, V, D = 2, 5, 4, 3, 6
RNG = np.random.default_rng(0)
HEADS, X = RNG.normal(size=(B, T, N, V)), RNG.normal(size=(B, T, D))


def make(by_channel=False):
  return HeadGate(D, N, head_dim=V, by_channel=by_channel, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("by_channel", [False, True])
def test_heads_are_multiplied_by_the_sigmoid_of_a_projection(by_channel):
  with jax.enable_x64(True):
    gate = make(by_channel)
    W = np.asarray(gate.kernel[...], float)
    assert W.shape == (D, N, V if by_channel else 1)
    expected = HEADS / (1 + np.exp(-np.einsum("btd,dnv->btnv", X, W)))
    np.testing.assert_allclose(gate(jnp.asarray(HEADS), jnp.asarray(X)), expected, rtol=1e-12)


def test_gates_of_zero_weights_are_one_half():
  gate = make()
  gate.kernel.set_value(jnp.zeros_like(gate.kernel[...]))
  heads = HEADS.astype(np.float32)
  np.testing.assert_array_equal(gate(heads, X.astype(np.float32)), heads / 2)


def test_a_token_can_shut_one_head_and_open_another():
  gate, x = make(), np.zeros((1, 1, D), np.float32)
  x[..., 0] = 100.0
  kernel = np.zeros((D, N, 1), np.float32)
  kernel[0, :2, 0] = [-1, 1]
  gate.kernel.set_value(jnp.asarray(kernel))
  heads = np.ones((1, 1, N, V), np.float32)
  np.testing.assert_allclose(gate(heads, x)[0, 0, :, 0], [0, 1, 0.5, 0.5], atol=1e-6)


def test_widths_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="by_channel=True needs head_dim"):
    HeadGate(D, N, by_channel=True, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="expected V=3"):
    make(by_channel=True)(jnp.ones((B, T, N, V + 1)), jnp.ones((B, T, D)))
