"""FFTNet: filters that are something known."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.fftnet import FFTNet, modrelu

B, D, N = 2, 8, 4
RNG = np.random.default_rng(0)


def make(length, adaptive=False):
  mixer = FFTNet(D, length=length, num_heads=N, rngs=nnx.Rngs(0))
  if not adaptive:
    mixer.adapt.kernel.set_value(jnp.zeros_like(mixer.adapt.kernel[...]))
  return mixer


def inputs(length):
  return RNG.normal(size=(B, length, D))


@pytest.mark.parametrize("length", [1, 6, 7])
def test_it_is_the_formula_with_a_transform_written_as_a_sum(length):
  with jax.enable_x64(True):
    mixer, x = make(length, adaptive=True), inputs(length)
    base, bias = 1 + RNG.normal(size=mixer.shape), 0.3 * RNG.normal(size=mixer.shape)
    mixer.base.set_value(jnp.asarray(base))
    mixer.bias.set_value(jnp.asarray(bias))
    hidden = x.mean(1) @ np.asarray(mixer.hidden.kernel[...], float)
    hidden = hidden * (1 + jax.scipy.special.erf(hidden / 2**0.5)) / 2
    gain = base + (hidden @ np.asarray(mixer.adapt.kernel[...], float)).reshape(B, *mixer.shape)
    at = np.arange(length)
    wave = np.exp(-2j * np.pi * np.outer(at, at) / length) / np.sqrt(length)
    mirror = np.minimum(at, length - at)  # frequency f and its conjugate share a filter
    z = np.einsum("ft,btnv->bfnv", wave, x.reshape(B, length, N, -1))
    z = z * gain[..., mirror].transpose(0, 2, 1)[..., None]
    size = np.abs(z)
    z = np.maximum(size + bias[:, mirror].T[..., None], 0) * z / (size + 1e-6)
    expected = np.einsum("ft,bfnv->btnv", wave.conj(), z).real.reshape(B, length, D)
    np.testing.assert_allclose(mixer(jnp.asarray(x)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("length", [5, 12])
def test_a_filter_of_ones_is_the_identity_and_a_constant_one_a_gain(length):
  mixer, x = make(length), inputs(length).astype(np.float32)
  np.testing.assert_allclose(mixer(x), x, rtol=1e-4, atol=1e-5)
  mixer.base.set_value(3 * mixer.base[...])
  np.testing.assert_allclose(mixer(x), 3 * x, rtol=1e-4, atol=1e-5)


def test_the_filter_of_a_kernel_is_a_circular_convolution():
  length = 12
  mixer, x = make(length), inputs(length)
  taps = np.zeros(length)
  taps[[0, 1, -1]] = 0.6, 0.2, 0.2  # even, so that its transform is real, and positive
  mixer.base.set_value(jnp.broadcast_to(jnp.asarray(np.fft.rfft(taps).real), mixer.shape))
  expected = 0.6 * x + 0.2 * np.roll(x, 1, 1) + 0.2 * np.roll(x, -1, 1)
  np.testing.assert_allclose(mixer(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
  with jax.enable_x64(True):
    mixer, x = make(9, adaptive=True), inputs(9)
    graph, params = nnx.split(mixer)
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.3, float), params)
    loss = jax.jit(lambda p, x: jnp.sin(nnx.merge(graph, p)(x)).sum())
    move = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape)), (params, x))
    at = lambda h: loss(*jax.tree.map(lambda p, d: p + h * d, (params, x), move))
    grads = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(x))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, move)))
    np.testing.assert_allclose(slope, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-6)


def test_turning_the_circle_turns_the_output():
  mixer, x = make(12, adaptive=True), inputs(12).astype(np.float32)
  mixer.bias.set_value(mixer.bias[...] - 0.5)
  turned = mixer(np.roll(x, 5, 1))
  np.testing.assert_allclose(turned, np.roll(mixer(x), 5, 1), rtol=1e-4, atol=1e-5)


def test_modrelu_cuts_small_magnitudes_and_has_a_slope_at_zero():
  z = jnp.array([3 + 4j, 0.3 + 0.4j, 0j])
  np.testing.assert_allclose(modrelu(z, -1.0), [2.4 + 3.2j, 0, 0], rtol=1e-5)
  grad = jax.grad(lambda x: jnp.fft.irfft(modrelu(jnp.fft.rfft(x), 0.0)).sum())(jnp.zeros(6))
  assert np.isfinite(grad).all()


def test_other_lengths_and_tokens_are_refused():
  with pytest.raises(ValueError, match="got a sequence of 6; expected length=5"):
    make(5)(inputs(6))
  with pytest.raises(NotImplementedError, match="FFTNet takes no tokens"):
    make(6)(inputs(6), tokens=Tokens.of_length(6))
