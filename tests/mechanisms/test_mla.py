"""Latent attention: the formula, its absorbed form, and what its cache holds."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.mla import MultiHeadLatentAttention
from attnx.nn.kv_cache import View

B, T, D, N, Q, C, H, R, V = 2, 11, 16, 3, 10, 12, 6, 4, 5
CLOSE = dict(rtol=1e-9, atol=1e-10)
WINDOW = dict(mask=masks.Causal() & masks.Window(before=3))


def make(**options):
  widths = dict(num_heads=N, query_rank=Q, kv_rank=C, head_dim=H, rope_dim=R, value_dim=V)
  mixer = MultiHeadLatentAttention(D, **widths | options, rngs=nnx.Rngs(0))
  mixer.norm.scale.set_value(jnp.linspace(0.5, 2, mixer.norm.scale.shape[0]))
  return mixer


def inputs(length: int = T):
  return jnp.asarray(np.random.default_rng(0).normal(size=(B, length, D)))


def naive(mixer, x):
  """The paper's equations, one query, key and head at a time; pairs (j, j + R / 2) turn."""
  rms = lambda x, norm: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm.scale[...]
  slow = np.exp(1j * 1e4 ** (-2 * np.arange(R // 2) / R))
  turn = lambda x, t: (x[:, : R // 2] + 1j * x[:, R // 2 :]) * slow**t
  q = rms(x @ mixer.query_down.kernel[...], mixer.query_norm)
  c = rms(x @ mixer.down.kernel[...], mixer.norm)
  y = jnp.zeros_like(x)
  for t in range(x.shape[1]):
    seen = range(max(0, t - 3), t + 1)
    for n in range(N):
      query, scores = q[:, t] @ mixer.query.kernel[:, n], []
      for s in seen:
        k = turn(x[:, s] @ mixer.rope_key.kernel[:, 0], s)
        content = (query[:, :H] * (c[:, s] @ mixer.key.kernel[:, n])).sum(-1)
        scores.append(content + (turn(query[:, H:], t) * k.conj()).real.sum(-1))
      weights = jax.nn.softmax(jnp.stack(scores, -1) / np.sqrt(H + R))
      values = c[:, seen[0] : t + 1] @ mixer.value.kernel[:, n]
      y = y.at[:, t].add(jnp.einsum("bs,bsv->bv", weights, values) @ mixer.out.kernel[n])
  return y


def test_it_is_the_formula_of_the_paper_with_its_gradients():
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(**WINDOW), nnx.Param, ...)
    params = specs.wide(params)
    of = lambda f: jax.value_and_grad(
      lambda params, x: jnp.cos(f(nnx.merge(graph, params, rest), x)).sum(), (0, 1)
    )
    actual, expected = jax.jit(of(lambda m, x: m(x)))(params, inputs()), of(naive)(params, inputs())
    specs.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("options", [WINDOW, dict(normaliser="rela"), dict(normaliser="sink")])
def test_absorbed_is_expanded_for_packed_documents_with_gradients(options):
  tokens = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, T)), specs.packed(T))
  mask = options.get("mask", masks.Causal()) & registry.build("masks", "same_segment")
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(**options | dict(mask=mask)), nnx.Param, ...)

    def heads(params, x, absorbed):
      mixer = nnx.merge(graph, params, rest)
      if not absorbed:
        return mixer.mix(x, mixer.values(x), tokens=tokens)
      view = View(mixer.shared_key(x, tokens), mixer.latent(x)[:, :, None], tokens)
      return mixer.absorbed(*mixer.queries(x, tokens), view, tokens)

    loss = lambda absorbed: lambda params, x: jnp.cos(heads(params, x, absorbed)).sum()
    a, b = (jax.jit(jax.grad(loss(way), (0, 1)))(specs.wide(params), inputs()) for way in (1, 0))
    specs.assert_close(a, b, **CLOSE)
    specs.assert_close(*(heads(specs.wide(params), inputs(), way) for way in (1, 0)), **CLOSE)
    assert np.abs(np.asarray(a[1])).max() > 0.01


@pytest.mark.parametrize("cache", [dict(name="full"), dict(name="window", size=3)])
def test_steps_absorb_or_expand_and_equal_one_call(cache):
  with jax.enable_x64(True):
    mixer, x = make(cache=cache | dict(dtype="float64"), **WINDOW), inputs(20)
    assert mixer.absorbs(1) and not mixer.absorbs(15)
    past, out = mixer.init_cache(B, 20), []
    for piece in jnp.split(x, (15, 16), axis=1):
      y, past = mixer.step(piece, past)
      out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, 1), mixer(x), **CLOSE)


def test_a_token_of_deepseek_v2_is_576_numbers_of_128_heads():
  def floats():
    cache = MultiHeadLatentAttention(5120, num_heads=128, rngs=nnx.Rngs(0)).init_cache(1, 1)
    return [x for x in jax.tree.leaves(cache) if x.dtype == jnp.float32]

  sizes = [x.size for x in jax.eval_shape(floats)]
  assert sum(sizes) == 576 == 4.5 * 128  # what 2.25 groups of grouped-query attention keep


def test_heads_that_expand_nothing_are_multi_query_attention_over_latents():
  mixer, x = make(head_dim=C, value_dim=C), inputs().astype(jnp.float32)
  for up in (mixer.key, mixer.value):
    up.kernel.set_value(jnp.repeat(jnp.eye(C)[:, None], N, 1))
  tokens, c = Tokens.of_length(T), mixer.latent(x)[:, :, None]
  q = jnp.concatenate(mixer.queries(x, tokens), -1)
  k = jnp.concatenate([c, mixer.shared_key(x, tokens)], -1)
  expected = attend(q, k, c, AttentionSpec(masks.Causal()))
  np.testing.assert_allclose(mixer.mix(x, mixer.values(x)), expected, rtol=1e-5, atol=1e-6)


def test_the_temperature_of_yarn_is_that_of_all_scores():
  yarn = make(position=dict(name="yarn", factor=4.0, original_length=10**9))  # turns as rope does
  other = make(scale=yarn.position.gain**2 / np.sqrt(H + R))
  x = inputs().astype(jnp.float32)
  np.testing.assert_allclose(yarn(x), other(x), rtol=1e-4, atol=1e-5)


def test_what_looks_at_queries_of_one_width_is_refused():
  with pytest.raises(NotImplementedError, match="no one query and value width"):
    make(transforms=["shaw"])
