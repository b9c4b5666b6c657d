"""The learned sink."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from specs import N, assert_close, in_pieces, inputs, instance, packed, weights_of, wide

from attnx.attention import AttentionSpec, attend
from attnx.core import registry

SINK = instance("normalisers", "sink")


def with_logit(value: float):
  return dataclasses.replace(SINK, logit=jnp.full(N, value))


def test_it_starts_as_softmax_plus_one():
  start = registry.build("normalisers", "sink", num_heads=N)
  scores = np.random.default_rng(0).standard_normal((N, 2, 5)).astype(np.float32)
  expected = np.exp(scores) / (1 + np.exp(scores).sum(-1, keepdims=True))
  np.testing.assert_allclose(weights_of(start, scores), expected, rtol=1e-5)
  assert start.logit.dtype == jnp.float32


def test_it_is_one_more_key_with_a_value_of_zero_in_value_and_gradient():

  def as_key(logit):
    spread = lambda x: jnp.repeat(x, 2, axis=2)
    scores = jnp.einsum("btnh,bsnh->btns", q, spread(k)) * 8**-0.5
    first = jnp.broadcast_to(logit[:, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([first, scores], -1))[..., 1:]
    return jnp.einsum("btns,bsnv->btnv", weights, spread(v))

  with jax.enable_x64(True):
    q, k, v = inputs()
    logit = jnp.asarray(SINK.logit, jnp.float64)
    actual = lambda b: attend(q, k, v, AttentionSpec(normaliser=type(SINK)(b)))
    np.testing.assert_allclose(actual(logit), as_key(logit), rtol=1e-10)
    grads = [jax.grad(lambda b: jnp.cos(f(b)).sum())(logit) for f in (actual, as_key)]
    np.testing.assert_allclose(*grads, rtol=1e-10)


def test_it_is_counted_once_however_the_keys_are_split():
  with jax.enable_x64(True):
    of = wide(AttentionSpec(normaliser=SINK)), inputs(), packed(7), packed(11)
    assert_close(in_pieces(*of, (0, 1, 2, 5, 11)), in_pieces(*of, (0, 11)), rtol=1e-9, atol=1e-10)


def test_a_sink_of_minus_infinity_is_softmax_and_a_huge_one_takes_everything():
  q, k, v = inputs(dtype=np.float32)
  for low in (-1e9, -np.inf):
    out = attend(q, k, v, AttentionSpec(normaliser=with_logit(low)))
    np.testing.assert_allclose(out, attend(q, k, v), rtol=1e-6)
  assert not attend(q, k, v, AttentionSpec(normaliser=with_logit(1e9))).any()


def test_a_row_that_sees_nothing_moves_no_sink():
  visible = np.zeros((N, 2, 5), bool)
  grad = jax.grad(lambda s: jnp.sum(weights_of(s, jnp.ones((N, 2, 5)), visible)))(with_logit(80.0))
  np.testing.assert_array_equal(grad.logit, 0)
