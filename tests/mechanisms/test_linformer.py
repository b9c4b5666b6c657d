"""Linformer: compressions that are something known, and padding that is not there."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import attend
from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.linformer import Linformer
from attnx.nn.implicit import implicit_attention

B, T, S, D, N, K, H, LENGTH, R = 2, 7, 11, 16, 4, 2, 4, 16, 5
RNG = np.random.default_rng(0)
X, CONTEXT = RNG.normal(size=(B, T, D)), RNG.normal(size=(B, S, D))


def make(rank=R, length=LENGTH, **options):
  options = dict(num_heads=N, num_kv_heads=K) | options
  return Linformer(D, length=length, rank=rank, rngs=nnx.Rngs(0), **options)


array = lambda parameter: np.asarray(parameter[...], float)
project = lambda x, layer: np.einsum("bsd,dnh->bsnh", x, array(layer.kernel))


def matrices(mixer, x, context):
  """Softmax over compressed keys (B, N, T, R) and F (K, S, R), in float64 NumPy."""
  e = array(mixer.compress_key)
  f = e if mixer.compress_value is None else array(mixer.compress_value)
  e, f = (np.broadcast_to(m, (K, *m.shape[1:]))[:, : context.shape[1]] for m in (e, f))
  k = np.repeat(np.einsum("bskh,ksr->brkh", project(context, mixer.key), e), N // K, 2)
  weights = np.exp(np.einsum("btnh,brnh->bntr", project(x, mixer.query), k) / np.sqrt(H))
  return weights / weights.sum(-1, keepdims=True), f


def naive(mixer, x, context):
  weights, f = matrices(mixer, x, context)
  v = np.repeat(np.einsum("bskh,ksr->brkh", project(context, mixer.value), f), N // K, 2)
  return np.einsum("bntr,brnh,nhd->btd", weights, v, array(mixer.out.kernel))


@pytest.mark.parametrize("sharing, count", [("none", 2 * K), ("head", 2), ("kv", 1)])
def test_it_is_the_formula_however_matrices_are_shared(sharing, count):
  with jax.enable_x64(True):
    mixer = make(sharing=sharing)
    compressors = jax.tree.leaves((mixer.compress_key, mixer.compress_value))
    assert sum(m.size for m in compressors) == count * LENGTH * R
    actual = mixer(jnp.asarray(X), context=jnp.asarray(CONTEXT))
    np.testing.assert_allclose(actual, naive(mixer, X, CONTEXT), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(mixer(jnp.asarray(X)), naive(mixer, X, X), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block", [1, 2])
def test_an_identity_compresses_nothing_and_averages_of_blocks_are_attention_over_means(block):
  mixer, context = make(rank=8 // block, length=8), jnp.asarray(CONTEXT[:, :8], jnp.float32)
  for m in (mixer.compress_key, mixer.compress_value):
    m.set_value(jnp.repeat(jnp.eye(8 // block), block, axis=0)[None] / block)
  x, means = jnp.asarray(X, jnp.float32), context.reshape(B, 8 // block, block, D).mean(2)
  expected = mixer.out(attend(mixer.query(x), mixer.key(means), mixer.value(means)))
  np.testing.assert_allclose(mixer(x, context=context), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_padding_on_either_side_is_not_there(traced):
  mixer, x = make(), X.astype(np.float32)
  place = np.arange(9, dtype=np.int32)[None]
  document = lambda at: 0 * place if traced else np.where(at < 0, 3, 0)
  call = lambda x, at: mixer(x, tokens=Tokens(index=place, position=at, segment=document(at)))
  call = jax.jit(call) if traced else call
  left, right = [(2, 0), (0, 2)]
  for pad in (left, right):
    padded = np.pad(x, ((0, 0), pad, (0, 0)), constant_values=50.0)
    out = np.asarray(call(padded, np.pad(place[0, :T], pad, constant_values=-1)[None]))
    np.testing.assert_allclose(out[:, pad[0] : pad[0] + T], mixer(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out[:, [0, 1] if pad == left else [7, 8]], 0.0)


def test_gradients_are_those_of_finite_differences():
  with jax.enable_x64(True):
    graph, params = nnx.split(make(sharing="none"))
    params = jax.tree.map(lambda p: p.astype(float), params)
    loss = jax.jit(lambda p: jnp.sin(nnx.merge(graph, p)(X, context=CONTEXT)).sum())
    move = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape)), params)
    at = lambda h: loss(jax.tree.map(lambda p, d: p + h * d, params, move))
    slopes = jax.tree.map(lambda g, d: (g * d).sum(), jax.grad(loss)(params), move)
    np.testing.assert_allclose(sum(jax.tree.leaves(slopes)), (at(1e-6) - at(-1e-6)) / 2e-6, 1e-6)


def test_its_matrix_is_the_weights_of_rows_times_what_rows_are_made_of():
  mixer = make(sharing="none")
  weights, f = matrices(mixer, X, X)
  matrix = implicit_attention(mixer, jnp.asarray(X, jnp.float32))
  np.testing.assert_allclose(
    matrix, np.einsum("bntr,nsr->bnts", weights, np.repeat(f, N // K, 0)), rtol=1e-4, atol=1e-5
  )


def test_queries_do_not_mix_and_the_order_of_keys_matters():
  mixer, x, context = make(), X.astype(np.float32), CONTEXT.astype(np.float32)
  whole = mixer(x, context=context)
  np.testing.assert_allclose(mixer(x[:, ::-1], context=context)[:, ::-1], whole, rtol=1e-5)
  assert not np.allclose(mixer(x, context=context[:, ::-1]), whole, atol=1e-3)


def test_what_it_cannot_do_is_refused():
  x = X.astype(np.float32)
  late = Tokens.of_length(T, offset=10)
  packed = Tokens(index=late.index, position=late.index, segment=late.index // 4)
  for match, call in (
    ("expected at most length=6", lambda: make(length=6)(x)),
    ("position 16 has no row", lambda: make()(x, tokens=late)),
    ("give one to a row", lambda: make()(x, tokens=packed)),
    ("must be known", lambda: jax.eval_shape(lambda tokens: make()(x, tokens=tokens), packed)),
    ("several mixers", lambda: make(sharing="layer")),
  ):
    with pytest.raises((ValueError, NotImplementedError), match=match):
      call()
