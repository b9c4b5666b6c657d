"""`dot_product_attention` agrees with `jax.nn`, and serves flax's `MultiHeadAttention`."""

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import dot_product_attention

B, T, S, N, K, H = 2, 6, 9, 4, 2, 8
CLOSE = dict(rtol=2e-5, atol=2e-6)


def arguments(*leading: int):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((T, N), (S, K), (S, K))
  return [jax.random.normal(key, (*leading, *s, H)) for key, s in zip(keys, shapes, strict=True)]


def bias(*shape: int):
  return jax.random.normal(jax.random.key(1), shape)


def visible():
  return jax.random.bernoulli(jax.random.key(2), 0.7, (B, 1, T, S)).at[..., 0].set(True)


CALLS = {
  "plain": lambda: {},
  "bias": lambda: dict(bias=bias(1, N, T, S)),
  "mask": lambda: dict(mask=visible()),
  "scale": lambda: dict(scale=0.3),
  "causal": lambda: dict(is_causal=True),
  "window": lambda: dict(local_window_size=(2, 4)),
  "both": lambda: dict(local_window_size=3, is_causal=True, bias=bias(B, 1, T, S)),
  "lengths": lambda: dict(
    query_seq_lengths=jnp.array([3, 6]), key_value_seq_lengths=jnp.array([5, 9])
  ),
}


@pytest.mark.parametrize("call", CALLS)
def test_agrees_with_jax(call):
  kwargs = CALLS[call]()
  actual = dot_product_attention(*arguments(B), **kwargs)
  np.testing.assert_allclose(actual, jax.nn.dot_product_attention(*arguments(B), **kwargs), **CLOSE)


def test_agrees_with_jax_without_a_batch():
  actual = dot_product_attention(*arguments(), bias(1, N, T, S), is_causal=True)
  expected = jax.nn.dot_product_attention(*arguments(), bias(1, N, T, S), is_causal=True)
  np.testing.assert_allclose(actual, expected, **CLOSE)


def test_the_bias_has_the_gradient_of_jax():
  grads = [
    jax.grad(lambda b, f=f: jnp.sin(f(*arguments(B), b, is_causal=True)).sum())(bias(1, N, T, S))
    for f in (dot_product_attention, jax.nn.dot_product_attention)
  ]
  np.testing.assert_allclose(*grads, **CLOSE)


def test_the_residual_is_the_log_sum_exp_and_has_a_gradient():
  q, k, v = arguments(B)

  def expected(q):
    scores = jnp.einsum("btnh,bsnh->btns", q, jnp.repeat(k, N // K, 2)) * H**-0.5
    return jax.nn.logsumexp(scores, -1)

  residual = lambda q: dot_product_attention(q, k, v, return_residual=True)[1]
  np.testing.assert_allclose(residual(q), expected(q), **CLOSE)
  actual = jax.grad(lambda q: jnp.sin(residual(q)).sum())(q)
  np.testing.assert_allclose(actual, jax.grad(lambda q: jnp.sin(expected(q)).sum())(q), **CLOSE)


def test_rows_that_see_nothing_are_zero():
  nothing = jnp.zeros((B, 1, T, S), bool)
  out, residual = dot_product_attention(*arguments(B), mask=nothing, return_residual=True)
  assert not out.any() and np.isneginf(residual).all()


def test_dropout_keeps_the_mean_and_is_shared_where_asked():
  q, k, _ = arguments(B)
  v = jnp.ones((B, S, K, 1))
  drop = lambda **kw: dot_product_attention(
    q, k, v, dropout_rng=jax.random.key(3), dropout_rate=0.5, **kw
  )
  assert 0.7 < drop().mean() < 1.3 and drop().std() > 0.1
  np.testing.assert_allclose(drop(deterministic=True), 1.0, **CLOSE)
  same = lambda x: x.at[:].set(x[:1])
  shared = dot_product_attention(
    same(q), same(k), v, dropout_rng=jax.random.key(3), dropout_rate=0.5, broadcast_dropout=True
  )
  np.testing.assert_array_equal(shared[0], shared[1])


@pytest.mark.parametrize("arguments_", [dict(precision="highest"), dict(module=nnx.Module)])
def test_what_it_cannot_honour_is_refused(arguments_):
  with pytest.raises(NotImplementedError, match="leave them out"):
    dot_product_attention(*arguments(B), **arguments_)


def test_serves_flax_nnx():
  make = lambda **kw: nnx.MultiHeadAttention(
    N, 16, decode=False, rngs=nnx.Rngs(0), **kw
  )
  x = jax.random.normal(jax.random.key(4), (B, T, 16))
  mask = nnx.make_causal_mask(jnp.ones((B, T)))
  actual = make(attention_fn=dot_product_attention)(x, mask=mask.astype(bool))
  np.testing.assert_allclose(actual, make()(x, mask=mask), **CLOSE)


def test_serves_flax_linen():
  x = jax.random.normal(jax.random.key(4), (B, T, 16))
  make = lambda **kw: linen.MultiHeadDotProductAttention(N, **kw)
  mask = linen.make_causal_mask(jnp.ones((B, T)), dtype=bool)
  params = make().init(jax.random.key(0), x)
  actual = make(attention_fn=dot_product_attention).apply(params, x, mask=mask)
  np.testing.assert_allclose(actual, make().apply(params, x, mask=mask), **CLOSE)
