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
from attnx.nn.aside import Average, Loss

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
  """The paper's equations without its blocks, head by head, in the quadratic form."""
  L, M, y, tau = mixer.block, mixer.memory, jnp.zeros_like(x), H**-0.25
  rms = lambda x: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * tau
  t, s = np.mgrid[:T, :T]
  met = s >= t // L * L - M  # one by one, where the gradient passes the codeword
  angle = np.abs(t - s)[..., None] / 100_000.0 ** (np.arange(0, D, 2) / D)
  r = np.concatenate([np.sin(angle), np.cos(angle)], -1) * (t - s <= M)[..., None] * tau
  words = mixer.code_sum[...] / np.maximum(mixer.code_count[...], 0.01)[..., None]
  for n in range(N):
    at = n // (N // K)
    q, k = (rms(x @ m.kernel[:, i]) for m, i in ((mixer.query, n), (mixer.key, at)))
    word = words[at][((k[:, :, None] - words[at]) ** 2).sum(-1).argmin(-1)]
    u, e = (bias[n] * tau for bias in (mixer.content_bias, mixer.relative_bias))
    straight = (k - jax.lax.stop_gradient(k))[:, None] * met[..., None]
    scores = jnp.einsum("bth,btsh->bts", q + u, word[:, None] + straight)
    scores += jnp.einsum("bth,tsh->bts", q + e, r @ mixer.distance.kernel[:, at])
    weights = jax.nn.softmax(jnp.where(s <= t, scores, -jnp.inf))
    head = weights @ jax.nn.silu(x @ mixer.value.kernel[:, at])
    y += head * jax.nn.silu(x @ mixer.gate.kernel[:, n]) @ mixer.out.kernel[n]
  return y


@pytest.mark.parametrize("block, memory", [(3, 3), (2, 5), (4, 1), (20, 20)])
def test_it_is_quadratic_attention_over_quantised_keys_with_its_gradients(block, memory):
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(block, memory), nnx.Param, ...)
    loss = lambda f: lambda params, x: jnp.cos(f(nnx.merge(graph, params, rest), x)).sum()
    of = lambda f: jax.jit(jax.value_and_grad(loss(f), (0, 1)))
    given = specs.wide(params), jnp.asarray(X)
    specs.assert_close(of(lambda m, x: m(x))(*given), of(naive)(*given), **CLOSE)


def test_values_do_not_depend_on_the_length_of_a_block_nor_on_how_it_is_stepped():
  with jax.enable_x64(True):
    whole = make(block=T)(X)
    for block in (1, 6):
      np.testing.assert_allclose(jax.jit(make(block))(X), whole, **CLOSE)
    mixer = make(block=4)
    past = specs.wide(mixer.init_cache(B, T))
    for a, b in ((0, 6), (6, 7), (7, 12)):
      y, past = jax.jit(mixer.step)(X[:, a:b], past)
      np.testing.assert_allclose(y, whole[:, a:b], **CLOSE)


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
  order, place = np.array([-1, 0, 1, 2, -1, 3, 0, 1, -1, -1, 2, 3, 4]), np.arange(T)
  tokens = Tokens(place[None], order[None], np.where(place < 6, 7, 2)[None])
  with jax.enable_x64(True):
    for cuts in ((), (3, 9)):
      mixer, out = make(block=4, memory=2), np.zeros_like(X)
      past = specs.wide(mixer.init_cache(B, T))
      for a, b in zip((0, *cuts), (*cuts, T)):
        out[:, a:b], past = mixer.step(X[:, a:b], past, tokens=tokens[a:b])
      for document in ((order >= 0) & (place < 6), (order >= 0) & (place >= 6)):
        np.testing.assert_allclose(out[:, document], mixer(X[:, document]), **CLOSE)
      assert (out[:, order < 0] == 0).all() and past.seen.tolist() == [5] * B


def test_a_codebook_of_the_keys_themselves_quantises_nothing():
  mixer, x = make(num_codes=B * T), jnp.asarray(X, jnp.float32)
  k = mixer.keys(x)
  mixer.code_sum.set_value(jnp.moveaxis(k, 2, 0).reshape(K, B * T, H))
  mixer.relative_bias.set_value(jnp.zeros((N, H)))
  mixer.distance.kernel.set_value(jnp.zeros((D, K, H)))
  v, spec = mixer.values(x), AttentionSpec(masks.Causal(), scale=1.0)
  np.testing.assert_allclose(mixer.mix(x, v), attend(mixer.queries(x), k, v, spec), rtol=1e-4)


def test_who_looks_sees_quadratic_weights_and_what_the_codebook_learns_from():
  mixer, x = make(), jnp.asarray(X, jnp.float32)
  _, seen, losses, moves = nnx.capture(mixer, nnx.Intermediate, Loss, Average)(x)
  seen = {name: value.get_value()[0] for name, value in seen.items()}
  read = jnp.einsum("bnts,bsnv->btnv", seen["weights"], jnp.repeat(mixer.values(x), N // K, 2))
  np.testing.assert_allclose(seen["heads"], read, rtol=1e-4, atol=1e-5)
  far = jnp.square(mixer.keys(x)[:, :, :, None] - mixer.codebook.codewords()).sum(-1)
  loss = 1e-4 * far.min(-1).sum(-1).mean()
  np.testing.assert_allclose(losses["commit"].get_value(), loss, rtol=1e-4)
  which = np.asarray(far.argmin(-1))[..., None] == np.arange(R)
  np.testing.assert_array_equal(moves["code_count"].get_value(), which.sum((0, 1)))
