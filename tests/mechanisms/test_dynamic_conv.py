"""Dynamic convolution: taps that differ from token to token."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core import registry
from attnx.mechanisms.mixers.dynamic_conv import DynamicConv
from attnx.nn.implicit import implicit_attention

B, T, D, N = 2, 12, 16, 4
X = np.random.default_rng(0).normal(size=(B, T, D))


def make(width=3, **options):
  return DynamicConv(D, num_heads=N, width=width, rngs=nnx.Rngs(0), **options)


def naive(mixer, x, renormalise=False):
  """Token by token in JAX, whatever its precision; causal."""
  a, b = jnp.split(x @ mixer.value.kernel[...].astype(x.dtype), 2, -1)
  v, W = a * jax.nn.sigmoid(b), mixer.width
  rows = []
  for t in range(x.shape[1]):
    logits = jnp.einsum("bd,dnw->bnw", v[:, t], mixer.kernel[...].astype(x.dtype))
    first = max(W - 1 - t, 0)  # early tokens use the last taps
    taps = jnp.exp(logits[..., first:])
    total = taps if renormalise else jnp.exp(logits)
    taps = taps / total.sum(-1, keepdims=True)
    seen = v[:, t - (W - 1 - first) : t + 1].reshape(B, W - first, N, D // N)
    rows.append(jnp.einsum("bnw,bwnv->bnv", taps, seen).reshape(B, D))
  return jnp.stack(rows, 1) @ mixer.out.kernel[...].astype(x.dtype)


@pytest.mark.parametrize("width, renormalise", [(3, False), (3, True), (14, False)])
def test_values_and_gradients_are_those_of_the_loop(width, renormalise):
  with jax.enable_x64(True):
    mixer = make(width, renormalise=renormalise)
    graph, params = nnx.split(mixer)
    f = lambda p, x: jnp.sum(jnp.sin(nnx.merge(graph, p)(x)))
    g = lambda p, x: jnp.sum(jnp.sin(naive(nnx.merge(graph, p), x, renormalise)))
    x = jnp.asarray(X)
    np.testing.assert_allclose(mixer(x), naive(mixer, x, renormalise), rtol=1e-9, atol=1e-9)
    actual, expected = (jax.jit(jax.grad(h, argnums=(0, 1)))(params, x) for h in (f, g))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_without_weights_it_is_a_moving_average():
  mixer = make(4)
  mixer.kernel.set_value(jnp.zeros_like(mixer.kernel[...]))
  a, b = np.split(X @ np.asarray(mixer.value.kernel[...], float), 2, -1)
  v = np.pad(a / (1 + np.exp(-b)), ((0, 0), (3, 0), (0, 0)))
  mean = sum(v[:, j : j + T] for j in range(4)) / 4
  expected = mean @ np.asarray(mixer.out.kernel[...], float)
  np.testing.assert_allclose(mixer(X.astype(np.float32)), expected, rtol=1e-4, atol=1e-5)


def test_with_constant_taps_it_is_a_lightweight_convolution():
  mixer, x = make(3), jnp.asarray(X, jnp.float32)
  light = registry.build(
    "mixers", dict(name="lightweight_conv", num_heads=N, width=3), dim=D, rngs=nnx.Rngs(1)
  )
  light.kernel.set_value(jnp.arange(N * 3.0).reshape(N, 3) % 2)
  light.value.kernel.set_value(mixer.value.kernel[...].at[:, 0].set(0).at[:, D].set(0))
  mixer.value.kernel.set_value(light.value.kernel[...])
  light.out.kernel.set_value(mixer.out.kernel[...])
  mixer.logits = lambda v: light.kernel[...][None, None]
  np.testing.assert_allclose(mixer(x), light(x), rtol=1e-6)


def test_its_matrix_is_a_band_that_each_token_fills_for_itself():
  mixer, x = make(3, causal=False), jnp.asarray(X, jnp.float32)
  v = mixer.values(x)
  taps = jax.nn.softmax(mixer.logits(v.reshape(B, T, D)), axis=-1)  # (B, T, N, W)
  expected = sum(taps[..., j].swapaxes(1, 2)[..., None] * np.eye(T, k=j - 1) for j in range(3))
  np.testing.assert_allclose(implicit_attention(mixer, x), expected, rtol=1e-5, atol=1e-7)
  heads = jnp.einsum("bnts,bsnv->btnv", expected, v).reshape(B, T, D)
  np.testing.assert_allclose(mixer.out(heads), mixer(x), rtol=1e-4, atol=1e-5)


def test_stepping_in_uneven_pieces_equals_one_call():
  mixer, x = make(6), jnp.asarray(X, jnp.float32)
  cache, outs = mixer.init_cache(B, T), []
  for piece in jnp.split(x, [1, 3, 10], axis=1):
    y, cache = mixer.step(piece, cache)
    outs.append(y)
  np.testing.assert_allclose(jnp.concatenate(outs, 1), mixer(x), rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_float32():
  mixer = make(3)
  out = mixer(jnp.asarray(X, jnp.bfloat16))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(float), mixer(X.astype(np.float32)), atol=0.06)
