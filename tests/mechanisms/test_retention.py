"""Retention: decays, rotations, and the row normalisations of the official code."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers import retention

B, T, D, N = 2, 11, 16, 2
X = np.random.default_rng(0).normal(size=(B, T, D))
make = lambda **options: retention.Retention(D, num_heads=N, rngs=nnx.Rngs(0), **options)


def turned(x, t):
  """(B, N, 8) at place t, in pairs of channel j and j + 4."""
  angle = t * 10_000.0 ** (-np.arange(4) / 3)
  a, b, cos, sin = x[..., :4], x[..., 4:], np.cos(angle), np.sin(angle)
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
    rows.append(o * jax.nn.silu(gate[t]))
  return jnp.einsum("tbnv,nvd->btd", jnp.stack(rows), mixer.out.kernel[...].astype(x.dtype))


def test_values_and_gradients_are_those_of_the_recurrence():
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(), nnx.Param, ...)
    f = lambda p, x: jnp.cos(nnx.merge(graph, p, rest)(x)).sum()
    g = lambda p, x: jnp.cos(naive(nnx.merge(graph, p, rest), x)).sum()
    x = jnp.asarray(X)
    np.testing.assert_allclose(make()(x), naive(make(), x), rtol=1e-9, atol=1e-11)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    jax.tree.map(close, *(jax.jit(jax.grad(h, (0, 1)))(params, x) for h in (f, g)))


@pytest.mark.parametrize("name", retention.NORMALISATIONS)
def test_every_normalisation_is_plain_retention_after_a_norm_without_epsilon(name, monkeypatch):
  monkeypatch.setattr(retention, "CHUNK", 4)
  with jax.enable_x64(True):
    x = jnp.asarray(30 * X)  # large enough for every clip to matter
    mixers = [make(normalisation=n, epsilon=0.0) for n in (name, "plain")]
    np.testing.assert_allclose(*(m(x) for m in mixers), rtol=1e-9, atol=1e-11)
    heads = [m.mix(x, m.values(x)) for m in mixers]
    assert np.allclose(*heads) == (name == "plain")
    if name not in retention.STREAMING:
      with pytest.raises(NotImplementedError, match="decode with 'recurrent'"):
        mixers[0].step(x, mixers[0].init_cache(B, T))


@pytest.mark.parametrize("size", [6, 30])  # rows that are clipped, and that are not
def test_divisors_are_those_of_the_paper_and_of_the_official_forms(size, monkeypatch):
  monkeypatch.setattr(retention, "CHUNK", C := 4)
  with jax.enable_x64(True):
    q, k, v, _ = map(np.asarray, projected(make(), x := jnp.asarray(size * X)))
    gamma = (1 - 2.0 ** -(5 + np.arange(N)))[:, None, None]
    D_ts = gamma ** np.maximum(np.arange(T)[:, None] - np.arange(T), 0) * np.tri(T)
    scores = np.einsum("tbnh,sbnh->bnts", q, k)
    read = lambda R: np.einsum("bnts,sbnv->btnv", R, v)
    most = lambda R: np.clip(np.abs(R).sum(-1, keepdims=True), 1, 5e4)
    R = scores * D_ts / np.sqrt(D_ts.sum(-1, keepdims=True))
    one, all_ = np.maximum(np.abs(R.sum(-1, keepdims=True)), 1), most(R)
    assert 0.1 < (one > 1).mean() < (all_ > 1).mean() and (one == 1).any()
    expected = dict(recurrent=read(R), absolute_sum=read(R / one), parallel=read(R / all_))
    l_sum, state, out = (gamma ** np.arange(C)).sum(-1, keepdims=True), np.zeros((B, N, 8, 16)), []
    for a in range(0, T, C):
      i, n = slice(a, a + C), min(C, T - a)
      R = scores[:, :, i, i] * D_ts[:, :n, :n] / (sc := np.sqrt(D_ts[:, :n, :n].sum(-1)[..., None]))
      sigma = np.maximum(np.abs(state).sum(-2).max(-1), 1)[..., None, None]
      faded = gamma ** (1 + np.arange(n))[:, None] * l_sum / sc
      cross = np.einsum("tbnh,bnhv->bntv", q[i], state / sigma) * faded
      inner = np.einsum("bnts,sbnv->bntv", R / most(R), v[i])
      out.append((inner * most(R) + cross * sigma) / np.maximum(most(R), sigma))
      fresh = np.einsum("sbnh,sbnv,ns->bnhv", k[i], v[i], gamma[:, 0] ** np.arange(C)[::-1][:n])
      state = gamma**C * state + fresh / l_sum
    expected["chunkwise"] = np.swapaxes(np.concatenate(out, 2), 1, 2)
    for name, heads in expected.items():
      mixer = make(normalisation=name)
      np.testing.assert_allclose(mixer.mix(x, mixer.values(x)), heads, rtol=1e-9, err_msg=name)


def test_only_distances_between_tokens_matter():
  mixer, x = make(), jnp.asarray(X, jnp.float32)
  there = Tokens.of_length(T, offset=300)
  np.testing.assert_allclose(mixer(x, tokens=there), mixer(x), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", retention.STREAMING)
def test_recurrent_chunkwise_and_parallel_forms_and_steps_agree(name):
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, L := 37, D)) * 10)
    place = np.r_[:9, : L - 9][None]  # two documents
    tokens = Tokens(index=np.arange(L)[None], position=place, segment=(np.arange(L) >= 9)[None] + 0)
    mixers = [make(normalisation=name, chunk=chunk) for chunk in (1, 4, 16, L)]
    heads = [jax.jit(lambda x, m=m: m.mix(x, m.values(x), tokens=tokens))(x) for m in mixers]
    np.testing.assert_allclose(jnp.stack(heads[1:]), 3 * [heads[0]], rtol=1e-10, atol=1e-12)
    expected, mixer = mixers[-1](x, tokens=tokens), mixers[1]
    cache = mixer.init_cache(B, L)
    for a, b in ((0, 1), (1, 8), (8, 15), (15, L)):
      y, cache = mixer.step(x[:, a:b], cache, tokens=tokens[a:b])
      np.testing.assert_allclose(y, expected[:, a:b], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mixer(x[:, 9:]), expected[:, 9:], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(cache.past["mass"][:, 0], sum((31 / 32) ** np.arange(L - 9)), 1e-10)
