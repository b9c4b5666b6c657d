"""CoCA: a dot product that equals the paper's key of a pair of tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, attend
from attnx.mechanisms.positions.coca import CoCA

B, T, S, N, H = 2, 5, 6, 2, 8
RNG = np.random.default_rng(0)
Q, K = RNG.normal(size=(B, T, N, H)), RNG.normal(size=(B, S, N, H))
Q_AT, K_AT = np.array([[4, 9, 10, 33, 50]]), np.arange(S)[None] * 7


def pairwise(q, k):
  """Scores with the key of the paper, K_ns = q_n * [tau_s; tau_s], rotated as rope rotates."""
  half = H // 2
  w = 10_000.0 ** (-2 * jnp.arange(half) / H)
  tau = jnp.maximum((k[..., :half] + k[..., half:]) / 2, 0)
  own = q[:, :, None] * jnp.concatenate([tau, tau], -1)[:, None]  # (B, T, S, N, H)
  a, b = (x[..., :half] + 1j * x[..., half:] for x in (q[:, :, None], own))
  far = (Q_AT[0][:, None] - K_AT[0][None])[None, :, :, None, None]
  return (a * b.conj() * jnp.exp(1j * far * w)).real.sum(-1).transpose(0, 3, 1, 2)


def scores(q, k):
  coca = CoCA()
  return jnp.einsum("btnh,bsnh->bnts", coca.query(q, Q_AT), coca.key(k, K_AT))


def test_scores_and_gradients_are_those_of_keys_of_pairs():
  with jax.enable_x64(True):
    np.testing.assert_allclose(scores(Q, K), pairwise(Q, K), rtol=1e-9, atol=1e-9)
    actual, expected = (
      jax.grad(lambda q, k: jnp.sin(f(q, k)).sum(), argnums=(0, 1))(jnp.asarray(Q), jnp.asarray(K))
      for f in (scores, pairwise)
    )
    for x, y in zip(actual, expected, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-8)


def test_every_plane_is_largest_where_query_and_key_meet():
  coca, q = CoCA(), jnp.asarray(Q[:1, :1], jnp.float32)
  k = jnp.broadcast_to(jnp.asarray(K[:1, :1], jnp.float32), (1, 9, N, H))
  a, b = coca.query(q, np.full((1, 1), 4)), coca.key(k, np.arange(9)[None])
  planes = (a * b).reshape(9, N, 2, H // 2).sum(2)
  assert (planes[4] >= planes.max(0) - 1e-6).all() and (planes[4] >= 0).all()


def test_negative_keys_are_inert():
  k = -np.abs(K)
  np.testing.assert_array_equal(scores(Q.astype(np.float32), k.astype(np.float32)), 0.0)
  grad = jax.grad(lambda k: scores(Q.astype(np.float32), k).sum())(jnp.asarray(k, jnp.float32))
  np.testing.assert_array_equal(grad, 0.0)


def test_attention_runs_on_it_as_on_any_queries_and_keys():
  coca, q, k = CoCA(), Q.astype(np.float32), K.astype(np.float32)
  v = RNG.normal(size=(B, S, N, 3)).astype(np.float32)
  out = attend(coca.query(q, Q_AT), coca.key(k, K_AT), v, AttentionSpec())
  weights = jax.nn.softmax(pairwise(q, k) / np.sqrt(H), axis=-1)
  expected = np.einsum("bnts,bsnv->btnv", weights, v)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
