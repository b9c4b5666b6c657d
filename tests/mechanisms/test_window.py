"""The windowed cache: a ring of slots under a sliding window."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, masks
from attnx.mechanisms.caches.full import Full
from attnx.mechanisms.caches.window import Window
from attnx.mechanisms.positions.rope import Rope

B, T, N, K, H = 2, 11, 4, 2, 6
ROPE = Rope()
RNG = np.random.default_rng(0)
QKV = [RNG.normal(size=(B, T, n, H)) for n in (N, K, K)]


@functools.partial(jax.jit, static_argnames="cuts")
def attended(qkv, cuts, cache, mask):
  heads, spec = [], AttentionSpec(mask)
  for a, b in zip(cuts, cuts[1:]):
    q, k, v = (x[:, a:b] for x in qkv)
    options = dict(spec=spec, position=ROPE, implementation="reference")
    y, cache = cache.attend(q, k, v, cache.next(b - a), **options)
    heads.append(y)
  return jnp.concatenate(heads, 1), cache


def banded(q, k, v, window):
  """Each query over the last `window` keys of a list."""
  at = np.arange(T)[None]
  q, k = ROPE.query(q, at).reshape(B, T, K, N // K, H), ROPE.key(k, at)
  rows = []
  for t in range(T):
    kept = slice(max(t - window + 1, 0), t + 1)
    w = jax.nn.softmax(jnp.einsum("bkgh,bskh->bkgs", q[:, t], k[:, kept]) / H**0.5)
    rows.append(jnp.einsum("bkgs,bskv->bkgv", w, v[:, kept]).reshape(B, N, H))
  return jnp.stack(rows, 1)


@pytest.mark.parametrize("window", [3, T])
def test_values_and_gradients_are_those_of_the_band(window):
  with jax.enable_x64(True):
    qkv = [jnp.asarray(x) for x in QKV]
    empty = Window(window, dtype="float64").empty(B, T, K, H, H)
    f = lambda *x: attended(x, (0, 5, 6, 9, T), empty, masks.Window(window - 1))[0]
    g = lambda *x: banded(*x, window)
    np.testing.assert_allclose(f(*qkv), g(*qkv), rtol=1e-10, atol=1e-12)
    grads = [jax.jit(jax.grad(lambda *x: jnp.sin(h(*x)).sum(), (0, 1, 2)))(*qkv) for h in (f, g)]
    for actual, expected in zip(*grads):
      np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


def test_a_window_of_one_returns_the_value():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  out, _ = attended(qkv, tuple(range(T + 1)), Window(1).empty(B, T, K, H, H), masks.Window(0))
  np.testing.assert_allclose(out, np.repeat(qkv[2], N // K, axis=2), rtol=1e-6)


def test_slots_are_a_ring():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  for cuts in ((0, T), tuple(range(T + 1))):
    _, cache = attended(qkv, cuts, Window(4).empty(B, T, K, H, H), masks.Window(3))
    np.testing.assert_array_equal(cache.position, [[8, 9, 10, 7]] * B)
    np.testing.assert_array_equal(cache.value, qkv[2][:, [8, 9, 10, 7]])


def test_the_window_of_the_mask_less_one_is_enough_to_keep():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  run = lambda size: attended(
    qkv, (0, 2, 3, 7, *range(8, T + 1)), Window(size).empty(B, T, K, H, H), masks.Window(3)
  )[0]
  np.testing.assert_allclose(run(3), run(4), rtol=1e-5, atol=1e-6)
  assert not np.allclose(run(2), run(4), atol=1e-3)


def test_a_mask_that_reaches_further_sees_the_size_and_its_own_step():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  out, _ = attended(qkv, tuple(range(T + 1)), Window(3).empty(B, T, K, H, H), masks.Causal())
  full = Full().empty(B, T, K, H, H)
  expected, _ = attended(qkv, tuple(range(T + 1)), full, masks.Window(3))
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
