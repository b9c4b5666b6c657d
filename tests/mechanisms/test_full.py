"""The full cache: what was seen stays, as it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, masks
from attnx.core.tokens import Tokens
from attnx.mechanisms.caches.full import Full
from attnx.mechanisms.positions.rope import Rope
from attnx.nn.position import Position

B, T, N, K, H, V = 2, 9, 4, 2, 6, 5
RNG = np.random.default_rng(0)
QKV = [RNG.normal(size=(B, T, *size)) for size in ((N, H), (K, H), (K, V))]
SPEC, PLAIN, ROPE = AttentionSpec(masks.Causal()), Position(), Rope()


@functools.partial(jax.jit, static_argnames=("cuts", "position"))
def attended(qkv, cuts, cache, position=PLAIN):
  heads, options = [], dict(spec=SPEC, position=position, implementation="reference")
  for a, b in zip(cuts, cuts[1:]):
    q, k, v = (x[:, a:b] for x in qkv)
    y, cache = cache.attend(q, k, v, cache.next(b - a), **options)
    heads.append(y)
  return jnp.concatenate(heads, 1), cache


def naive(q, k, v):
  """A growing list of keys and values, each query in turn."""
  q = q.reshape(B, T, K, N // K, H)
  rows = []
  for t in range(T):
    w = jax.nn.softmax(jnp.einsum("bkgh,bskh->bkgs", q[:, t], k[:, : t + 1]) / H**0.5)
    rows.append(jnp.einsum("bkgs,bskv->bkgv", w, v[:, : t + 1]).reshape(B, N, V))
  return jnp.stack(rows, 1)


def test_values_and_gradients_are_those_of_a_growing_list():
  at = np.arange(T)[None]
  with jax.enable_x64(True):
    qkv = [jnp.asarray(x) for x in QKV]
    turned = lambda q, k, v: (ROPE.query(q, at), ROPE.key(k, at), v)
    empty = Full(dtype="float64").empty(B, T, K, H, V)
    f = lambda *qkv: attended(qkv, (0, 4, 5, 6, T), empty, ROPE)[0]
    g = lambda *qkv: naive(*turned(*qkv))
    np.testing.assert_allclose(f(*qkv), g(*qkv), rtol=1e-10, atol=1e-12)
    grads = [jax.jit(jax.grad(lambda *x: jnp.sin(h(*x)).sum(), (0, 1, 2)))(*qkv) for h in (f, g)]
    for actual, expected in zip(*grads):
      np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


def test_a_token_writes_one_slot_and_touches_no_other():
  qkv = [jnp.asarray(x, jnp.float32) for x in QKV]
  _, before = attended(qkv, (0, 4), Full().empty(B, T, K, H, V))
  _, after = attended([x[:, 4:] for x in qkv], (0, 1), before)
  for old, new in ((before.key, after.key), (before.value, after.value)):
    others = np.arange(T) != 4
    np.testing.assert_array_equal(old[:, others], new[:, others])
    assert (old[:, 4] == 0).all() and (new[:, 4] != 0).all()


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_a_token_takes_2_K_H_numbers(dtype, width):
  taken = lambda length: sum(
    x.nbytes for x in jax.tree.leaves(Full(dtype=dtype).empty(1, length, K, H, H).kept()[:2])
  )
  assert taken(11) - taken(10) == 2 * K * H * width


def test_only_the_row_that_runs_over_is_lost():
  q, k, v = (jnp.asarray(x[:, :1], jnp.float32) for x in QKV)
  cache = Full().empty(B, 4, K, H, V)
  position = np.array([[3], [4]], np.int32)
  tokens = Tokens(position, position, np.zeros_like(position))
  heads, cache = cache.attend(q, k, v, tokens, spec=SPEC, position=PLAIN)
  assert np.isfinite(heads[0]).all() and np.isnan(heads[1]).all()
  np.testing.assert_array_equal(cache.seen, [4, 5])
