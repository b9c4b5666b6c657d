"""What recurrent mixers share: convolutions, and a past that documents empty."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.nn.conv import ShortConv
from attnx.nn.recurrent import RecurrentCache, RecurrentMixer

B, T, D = 2, 12, 16
X = jax.random.normal(jax.random.key(0), (B, T, D))
SEGMENT = np.repeat([4, 0, 7, 0], [3, 1, 6, 2])  # 0 comes back


def recurrent(name) -> bool:
  make = registry.get("mixers", name).make
  return isinstance(make, type) and issubclass(make, RecurrentMixer)


NAMES = [name for name in registry.names("mixers") if recurrent(name)]


def documents(segment=SEGMENT) -> Tokens:
  starts = np.r_[True, segment[1:] != segment[:-1]]
  position = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0))
  return Tokens(index=np.arange(T)[None], position=position[None], segment=segment[None])


@pytest.mark.parametrize("cuts", [(), (3, 4, 10), (1, 5, 6, 7), tuple(range(1, T))])
def test_steps_within_and_across_documents_equal_a_convolution_of_each(cuts):
  conv = ShortConv(D, width=4, use_bias=True, rngs=nnx.Rngs(0))
  conv.bias.set_value(jnp.arange(1.0 * D))
  ends = [0, 3, 4, 10, T]
  expected = jnp.concatenate([conv(X[:, a:b]) for a, b in zip(ends, ends[1:])], 1)
  cache, outputs = RecurrentCache.empty(conv.init_cache(B)), []
  for a, b in zip((0, *cuts), (*cuts, T)):
    tokens = documents()[a:b]
    y, past = conv.step(X[:, a:b], cache.before(tokens), tokens=tokens)
    cache, outputs = cache.after(past, tokens), [*outputs, y]
  np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(conv(X, tokens=documents()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 20])
def test_a_convolution_of_any_width_is_the_sum_over_its_taps(width):
  conv = ShortConv(D, width=width, rngs=nnx.Rngs(0))
  kernel, bound = np.asarray(conv.kernel[...], float), width**-0.5
  assert abs(kernel).max() <= bound and abs(kernel).max() > 0.8 * bound
  x = np.asarray(X, float)
  expected = [sum(kernel[i] * x[:, t - i] for i in range(min(width, t + 1))) for t in range(T)]
  np.testing.assert_allclose(conv(X), np.stack(expected, 1), rtol=1e-5, atol=1e-5)


def make(name):
  entry = registry.get("mixers", name)
  config = {"name": name, **entry.tiny, **entry.patterns["causal_self"]}
  return registry.build("mixers", config, dim=D, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", NAMES)
def test_steps_within_and_across_documents_equal_one_call(name):
  mixer = make(name)
  expected = jax.jit(lambda x, tokens: mixer(x, tokens=tokens))(X, documents())
  for cuts in ((3, 4, 10), (5, 6, 8)):
    cache, step, outputs = mixer.init_cache(B, T), jax.jit(mixer.step), []
    for a, b in zip((0, *cuts), (*cuts, T)):
      y, cache = step(X[:, a:b], cache, tokens=documents()[a:b])
      outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_without_tokens_a_step_goes_on_with_the_last_document(name):
  mixer, tokens = make(name), documents()
  expected = mixer(X, tokens=tokens)
  _, cache = mixer.step(X[:, :6], mixer.init_cache(B, T), tokens=tokens[:6])
  y, cache = mixer.step(X[:, 6:9], cache)
  np.testing.assert_allclose(y, expected[:, 6:9], rtol=2e-4, atol=2e-5)
  assert (cache.segment == 7).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_keeps_the_types_of_its_cache_and_scans(name):
  mixer = make(name)
  rows = jnp.moveaxis(X, 1, 0)[:, :, None].astype(jnp.bfloat16)
  advance = lambda cache, x: mixer.step(x, cache)[::-1]
  _, y = jax.lax.scan(advance, mixer.init_cache(B, T), rows)
  expected = mixer(X.astype(jnp.bfloat16)).astype(jnp.float32)
  actual = jnp.moveaxis(y[:, :, 0], 0, 1).astype(jnp.float32)
  assert y.dtype == jnp.bfloat16
  assert jnp.linalg.norm(actual - expected) < 0.03 * jnp.linalg.norm(expected)
