"""Weights times a factor."""

import jax
import jax.numpy as jnp
import numpy as np
from specs import B, N, T, inputs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry

QKV = inputs(T, T, np.float32)
RNG = np.random.default_rng(0)


def read(factor=None) -> jax.Array:
  edits = () if factor is None else (registry.build("edits", dict(name="scale", factor=factor)),)
  return attend(*QKV, AttentionSpec(mask=masks.Causal(), edits=edits))


def test_a_gate_of_a_head_and_a_token_multiplies_what_is_read_there():
  gates = jnp.asarray(RNG.normal(size=(B, N, T)), jnp.float32)
  expected = read() * jnp.swapaxes(gates, 1, 2)[..., None]
  np.testing.assert_allclose(read(gates[..., None]), expected, rtol=1e-5, atol=1e-6)


def test_a_factor_of_a_key_multiplies_its_value():
  q, k, v = QKV
  factor = jnp.asarray(RNG.normal(size=(B, 1, 1, T)), jnp.float32)
  scaled = v * factor[:, 0, 0, :, None, None]
  expected = attend(q, k, scaled, AttentionSpec(mask=masks.Causal()))
  np.testing.assert_allclose(read(factor), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_gate_is_the_output_times_its_gradient():
  out, slope = jax.vjp(read, jnp.ones((B, N, T, 1), jnp.float32))
  given = jnp.asarray(RNG.normal(size=out.shape), jnp.float32)
  expected = jnp.einsum("btnv,btnv->bnt", out, given)
  np.testing.assert_allclose(slope(given)[0][..., 0], expected, rtol=1e-4, atol=1e-5)


def test_zeros_and_ones_ablate_heads():
  gates = jnp.array([0.0, 1.0, 1.0, 0.0]).reshape(1, N, 1, 1)
  ablate = registry.build("edits", dict(name="ablate", num_heads=N, heads=[0, 3]))
  expected = attend(*QKV, AttentionSpec(mask=masks.Causal(), edits=(ablate,)))
  np.testing.assert_array_equal(read(gates), expected)
