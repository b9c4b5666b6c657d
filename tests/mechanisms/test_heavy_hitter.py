"""Heavy hitters: greedy eviction by the weight that a key has received."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, masks, reference
from attnx.core.tokens import Tokens
from attnx.mechanisms.caches.full import Full
from attnx.mechanisms.caches.heavy_hitter import HeavyHitter
from attnx.mechanisms.normalisers.relu import ReLU
from attnx.mechanisms.positions.rope import Rope

B, T, N, K, H = 2, 11, 4, 2, 6
RNG = np.random.default_rng(0)
QKV = [2 * RNG.normal(size=(B, T, n, H)) for n in (N, K, K)]
CAUSAL, ROPE = AttentionSpec(masks.Causal()), Rope()


@functools.partial(jax.jit, static_argnames="cuts")
def attended(qkv, cuts, cache, spec=CAUSAL):
  heads, options = [], dict(spec=spec, position=ROPE, implementation="reference")
  for a, b in zip(cuts, cuts[1:]):
    q, k, v = (x[:, a:b] for x in qkv)
    y, cache = cache.attend(q, k, v, cache.next(b - a), **options)
    heads.append(y)
  return jnp.concatenate(heads, 1), cache


def empty(heavy, recent, dtype="float32"):
  return HeavyHitter(heavy, recent, dtype).empty(B, T, K, H, H)


def greedy(q, k, v, heavy, recent):
  """Every row and key head apart, one token after the other; who was kept after each, {j: mass}."""
  at = np.arange(T)[None]
  q, k = np.asarray(ROPE.query(q, at)).reshape(B, T, K, -1, H), np.asarray(ROPE.key(k, at))
  out, kept = np.zeros((B, T, K, N // K, H)), {}
  for b, h in np.ndindex(B, K):
    mass = {}
    for t in range(T):
      mass[t] = 0.0
      seen = sorted(mass)
      for g in range(N // K):
        w = np.exp(k[b, seen, h] @ q[b, t, h, g] / H**0.5)
        w /= w.sum()
        out[b, t, h, g] = w @ v[b, seen, h]
        for j, share in zip(seen, w):
          mass[j] += share
      if len(mass) > heavy + recent:
        del mass[min((j for j in mass if j <= t - recent), key=lambda j: (mass[j], j))]
      kept[b, h, t] = dict(mass)
  return out.reshape(B, T, N, H), kept


@pytest.mark.parametrize("heavy, recent", [(2, 3), (3, 0), (0, 4), (4, T)])
def test_outputs_masses_and_survivors_are_those_of_the_greedy_loop(heavy, recent):
  with jax.enable_x64(True):
    expected, kept = greedy(*map(jnp.asarray, QKV), heavy, recent)
    for cuts in ((0, T), (0, 4, 7, 8, T)):
      out, cache = attended([*map(jnp.asarray, QKV)], cuts, empty(heavy, recent, "float64"))
      np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)
      for b, h in np.ndindex(B, K):
        held = np.flatnonzero(cache.position[b, h] >= 0)
        actual = dict(zip(cache.position[b, h, held].tolist(), cache.mass[b, h, held]))
        assert actual.keys() == kept[b, h, T - 1].keys()
        for j, mass in actual.items():
          np.testing.assert_allclose(mass, kept[b, h, T - 1][j], rtol=1e-5)


def test_gradients_are_those_of_a_mask_over_the_keys_that_were_kept():
  with jax.enable_x64(True):
    _, kept = greedy(*map(jnp.asarray, QKV), 2, 3)
    visible = np.zeros((B, N, T, T), bool)
    for b, n, t in np.ndindex(B, N, T):
      before = kept[b, n // (N // K), t - 1] if t else {}
      visible[b, n, t, [*before, t]] = True
    where, spec = Tokens.of_length(T), AttentionSpec(masks.Dense(jnp.asarray(visible)))

    def dense(q, k, v):
      q, k = ROPE.query(q, where.position), ROPE.key(k, where.position)
      return spec.finish(reference.partial(q, k, v, spec, where, where))

    stepped = lambda *qkv: attended(qkv, (0, 7, 8, T), empty(2, 3, "float64"))[0]
    qkv = [*map(jnp.asarray, QKV)]
    grads = [
      jax.jit(jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2)))(*qkv) for f in (stepped, dense)
    ]
    for actual, expected in zip(*grads):
      np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10)


def test_with_room_for_all_it_is_the_full_cache_and_masses_are_column_sums():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  out, cache = attended(qkv, (0, 6, 7, T), empty(4, T - 4))
  full = Full().empty(B, T, K, H, H)
  np.testing.assert_allclose(out, attended(qkv, (0, T), full)[0], rtol=1e-4, atol=1e-5)
  where = Tokens.of_length(T)
  q, k = ROPE.query(qkv[0], where.position), ROPE.key(qkv[1], where.position)
  columns = reference.weights(q, k, CAUSAL, where, where).reshape(B, K, -1, T).sum(2)
  np.testing.assert_allclose(cache.mass, columns, rtol=1e-4, atol=1e-5)


def test_on_a_tie_the_oldest_goes():
  q, k, v = (jnp.asarray(abs(x), jnp.float32) for x in QKV)
  spec = AttentionSpec(masks.Causal(), normaliser=ReLU())
  _, cache = attended((0 * q, k, v), (0, 6, T), empty(2, 2), spec)  # nobody is looked at
  np.testing.assert_array_equal(np.sort(cache.position), np.tile(np.arange(T - 4, T), (B, K, 1)))


def test_a_key_that_all_queries_look_at_stays_and_heads_choose_for_themselves():
  q, k, v = (jnp.asarray(x, jnp.float32) for x in QKV)
  axis = jnp.zeros(H).at[H // 2 - 1].set(30.0)  # the pair that turns slowest
  k = k.at[:, 1, 0].set(axis).at[:, 2, 1].set(axis)
  _, cache = attended((q + axis, k, v), (0, 5, 6, T), empty(1, 2))
  kept = np.sort(cache.position)
  np.testing.assert_array_equal(kept, [[[1, T - 2, T - 1], [2, T - 2, T - 1]]] * B)
