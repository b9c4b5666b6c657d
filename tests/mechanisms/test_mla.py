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


inputs = lambda length=T: jnp.asarray(np.random.default_rng(0).normal(size=(B, length, D)))


def naive(mixer, x):
  """The paper's equations, head by head, in a window of 4; pairs (j, j + R / 2) turn."""
  rms = lambda x, norm: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm.scale[...]
  slow = np.exp(1j * np.arange(T)[:, None] * 1e4 ** (-2 * np.arange(R // 2) / R))
  turn = lambda x: (x[..., : R // 2] + 1j * x[..., R // 2 :]) * slow
  q = rms(x @ mixer.query_down.kernel[...], mixer.query_norm)
  c = rms(x @ mixer.down.kernel[...], mixer.norm)
  shared, y = turn(x @ mixer.rope_key.kernel[:, 0]), jnp.zeros_like(x)
  t, s = np.mgrid[:T, :T]
  for n in range(N):
    query = q @ mixer.query.kernel[:, n]
    scores = query[..., :H] @ (c @ mixer.key.kernel[:, n]).mT
    scores += (turn(query[..., H:]) @ shared.conj().mT).real
    scores = jnp.where((s <= t) & (t - s <= 3), scores / np.sqrt(H + R), -jnp.inf)
    y += jax.nn.softmax(scores) @ (c @ mixer.value.kernel[:, n]) @ mixer.out.kernel[n]
  return y


def test_it_is_the_formula_of_the_paper_with_its_gradients():
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(**WINDOW), nnx.Param, ...)
    params = specs.wide(params)
    loss = lambda f: lambda params, x: jnp.cos(f(nnx.merge(graph, params, rest), x)).sum()
    of = lambda f: jax.jit(jax.value_and_grad(loss(f), (0, 1)))(params, inputs())
    specs.assert_close(of(lambda m, x: m(x)), of(naive), **CLOSE)


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

    loss = lambda *given: (lambda out: (jnp.cos(out).sum(), out))(heads(*given))
    of = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    a, b = (of(specs.wide(params), inputs(), absorbed) for absorbed in (True, False))
    specs.assert_close(a, b, **CLOSE)
    assert np.abs(a[0][1]).max() > 0.01


@pytest.mark.parametrize("cache", [dict(name="full"), dict(name="window", size=3)])
def test_steps_absorb_or_expand_and_equal_one_call(cache):
  with jax.enable_x64(True):
    mixer, x = make(cache=cache | dict(dtype="float64"), **WINDOW), inputs(20)
    assert mixer.absorbs(1) and not mixer.absorbs(15)
    past, whole = mixer.init_cache(B, 20), jax.jit(mixer)(x)
    for a, b in ((0, 15), (15, 16), (16, 20)):
      y, past = jax.jit(mixer.step)(x[:, a:b], past)
      np.testing.assert_allclose(y, whole[:, a:b], **CLOSE)


def test_a_token_of_deepseek_v2_is_576_numbers_of_128_heads():
  build = lambda: MultiHeadLatentAttention(5120, num_heads=128, rngs=nnx.Rngs(0)).init_cache(1, 1)
  kept = sum(x.size for x in jax.tree.leaves(jax.eval_shape(build)) if x.dtype == jnp.float32)
  assert kept == 576 == 4.5 * 128  # what 2.25 groups of grouped-query attention keep


def test_heads_that_expand_nothing_are_multi_query_attention_over_latents():
  mixer, x = make(head_dim=C, value_dim=C), inputs().astype(jnp.float32)
  for up in (mixer.key, mixer.value):
    up.kernel.set_value(jnp.repeat(jnp.eye(C)[:, None], N, 1))
  where, c = Tokens.of_length(T), mixer.latent(x)[:, :, None]
  k = jnp.concatenate([c, mixer.shared_key(x, where)], -1)
  q = jnp.concatenate(mixer.queries(x, where), -1)
  expected = attend(q, k, c, AttentionSpec(masks.Causal()))
  _, seen = nnx.capture(mixer, nnx.Intermediate)(x)
  read = jnp.einsum("bnts,bsc->btnc", seen["weights"].get_value()[0], c[:, :, 0])
  for heads in (seen["heads"].get_value()[0], read):
    np.testing.assert_allclose(heads, expected, rtol=1e-5, atol=1e-6)


def test_the_temperature_of_yarn_is_that_of_all_scores():
  yarn = make(position=dict(name="yarn", factor=4.0, original_length=10**9))  # turns as rope does
  other = make(scale=yarn.position.gain**2 / np.sqrt(H + R))
  np.testing.assert_allclose(*(m(inputs()) for m in (yarn, other)), rtol=1e-4, atol=1e-5)


def test_what_would_look_at_other_queries_and_keys_is_refused():
  with pytest.raises(NotImplementedError, match="no one query and value width"):
    make(transforms=["shaw"])
  with pytest.raises(NotImplementedError, match="SinkCache chooses by the queries and keys"):
    make(cache="sinks").init_cache(B, T)
