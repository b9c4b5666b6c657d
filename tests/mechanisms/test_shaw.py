"""Relative position representations."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import H, K, N, inputs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.mechanisms.transforms.shaw import RelativeKeys, RelativeValues

R, T = 3, 9
RELATION = np.clip(np.arange(T) - np.arange(T)[:, None], -R, R) + R  # key - query


def tables(seed=0):
  return 0.5 * np.random.default_rng(seed).standard_normal((2, 2 * R + 1, H))


def spec(keys, values) -> AttentionSpec:
  return AttentionSpec(masks.Causal(), (RelativeKeys(keys),), readouts=(RelativeValues(values),))


def naive(q, k, v, keys, values):
  """The paper's equations 3 and 4, with an embedding for every pair."""
  k, v = (jnp.repeat(x, N // K, axis=2)[:, None] for x in (k, v))
  k, v = k + keys[RELATION][:, :, None], v + values[RELATION][:, :, None]  # (B, T, S, N, H)
  scores = jnp.einsum("btnh,btsnh->bnts", q, k) * H**-0.5
  weights = jax.nn.softmax(jnp.where(np.tri(T, dtype=bool), scores, -jnp.inf))
  return jnp.einsum("bnts,btsnh->btnh", weights, v)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_values_and_gradients_are_those_of_an_embedding_for_every_pair(implementation):
  with jax.enable_x64(True):
    given = *inputs(T, T), *map(jnp.asarray, tables())
    loss = lambda f: lambda *x: jnp.cos(f(*x)).sum()
    ours = lambda q, k, v, *e: attend(q, k, v, spec(*e), implementation=implementation)
    np.testing.assert_allclose(ours(*given), naive(*given), rtol=1e-10)
    every = tuple(range(5))
    for a, b in zip(*(jax.jit(jax.grad(loss(f), every))(*given) for f in (ours, naive))):
      np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11)


def test_without_embeddings_it_is_attention_and_relative_values_weigh_by_mass():
  q, k, v = inputs(T, T, np.float32)
  zero, one = np.zeros((2 * R + 1, H), np.float32), np.ones((2 * R + 1, H), np.float32)
  plain = attend(q, k, v, AttentionSpec(masks.Causal()))
  np.testing.assert_allclose(attend(q, k, v, spec(zero, zero)), plain, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(attend(q, k, v, spec(zero, one)), plain + 1, rtol=1e-5, atol=1e-5)


def test_keys_that_are_far_away_are_told_apart_by_content_alone():
  q, k, v = inputs(1, T, np.float32)
  at = dict(q_tokens=Tokens.of_length(1, offset=T - 1))
  swapped = [x.at[:, [0, 4]].set(x[:, [4, 0]]) for x in (k, v)]  # both further away than R
  near = [x.at[:, [0, 7]].set(x[:, [7, 0]]) for x in (k, v)]
  e = [x.astype(np.float32) for x in tables()]
  out = attend(q, k, v, spec(*e), **at)
  np.testing.assert_allclose(attend(q, *swapped, spec(*e), **at), out, rtol=1e-4, atol=1e-5)
  assert np.abs(attend(q, *near, spec(*e), **at) - out).max() > 1e-2


def test_the_entry_brings_relative_values_along():
  build = lambda **given: registry.build(
    "transforms", dict(given, name="shaw", max_distance=R), head_dim=H, rngs=nnx.Rngs(0)
  )
  whole = AttentionSpec(transforms=(build(value_dim=5), build(value_dim=6)))
  (keys, _), (values, other) = whole.transforms, whole.readouts
  assert other.values.shape == (2 * R + 1, 6)
  assert keys.keys.shape == (2 * R + 1, H) and values.values.shape == (2 * R + 1, 5)
  assert keys.readout is None and not AttentionSpec(transforms=(build(values=False),)).readouts
  attention = dict(name="attention", num_heads=N, transforms=[dict(name="shaw", max_distance=R)])
  mixer = registry.build("mixers", attention, dim=N * H, rngs=nnx.Rngs(0))
  found = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(mixer))}
  assert {p for p in found if "spec" in p} and len([p for p in found if "spec" in p]) == 2


def test_a_negative_distance_is_refused():
  with pytest.raises(ValueError, match="max_distance=-1 must not be negative"):
    registry.build("transforms", dict(name="shaw", max_distance=-1), head_dim=H, rngs=nnx.Rngs(0))
