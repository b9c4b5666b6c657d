"""Transformer-VQ: quadratic attention over quantised keys, in blocks, and its codebook."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.transformer_vq import TransformerVQ
from attnx.nn.codebook import Codebook

B, T, D, N, K, H, V, R = 2, 13, 8, 4, 2, 6, 5, 4
X = np.random.default_rng(0).normal(size=(B, T, D))
CLOSE = dict(rtol=1e-9, atol=1e-10)


def make(block=3, memory=3, **options):
  options = dict(num_heads=N, num_kv_heads=K, head_dim=H, value_dim=V, num_codes=R) | options
  mixer = TransformerVQ(D, block=block, memory=memory, **options, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  for bias in (mixer.content_bias, mixer.relative_bias):
    bias.set_value(jnp.asarray(rng.normal(size=bias.shape), jnp.float32))
  mixer.code_sum.set_value(jnp.asarray(rng.normal(size=mixer.code_sum.shape), jnp.float32))
  return mixer


def naive(mixer, x):
  """The paper's equations without its blocks, one query, head and key at a time."""
  L, M, y, tau = mixer.block, mixer.memory, jnp.zeros_like(x), H**-0.25
  rms = lambda x: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * tau
  wave = lambda d: d / 100_000.0 ** (np.arange(0, D, 2) / D)
  words = mixer.code_sum[...] / np.maximum(mixer.code_count[...], 0.01)[..., None]
  for n in range(N):
    at = n // (N // K)
    q, k = (rms(x @ m.kernel[:, i]) for m, i in ((mixer.query, n), (mixer.key, at)))
    z = ((k[:, :, None] - words[at]) ** 2).sum(-1).argmin(-1)
    word, constant = words[at][z], jax.lax.stop_gradient
    u, e = (bias[n] * tau for bias in (mixer.content_bias, mixer.relative_bias))
    v = jax.nn.silu(x @ mixer.value.kernel[:, at])
    gate = jax.nn.silu(x @ mixer.gate.kernel[:, n])
    for t in range(x.shape[1]):
      scores = []
      for s in range(t + 1):
        met = s >= t // L * L - M  # one by one, where the gradient passes the codeword
        key = word[:, s] + (k[:, s] - constant(k[:, s]) if met else 0)
        score = ((q[:, t] + u) * key).sum(-1)
        if t - s <= M:
          sinusoid = np.r_[np.sin(wave(t - s)), np.cos(wave(t - s))]
          score += (q[:, t] + e) @ (sinusoid @ mixer.distance.kernel[:, at] * tau)
        scores.append(score)
      head = jnp.einsum("bs,bsv->bv", jax.nn.softmax(jnp.stack(scores, -1)), v[:, : t + 1])
      y = y.at[:, t].add((head * gate[:, t]) @ mixer.out.kernel[n])
  return y


@pytest.mark.parametrize("block, memory", [(3, 3), (2, 5), (4, 1), (13, 3), (20, 20)])
def test_it_is_quadratic_attention_over_quantised_keys_with_its_gradients(block, memory):
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(block, memory), nnx.Param, ...)
    of = lambda f: jax.jit(jax.value_and_grad(
      lambda params, x: jnp.cos(f(nnx.merge(graph, params, specs.wide(rest)), x)).sum(), (0, 1)
    ))  # fmt: skip
    given = specs.wide(params), jnp.asarray(X)
    specs.assert_close(of(lambda m, x: m(x))(*given), of(naive)(*given), **CLOSE)


def test_values_do_not_depend_on_the_length_of_a_block_nor_on_how_it_is_stepped():
  with jax.enable_x64(True):
    whole = make(block=T)(X)
    for block in (1, 4, 6):
      np.testing.assert_allclose(make(block)(X), whole, **CLOSE)
    mixer, out = make(block=4), []
    past = specs.wide(mixer.init_cache(B, T))
    for piece in jnp.split(jnp.asarray(X), (6, 7, 12), axis=1):
      y, past = mixer.step(piece, past)
      out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, 1), whole, **CLOSE)


def test_the_past_is_counts_and_means_of_codes_at_any_length():
  mixer, x = make(memory=2), jnp.asarray(X, jnp.float32)
  _, past = mixer.step(x, mixer.init_cache(B, T))
  z, v = mixer.codebook.nearest(mixer.keys(x))[:, :-2], mixer.values(x)[:, :-2]
  which = np.asarray(z)[:, :, None] == np.arange(R)[:, None]  # (B, S, R, K)
  np.testing.assert_array_equal(past.count, which.sum(1))
  sums = np.einsum("bsrk,bskv->brkv", which, v)
  np.testing.assert_allclose(past.mean * past.count[..., None], sums, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(past.recent.position, [[11, 12]] * B)


def test_documents_with_gaps_are_as_if_alone_across_steps():
  order = np.array([-1, 0, 1, 2, -1, 3, 0, 1, -1, -1, 2, 3, 4])
  first = np.isin(np.arange(T), [1, 2, 3, 5])
  where = Tokens.of_length(T)
  tokens = Tokens(where.index, order[None], np.where(np.arange(T) < 6, 7, 2)[None])
  with jax.enable_x64(True):
    for cuts in ((), (2, 7, 9, 11)):
      mixer, out = make(block=4, memory=2), []
      past = specs.wide(mixer.init_cache(B, T))
      for a, b in zip((0, *cuts), (*cuts, T)):
        y, past = mixer.step(jnp.asarray(X[:, a:b]), past, tokens=tokens[a:b])
        out.append(np.asarray(y))
      out = np.concatenate(out, 1)
      np.testing.assert_allclose(out[:, first], mixer(X[:, first]), **CLOSE)
      second = ~first & (order >= 0)
      np.testing.assert_allclose(out[:, second], mixer(X[:, second]), **CLOSE)
      assert np.abs(out[:, order < 0]).max() == 0 and past.seen.tolist() == [5] * B


def test_a_codebook_of_the_keys_themselves_quantises_nothing():
  mixer, x = make(num_codes=B * T), jnp.asarray(X, jnp.float32)
  k = mixer.keys(x)
  mixer.code_sum.set_value(jnp.moveaxis(k, 2, 0).reshape(K, B * T, H))
  mixer.relative_bias.set_value(jnp.zeros((N, H)))
  mixer.distance.kernel.set_value(jnp.zeros((D, K, H)))
  v, spec = mixer.values(x), AttentionSpec(masks.Causal(), scale=1.0)
  np.testing.assert_allclose(mixer.mix(x, v), attend(mixer.queries(x), k, v, spec), rtol=1e-4)


def test_the_codebook_moves_to_the_means_of_its_keys_and_the_loss_pulls_keys_to_it():
  x, there = jnp.array([[[[1.0, 0]], [[3, 0]], [[0, -2]], [[9, 9]]]]), jnp.array([[1, 1, 1, 0]]) > 0
  book = Codebook(sum=jnp.array([[[0.5, 0], [0, -0.5]]]), count=jnp.ones((1, 2)))
  batch = book.of(x, there)
  np.testing.assert_array_equal(batch.sum, [[[4, 0], [0, -2]]])
  np.testing.assert_array_equal(batch.count, [[2, 1]])
  np.testing.assert_allclose(book.moved(batch).sum[0, 0], [0.99 * 0.5 + 0.01 * 4, 0], rtol=1e-6)
  for _ in range(3):
    book = book.moved(book.of(x, there), decay=1e-4)
  np.testing.assert_allclose(book.codewords(), [[[2, 0], [0, -2]]], rtol=1e-3, atol=1e-6)
  loss, pull = jax.value_and_grad(book.commitment)(x, there)
  np.testing.assert_allclose(loss, 2 / 3, rtol=1e-3)
  np.testing.assert_allclose(pull[0, :, 0, 0], [-2 / 3, 2 / 3, 0, 0], rtol=1e-3, atol=1e-6)
