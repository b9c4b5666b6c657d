"""Differential attention: the formula, and the two maps cancelling as they should."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry
from attnx.mechanisms.mixers.differential_attention import DifferentialAttention

B, T, D, N, K, H = 2, 9, 32, 4, 2, 4
X = np.random.default_rng(0).normal(size=(B, T, D))
CAUSAL = AttentionSpec(masks.Causal())


def make(layer=4, **options):
  options = dict(num_heads=N, num_kv_heads=K) | options
  mixer = DifferentialAttention(D, layer=layer, **options, rngs=nnx.Rngs(0))
  mixer.norm.scale.set_value(jnp.linspace(0.5, 2, mixer.norm.scale.shape[0]))
  return mixer


def with_factor(mixer, factor):
  """Moves the learned vectors so that l is this number: exp(0) - exp(<a_2, c_2>) + b."""
  ones = np.zeros((2, 2, H), np.float32)
  ones[1] = np.sqrt(np.log(1 + mixer.offset - factor) / H)
  mixer.factors.set_value(jnp.asarray(ones))
  return mixer


def naive(mixer, x, layer):
  """The paper's equations, one query and one head at a time."""
  b, ((a1, c1), (a2, c2)) = 0.8 - 0.6 * np.exp(-0.3 * (layer - 1)), mixer.factors[...]
  l = jnp.exp(a1 @ c1) - jnp.exp(a2 @ c2) + b
  y = jnp.zeros_like(x)
  for n in range(N):
    shared = n // (N // K)
    q, k = x @ mixer.query.kernel[:, n], x @ mixer.key.kernel[:, shared]
    v = x @ mixer.value.kernel[:, shared]
    for t in range(T):
      maps = (
        jax.nn.softmax(jnp.einsum("bh,bsh->bs", q[:, t, at], k[:, : t + 1, at]) / np.sqrt(H))
        for at in (slice(0, H), slice(H, 2 * H))
      )
      first, second = (jnp.einsum("bs,bsv->bv", a, v[:, : t + 1]) for a in maps)
      head = first - l * second
      head = head / jnp.sqrt((head**2).mean(-1, keepdims=True) + 1e-5) * mixer.norm.scale[...]
      y = y.at[:, t].add((1 - b) * head @ mixer.out.kernel[n])
  return y


@pytest.mark.parametrize("layer", [1, 4])
def test_it_is_the_formula_of_the_paper_with_its_gradients(layer):
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(layer, position=None), nnx.Param, ...)
    of = lambda f: jax.value_and_grad(
      lambda params, x: jnp.cos(f(nnx.merge(graph, params, rest), x)).sum(), (0, 1)
    )
    given = specs.wide(params), jnp.asarray(X)
    actual = jax.jit(of(lambda m, x: m(x)))(*given)
    expected = jax.jit(of(lambda m, x: naive(m, x, layer)))(*given)
    specs.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_equal_maps_cancel_but_for_one_minus_the_factor():
  mixer, x = with_factor(make(position=None), 0.25), jnp.asarray(X, jnp.float32)
  for side in (mixer.query, mixer.key):
    side.kernel.set_value(jnp.tile(side.kernel[..., :H], 2))
  v = mixer.values(x)
  expected = attend(mixer.query(x)[..., :H], mixer.key(x)[..., :H], v, CAUSAL)
  np.testing.assert_allclose(mixer.mix(x, v), 0.75 * expected, rtol=1e-4, atol=1e-6)
  (_, seen) = nnx.capture(mixer, nnx.Intermediate)(x)
  (weights,), (heads,) = seen["weights"].get_value(), seen["heads"].get_value()
  np.testing.assert_allclose(weights.sum(-1), 0.75, rtol=1e-5)
  read = jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(v, N // K, 2))
  np.testing.assert_allclose(heads, read, rtol=1e-4, atol=1e-6)


def test_without_the_second_map_it_is_normed_attention_with_values_twice_as_wide():
  mixer, x = with_factor(make(layer=1, position=None), 0.0), jnp.asarray(X, jnp.float32)
  heads = attend(mixer.query(x)[..., :H], mixer.key(x)[..., :H], mixer.values(x), CAUSAL)
  size = jnp.sqrt((heads**2).mean(-1, keepdims=True) + 1e-5)
  expected = mixer.out(0.8 * heads / size * mixer.norm.scale[...])
  np.testing.assert_allclose(mixer(x), expected, rtol=1e-3, atol=1e-4)


def test_the_offset_and_the_first_factor_are_those_of_the_paper():
  assert [round(make(layer).offset, 6) for layer in (1, 2, 1000)] == [0.2, 0.355509, 0.8]
  wide = DifferentialAttention(512, layer=1, num_heads=2, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(wide.factors[...].std(), 0.1, rtol=0.1)
  assert abs(wide.factor() - 0.2) < 0.5
  with pytest.raises(TypeError, match="needs 'layer'"):
    registry.build("mixers", "differential_attention", dim=D, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="layer=0 must count from 1"):
    make(layer=0)


def test_a_norm_a_head_takes_the_size_of_its_own_values_away():
  mixer, x = make(), jnp.asarray(X, jnp.float32)
  before, rows = mixer(x), jnp.array([3.0, 7.0])[:, None]
  mixer.value.kernel.set_value(100 * rows * mixer.value.kernel[...])
  np.testing.assert_allclose(mixer(x), before, rtol=0.02, atol=2e-3)


def test_a_window_streams_from_a_cache_of_both_maps_keys():
  window = dict(mask=masks.Causal() & masks.Window(before=3))
  with jax.enable_x64(True):
    mixer = make(cache=dict(name="window", size=3, dtype="float64"), **window)
    past, out = mixer.init_cache(B, T), []
    assert sum(a.size for a in (past.key, past.value)) == B * 3 * K * 4 * H
    for piece in jnp.split(jnp.asarray(X), (5, 6, 8), axis=1):
      y, past = jax.jit(mixer.step)(piece, past)
      out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, 1), jax.jit(mixer)(X), rtol=1e-9, atol=1e-10)
