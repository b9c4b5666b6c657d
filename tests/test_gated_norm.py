"""The norm of a head and its gate."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.nn.gated_norm import GatedNorm

SHAPE = B, T, N, V = 2, 3, 4, 5
RNG = np.random.default_rng(0)
HEADS, GATE, GAIN = RNG.normal(size=SHAPE), RNG.normal(size=SHAPE), RNG.normal(size=V)


def make(**options):
  norm = GatedNorm(V, rngs=nnx.Rngs(0), **options)
  if norm.scale is not None:
    norm.scale.set_value(jnp.asarray(GAIN, jnp.float32))
  return norm


def naive(heads, gate, gain, epsilon):
  rms = np.sqrt((heads**2).mean(-1, keepdims=True) + epsilon)
  return gain * heads / rms * gate / (1 + np.exp(-gate))


@pytest.mark.parametrize("use_scale", [True, False])
def test_it_is_the_formula(use_scale):
  with jax.enable_x64(True):
    norm = make(use_scale=use_scale, epsilon=0.1)
    gain = GAIN.astype(np.float32) if use_scale else 1.0
    actual = norm(jnp.asarray(HEADS), jnp.asarray(GATE))
    np.testing.assert_allclose(actual, naive(HEADS, GATE, gain, 0.1), rtol=1e-12)
    assert len(jax.tree.leaves(nnx.state(norm, nnx.Param))) == use_scale


def test_a_bfloat16_is_rounded_once():
  low = [jnp.asarray(x, jnp.bfloat16) for x in (HEADS, GATE)]
  for use_scale in (True, False):
    norm = make(use_scale=use_scale)
    actual = norm(*low)
    wide = norm(*(x.astype(jnp.float32) for x in low))
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, wide.astype(jnp.bfloat16))


def test_the_size_of_a_head_does_not_matter_without_an_epsilon():
  sizes = jnp.asarray(RNG.uniform(1e-3, 1e3, (B, T, N, 1)), jnp.float32)
  heads, gate = jnp.asarray(HEADS, jnp.float32), jnp.asarray(GATE, jnp.float32)
  norm = make(epsilon=0.0)
  np.testing.assert_allclose(norm(sizes * heads, gate), norm(heads, gate), rtol=1e-5)
