"""Pages: the table is all that ties a row to its tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, masks
from attnx.core.tokens import Tokens
from attnx.mechanisms.caches.full import Full
from attnx.mechanisms.caches.paged import Paged
from attnx.nn.position import Position

B, T, N, K, H, P = 3, 12, 4, 2, 6, 4
RNG = np.random.default_rng(0)
SPEC, PLAIN = AttentionSpec(masks.Causal()), Position()


@jax.jit
def step(cache, x, tokens):
  """One step of keys, values and queries made of x (B, t, H)."""
  q, k, v = (jnp.repeat(f(x)[:, :, None], n, 2) for f, n in ((jnp.sin, N), (jnp.cos, K), (abs, K)))
  return cache.attend(q, k, v, tokens, spec=SPEC, position=PLAIN, implementation="reference")


def text(t, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(B, t, H)), jnp.float32)


def at(cache, counts):
  """Tokens of rows that each get `counts` more, padded on the left."""
  t = max(counts)
  ahead = np.arange(t) - (t - np.array(counts)[:, None])
  position = jnp.where(ahead >= 0, cache.seen[:, None] + ahead, -1).astype(jnp.int32)
  return Tokens(jnp.maximum(position, 0), position, jnp.zeros_like(position))


def pages_of(cache):
  return [sorted(row[row < cache.position.shape[0]].tolist()) for row in np.asarray(cache.table)]


@pytest.mark.parametrize("counts", [(0, 1, P - 1), (P, P + 1, 3 * P), (1, 0, 2)])
def test_rows_take_the_pages_that_their_lengths_need_and_match_a_full_cache(counts):
  paged, full = (c.empty(B, T, K, H, H) for c in (Paged(P, pages=7), Full()))
  for seed, more in enumerate((counts, (1, 1, 0))):
    more = np.minimum(more, T - np.asarray(paged.seen))
    y, paged = step(paged, text(max(more), seed), at(paged, more))
    expected, full = step(full, text(max(more), seed), at(full, more))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  assert list(map(len, pages := pages_of(paged))) == [-(-n // P) for n in paged.seen.tolist()]
  assert len(set(sum(pages, []))) == len(sum(pages, []))


def test_it_does_not_matter_where_pages_lie_or_what_free_ones_hold():
  cache = Paged(P, pages=9).empty(B, T, K, H, H)
  _, cache = step(cache, text(5), at(cache, (5, 3, 2)))
  order = np.random.default_rng(1).permutation(9)  # page i moves to order[i]
  back, table = np.argsort(order), jnp.asarray([*order, 9])[cache.table]
  free = ~np.isin(np.arange(9), table)
  pools = {name: getattr(cache, name)[back] for name in ("key", "value", "position", "segment")}
  pools = {name: x.at[free].set(1 if x.ndim == 2 else jnp.nan) for name, x in pools.items()}
  moved = dataclasses.replace(cache, **pools, table=table)
  for x in (text(3, 1), text(1, 2), text(2, 3)):
    expected, cache = step(cache, x, cache.next(x.shape[1]))
    y, moved = step(moved, x, moved.next(x.shape[1]))
    np.testing.assert_array_equal(y, expected)


def test_forks_share_pages_until_they_write_and_the_last_to_write_keeps_the_page():
  cache, full = (c.empty(B, T, K, H, H) for c in (Paged(P, pages=4), Full()))
  same = text(6).at[1:].set(text(6)[:1])
  _, cache = step(cache, same, at(cache, (6, 0, 0)))
  cache = jax.jit(type(cache).fork)(cache, jnp.zeros(B, jnp.int32))
  assert pages_of(cache) == [pages_of(cache)[0]] * B and len(pages_of(cache)[0]) == 2
  _, full = step(full, same, full.next(6))
  for x in (text(1, 1), text(1, 2)):
    y, cache = step(cache, x, cache.next(1))
    expected, full = step(full, x, full.next(1))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  assert len(set.intersection(*map(set, pages_of(cache)))) == 1  # the full one
  assert len(set(sum(pages_of(cache), []))) == 1 + B


def test_a_full_pool_gives_nan_until_the_row_is_released_and_freed_pages_serve_others():
  cache = Paged(P, pages=3).empty(B, T, K, H, H)
  _, cache = step(cache, text(4), at(cache, (4, 4, 3)))
  y, cache = step(cache, text(1, 1), at(cache, (1, 0, 1)))
  assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()
  cache = cache.release(jnp.array([False, True, False]))
  y, cache = step(cache, text(1, 2), at(cache, (1, 0, 1)))
  assert np.isnan(y[0]).all() and np.isfinite(y[2]).all()
  cache = cache.release(jnp.array([True, False, False]))
  y, cache = step(cache, text(2, 3), at(cache, (2, 0, 0)))
  expected, _ = step(fresh := Full().empty(B, T, K, H, H), text(2, 3), fresh.next(2))
  np.testing.assert_allclose(y[0], expected[0], rtol=1e-5, atol=1e-6)


def test_any_order_of_writing_forking_and_releasing_keeps_every_row_what_it_is():
  cache, rng = Paged(P, pages=7).empty(B, T, K, H, H), np.random.default_rng(3)
  held = [np.zeros((0, H), np.float32)] * B
  for n in range(40):
    gone, counts, x = np.array([len(h) > T - 2 for h in held]), rng.integers(0, 3, B), text(2, n)
    if (kind := rng.integers(3)) == 0:
      gone |= np.arange(B) == rng.integers(B)
    elif kind == 1:
      parents = rng.integers(0, B, B)
      cache, held = cache.fork(jnp.asarray(parents)), [held[i] for i in parents]
      gone = gone[parents]
    cache, held = cache.release(gone), [h[:0] if g else h for h, g in zip(held, gone)]
    counts[rng.integers(B)] = 2
    _, cache = step(cache, x, at(cache, counts))
    held = [np.concatenate([h, new[2 - c :]]) for h, new, c in zip(held, x, counts)]
    held = [h[:0] if lost else h for h, lost in zip(held, cache.lost)]
    key, _, where = (cache := cache.release(cache.lost)).kept()
    for i, h in enumerate(held):
      there = np.asarray(where.position[i]) >= 0
      np.testing.assert_allclose(key[i, there, 0], np.cos(h), rtol=1e-6)
      assert where.position[i, there].tolist() == list(range(len(h)))
