"""Head scale: a diagonal matrix between attention and its output projection."""

import jax.numpy as jnp
import numpy as np

from attnx.mechanisms.combiners.head_scale import HeadScale

B, T, N, V, D = 2, 5, 4, 3, 6
RNG = np.random.default_rng(0)
HEADS, X = RNG.normal(size=(B, T, N, V)).astype(np.float32), np.zeros((B, T, D), np.float32)


def make(scale):
  combiner = HeadScale(N)
  combiner.scale.set_value(jnp.asarray(scale, jnp.float32))
  return combiner


def test_every_head_is_multiplied_by_its_factor():
  scale = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
  out = make(scale)(HEADS, X)
  np.testing.assert_array_equal(out, HEADS * scale[:, None])


def test_scaling_heads_is_scaling_rows_of_the_output_projection():
  scale, W = RNG.normal(size=N), RNG.normal(size=(N, V, D))
  scaled = np.einsum("btnv,nvd->btd", make(scale)(HEADS, X), W)
  folded = np.einsum("btnv,nvd->btd", HEADS, W * scale[:, None, None])
  np.testing.assert_allclose(scaled, folded, rtol=1e-4, atol=1e-5)


def test_it_has_one_parameter_a_head():
  assert HeadScale(16).scale.shape == (16,)
