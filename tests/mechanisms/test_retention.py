"""Retention: decays, rotations, and the row normalisations of the official code."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers import retention
from attnx.mechanisms.mixers.retention import NORMALISATIONS, Retention

B, T, D, N = 2, 11, 16, 2
X = np.random.default_rng(0).normal(size=(B, T, D))


def make(**options):
  return Retention(D, num_heads=N, rngs=nnx.Rngs(0), **options)


def turned(x, t):
  """(B, N, H) at place t, in pairs of channel j and j + H/2."""
  half = x.shape[-1] // 2
  angle = t * 10_000.0 ** (-np.arange(half) / (half - 1))
  a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def projected(mixer, x):
  heads = lambda p: jnp.einsum("btd,dnh->tbnh", x, p.kernel[...].astype(x.dtype))
  q, k = ([turned(y, t) for t, y in enumerate(heads(p))] for p in (mixer.query, mixer.key))
  return jnp.stack(q), jnp.stack(k) * 8**-0.5, heads(mixer.value), heads(mixer.gate)


def naive(mixer, x, epsilon=1e-6):
  """Token by token, in the precision of x."""
  q, k, v, gate = projected(mixer, x)
  gamma = (1 - 2.0 ** -(5 + np.arange(N)))[:, None, None]
  state, rows = 0.0, []
  for t in range(x.shape[1]):
    state = gamma * state + k[t][..., None] * v[t][..., None, :]
    o = jnp.einsum("bnh,bnhv->bnv", q[t], state)
    o = o / jnp.sqrt(jnp.mean(o * o, -1, keepdims=True) + epsilon)
    out = mixer.out.kernel[...].astype(x.dtype)
    rows.append(jnp.einsum("bnv,nvd->bd", o * jax.nn.silu(gate[t]), out))
  return jnp.stack(rows, 1)


def test_values_and_gradients_are_those_of_the_recurrence():
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(), nnx.Param, ...)
    f = lambda p, x: jnp.cos(nnx.merge(graph, p, rest)(x)).sum()
    g = lambda p, x: jnp.cos(naive(nnx.merge(graph, p, rest), x)).sum()
    x = jnp.asarray(X)
    np.testing.assert_allclose(make()(x), naive(make(), x), rtol=1e-9, atol=1e-11)
    actual, expected = (jax.jit(jax.grad(h, (0, 1)))(params, x) for h in (f, g))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(NORMALISATIONS))
def test_every_normalisation_is_plain_retention_after_a_norm_without_epsilon(name, monkeypatch):
  monkeypatch.setattr(retention, "CHUNK", 4)
  with jax.enable_x64(True):
    x = jnp.asarray(30 * X)  # large enough for every clip to matter
    mixers = [make(normalisation=n, epsilon=0.0) for n in (name, "plain")]
    np.testing.assert_allclose(*(m(x) for m in mixers), rtol=1e-9, atol=1e-11)
    heads = [m.mix(x, m.values(x)) for m in mixers]
    assert np.allclose(*heads) == (name == "plain")


def test_divisors_are_those_of_the_official_forms(monkeypatch):
  monkeypatch.setattr(retention, "CHUNK", C := 4)
  with jax.enable_x64(True):
    x = jnp.asarray(30 * X)
    q, k, v, _ = map(np.asarray, projected(make(), x))
    gamma = (1 - 2.0 ** -(5 + np.arange(N)))[:, None, None]
    D_ts = gamma ** np.maximum(np.arange(T)[:, None] - np.arange(T), 0) * np.tri(T)
    scores = np.einsum("tbnh,sbnh->bnts", q, k)
    R = scores * D_ts / np.sqrt(D_ts.sum(-1, keepdims=True))
    expected = {"recurrent": np.einsum("bnts,sbnv->btnv", R, v)}
    R = R / np.clip(np.abs(R).sum(-1, keepdims=True), 1, 5e4)
    expected["parallel"] = np.einsum("bnts,sbnv->btnv", R, v)
    l_sum, state, out = (gamma ** np.arange(C)).sum(-1, keepdims=True), 0.0 * v[0, ..., None, :], []
    for a in range(0, T, C):
      i, n = slice(a, min(a + C, T)), min(C, T - a)
      M = D_ts[:, :n, :n]
      sc = np.sqrt(M.sum(-1, keepdims=True))
      R = scores[:, :, i, i] * M / sc
      inner_scale = np.maximum(np.abs(R).sum(-1, keepdims=True), 1)
      sigma = np.maximum(np.abs(state).sum(-2).max(-1), 1)[..., None, None]
      total = np.maximum(inner_scale, sigma)
      cross = np.einsum("tbnh,bnhv->bntv", q[i], state / sigma)
      cross = cross * gamma ** (1 + np.arange(n))[:, None] * l_sum / sc
      inner = np.einsum("bnts,sbnv->bntv", R, v[i]) / inner_scale
      out.append(np.swapaxes(inner * inner_scale / total + cross * sigma / total, 1, 2))
      fresh = np.einsum("sbnh,sbnv,ns->bnhv", k[i], v[i], gamma[:, 0] ** np.arange(C)[::-1][:n])
      state = gamma**C * state + fresh / l_sum
    expected["chunkwise"] = np.concatenate(out, 1)
    for name, heads in expected.items():
      mixer = make(normalisation=name)
      np.testing.assert_allclose(mixer.mix(x, mixer.values(x)), heads, rtol=1e-9, err_msg=name)


def test_only_distances_between_tokens_matter():
  x = jnp.asarray(X, jnp.float32)
  moved = make()(x, tokens=Tokens.of_length(T, offset=300))
  np.testing.assert_allclose(moved, make()(x), rtol=2e-3, atol=2e-4)


def test_the_recurrent_normalisation_streams_and_the_others_say_that_they_do_not():
  mixer, x = make(normalisation="recurrent"), jnp.asarray(X, jnp.float32)
  cache, outs = mixer.init_cache(B, T), []
  for piece in jnp.split(x, [1, 5], axis=1):
    y, cache = mixer.step(piece, cache)
    outs.append(y)
  np.testing.assert_allclose(jnp.concatenate(outs, 1), mixer(x), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(cache.past["mass"][0, 0, 0], sum((31 / 32) ** np.arange(T)), 1e-5)
  for name in ("parallel", "chunkwise"):
    with pytest.raises(NotImplementedError, match="recurrent"):
      make(normalisation=name).step(x, cache)
