"""Linear attention: it is attention whose weights are products of features."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.analysis.observe import observe
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.linear_attention import LinearAttention
from attnx.nn.implicit import implicit_attention

B, T, S, D, N, K = 2, 19, 7, 16, 4, 2
RNG = np.random.default_rng(0)
X, C = RNG.normal(size=(B, T, D)), RNG.normal(size=(B, S, D))


def make(**options):
  return LinearAttention(D, num_heads=N, num_kv_heads=K, rngs=nnx.Rngs(0), **options)


def naive(mixer, x, context, mask, normalise=True):
  """With the (T, S) weights, in the precision of x."""
  heads = lambda x, p: jnp.einsum("btd,dnh->btnh", x, p.kernel[...].astype(x.dtype))
  phi = lambda y: jnp.where(y > 0, y + 1, jnp.exp(jnp.minimum(y, 0)))
  q, k, v = heads(x, mixer.query), heads(context, mixer.key), heads(context, mixer.value)
  k, v = jnp.repeat(k, N // K, 2), jnp.repeat(v, N // K, 2)
  weights = jnp.einsum("btnh,bsnh->bnts", phi(q), phi(k)) * mask
  if normalise:
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-6)
  out = jnp.einsum("bnts,bsnv->btnv", weights, v)
  return jnp.einsum("btnv,nvd->btd", out, mixer.out.kernel[...].astype(x.dtype))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_values_and_gradients_are_those_of_the_weights(cross, causal, normalise):
  with jax.enable_x64(True):
    mixer = make(causal=causal, normalise=normalise)
    x, context = jnp.asarray(X), jnp.asarray(C if cross else X)
    mask = np.tri(T, context.shape[1]) if causal else 1.0
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)

    def f(p, x, context):
      return nnx.merge(graph, p, rest)(x, context=context if cross else None)

    def g(p, x, context):
      source = context if cross else x
      return naive(nnx.merge(graph, p, rest), x, source, mask, normalise)

    args = params, x, context
    np.testing.assert_allclose(f(*args), g(*args), rtol=1e-9, atol=1e-11)
    gradient = lambda h: jax.jit(jax.grad(lambda *a: jnp.cos(h(*a)).sum(), (0, 1, 2)))(*args)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    jax.tree.map(close, gradient(f), gradient(g))


def test_weights_of_a_row_sum_to_one_and_constant_values_come_back():
  x = jnp.asarray(X, jnp.float32)
  np.testing.assert_allclose(implicit_attention(make(), x).sum(-1), 1.0, atol=1e-4)


def test_the_order_of_keys_does_not_matter_where_all_are_seen():
  mixer, order = make(causal=False), RNG.permutation(S)
  x, context = jnp.asarray(X, jnp.float32), jnp.asarray(C, jnp.float32)
  np.testing.assert_allclose(
    mixer(x, context=context[:, order]), mixer(x, context=context), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("normalise", [True, False])
def test_recurrent_chunkwise_and_parallel_forms_and_steps_agree(normalise):
  with jax.enable_x64(True):
    x, one = jnp.asarray(X), Tokens.of_length(T)
    mixers = [make(normalise=normalise, chunk=chunk) for chunk in (1, 4, 16, T)]
    expected, cache = mixers[0](x), mixers[1].init_cache(B, T)
    for mixer in mixers[1:]:
      np.testing.assert_allclose(mixer(x), expected, rtol=1e-10, atol=1e-12)
    for a, b in ((0, 1), (1, 8), (8, T)):
      y, cache = mixers[1].step(x[:, a:b], cache)
      np.testing.assert_allclose(y, expected[:, a:b], rtol=1e-10, atol=1e-12)
    both = make(normalise=normalise, chunk=4, causal=False)  # what follows meets what precedes
    np.testing.assert_allclose(both(x, tokens=one), both(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cross", [True, False])
def test_what_is_observed_of_self_and_cross_attention_is_its_matrix_and_what_heads_read(cross):
  mixer, x, context = make(causal=False), *(jnp.asarray(y, jnp.float32) for y in (X, C))
  source = context if cross else x
  _, seen = observe(mixer, x, context=context if cross else None)
  assert seen["weights"].shape == (B, N, T, source.shape[1])
  read = jnp.einsum("bnts,bsnv->btnv", seen["weights"], jnp.repeat(mixer.values(source), 2, 2))
  np.testing.assert_allclose(seen["heads"], read, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature", registry.names("features"))
def test_every_feature_streams(feature):
  mixer, x = make(feature=feature, position="rope"), jnp.asarray(X, jnp.float32)
  cache, outs = mixer.init_cache(B, T), []
  for piece in jnp.split(x, [6, 7], axis=1):
    y, cache = mixer.step(piece, cache)
    outs.append(y)
  np.testing.assert_allclose(jnp.concatenate(outs, 1), mixer(x), rtol=2e-3, atol=2e-4)


def test_a_bfloat16_run_of_4096_tokens_drifts_less_than_a_hundredth():
  mixer = make()
  x = jnp.asarray(RNG.normal(size=(1, 4096, D)), jnp.bfloat16)
  exact = mixer(x.astype(jnp.float32))
  assert np.abs(mixer(x).astype(jnp.float32) - exact).max() < 0.01 * np.abs(exact).max() + 0.01


def test_what_it_cannot_do_it_says():
  with pytest.raises(NotImplementedError, match="causal=True"):
    make(causal=False).init_cache(B, T)
  with pytest.raises(ValueError, match="num_kv_heads=3"):
    LinearAttention(D, num_heads=N, num_kv_heads=3, rngs=nnx.Rngs(0))
