"""Sinks: the first tokens and the last, at positions of the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, masks
from attnx.mechanisms.caches.full import Full
from attnx.mechanisms.caches.sinks import Sinks
from attnx.mechanisms.caches.window import Window
from attnx.mechanisms.positions.rope import Rope
from attnx.mechanisms.transforms.alibi import Alibi
from attnx.nn.position import Position

B, T, N, K, H = 2, 12, 4, 2, 6
RNG = np.random.default_rng(0)
QKV = [RNG.normal(size=(B, T, n, H)) for n in (N, K, K)]
CAUSAL, PLAIN, ROPE = AttentionSpec(masks.Causal()), Position(), Rope()


@functools.partial(jax.jit, static_argnames=("cuts", "position"))
def attended(qkv, cuts, cache, spec=CAUSAL, position=ROPE):
  heads, options = [], dict(spec=spec, position=position, implementation="reference")
  for a, b in zip(cuts, cuts[1:]):
    q, k, v = (x[:, a:b] for x in qkv)
    y, cache = cache.attend(q, k, v, cache.next(b - a), **options)
    heads.append(y)
  return jnp.concatenate(heads, 1), cache


def streaming(q, k, v, start, recent, position, slopes=np.zeros(N)):
  """The paper's loop: evict, then rotate what is left by its place in the list."""
  kept, rows = [], []
  for t in range(T):
    kept.append(t)
    if len(kept) > start + recent:
      del kept[start]
    at = np.arange(len(kept))[None]
    query = position.query(q[:, t : t + 1], at[:, -1:]).reshape(B, K, N // K, H)
    scores = jnp.einsum("bkgh,bskh->bkgs", query, position.key(k[:, np.array(kept)], at)) / H**0.5
    scores = scores - slopes.reshape(K, -1, 1) * (len(kept) - 1 - at[0])
    out = jnp.einsum("bkgs,bskv->bkgv", jax.nn.softmax(scores), v[:, np.array(kept)])
    rows.append(out.reshape(B, N, H))
  return jnp.stack(rows, 1)


class Uneven(Position):
  """Positions that are not relative: every place must be right, not only distances."""

  def query(self, x, position):
    return x * (1 + position[..., None, None].astype(x.dtype) / 10)

  def key(self, x, position):
    return x * jnp.cos(position[..., None, None].astype(x.dtype))


@pytest.mark.parametrize("cuts", [(0, T), (0, 4, 7, 8, 9, T)])
@pytest.mark.parametrize("position", [ROPE, Uneven()], ids=["rope", "uneven"])
def test_values_and_gradients_are_those_of_the_loop(cuts, position):
  with jax.enable_x64(True):
    qkv = [jnp.asarray(x) for x in QKV]
    empty = Sinks(2, 3, dtype="float64").empty(B, T, K, H, H)
    f = jax.jit(lambda *x: attended(x, cuts, empty, position=position)[0])
    g = jax.jit(lambda *x: streaming(*x, 2, 3, position))
    np.testing.assert_allclose(f(*qkv), g(*qkv), rtol=1e-10, atol=1e-12)
    grads = [jax.jit(jax.grad(lambda *x: jnp.sin(h(*x)).sum(), (0, 1, 2)))(*qkv) for h in (f, g)]
    for actual, expected in zip(*grads):
      np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


def test_transforms_see_places_in_the_cache():
  with jax.enable_x64(True):
    qkv = [jnp.asarray(x) for x in QKV]
    spec = AttentionSpec(masks.Causal(), (Alibi(N),))
    empty = Sinks(2, 3, dtype="float64").empty(B, T, K, H, H)
    out, _ = attended(qkv, (0, 7, 8, T), empty, spec, PLAIN)
    expected = streaming(*qkv, 2, 3, PLAIN, 2.0 ** (-8 * np.arange(1, N + 1) / N))
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)


def test_until_it_is_full_it_is_the_full_cache():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  out, _ = attended(qkv, (0, 5, 6, T), Sinks(4, T - 4).empty(B, T, K, H, H))
  expected, _ = attended(qkv, (0, T), Full().empty(B, T, K, H, H))
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_without_sinks_it_is_a_window():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  out, _ = attended(qkv, (0, 5, 6, T), Sinks(0, 4).empty(B, T, K, H, H))
  cache, spec = Window(4).empty(B, T, K, H, H), AttentionSpec(masks.Window(3))
  np.testing.assert_allclose(out, attended(qkv, (0, T), cache, spec)[0], rtol=1e-4, atol=1e-5)


def test_places_are_ranks_however_long_the_stream():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  cache = Sinks(2, 3).empty(B, T, K, H, H)
  for t in range(T):
    _, cache = attended([x[:, t : t + 1] for x in qkv], (0, 1), cache)
    held = np.flatnonzero(cache.position[0] >= 0)
    order = held[np.argsort(cache.position[0, held])]
    expected = [*range(min(t + 1, 2)), *range(max(2, t - 2), t + 1)]
    np.testing.assert_array_equal(cache.position[0, order], expected)
    np.testing.assert_array_equal(cache.ranks()[0, order], np.arange(len(held)))
  assert cache.room == 5
