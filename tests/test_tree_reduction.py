"""A butterfly of partials is an all-reduce and a fold, to the last bit the same on every device."""

import functools
import math
import re

import jax
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, attend, masks
from attnx.attention.partial import Partial, empty, merge
from attnx.core.tokens import Tokens
from attnx.sharded.tree import merge_tree, tree_attend

SHAPE = (2, 3, 4, 5)  # B, T, N, V
SIZES = (1, 2, 3, 5, 8)


def mesh(*sizes: int):
  names = ("keys",) if len(sizes) == 1 else ("node", "device")
  devices = jax.devices()[: math.prod(sizes)]
  return jax.make_mesh(sizes, names, (jax.sharding.AxisType.Auto,) * len(sizes), devices=devices)


def partials(size: int, dtype) -> Partial:
  """One for each device, (P, B, T, N, ..); the second has seen nothing, and no device some rows."""
  keys = jax.random.split(jax.random.key(size), 4)
  normal = lambda key, *shape: jax.random.normal(key, (size, *shape), dtype)
  x = Partial(
    out=normal(keys[0], *SHAPE),
    mass=1 + jnp.exp(normal(keys[1], *SHAPE[:-1])),
    peak=5 * normal(keys[2], *SHAPE[:-1]),
    count=jnp.floor(jnp.exp(normal(keys[3], *SHAPE[:-1]))),
  )
  seen = jnp.ones((size, *SHAPE[:-1]), bool).at[1:2].set(False).at[:, 0, 1].set(False)
  nothing = jax.tree.map(lambda y: jnp.broadcast_to(y, (size, *y.shape)), empty(SHAPE, dtype))
  pick = lambda a, b: jnp.where(seen.reshape(seen.shape + (1,) * (a.ndim - seen.ndim)), a, b)
  return jax.tree.map(pick, x, nothing)


def over(mesh_, reduction, axis_names=None):
  """What each device of the mesh has after the merge, (P, B, T, N, ..)."""
  names = mesh_.axis_names if axis_names is None else axis_names
  lift = lambda p: jax.tree.map(lambda x: x[None], p)
  each = P(mesh_.axis_names)
  return jax.shard_map(
    lambda p: lift(merge_tree(jax.tree.map(lambda x: x[0], p), names, reduction)),
    mesh=mesh_, in_specs=each, out_specs=each,
  )  # fmt: skip


def left_fold(p: Partial) -> Partial:
  each = [jax.tree.map(lambda x: x[i], p) for i in range(len(p.mass))]
  whole = functools.reduce(merge, each)
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(each), *x.shape)), whole)


def finished(run, p: Partial):
  """out / mass, mass and count on every device, and the gradient of a sum of them to out, mass."""

  def loss(out, mass):
    q = run(Partial(out=out, mass=mass, peak=p.peak, count=p.count))
    mean = q.out / jnp.where(q.mass > 0, q.mass, 1)[..., None]
    share = jnp.arange(1, 1 + len(mass)).reshape(-1, 1, 1, 1) / len(mass)  # unlike slopes
    return (share[..., None] * jnp.cos(mean)).sum() + (share * jnp.cos(q.mass / 9)).sum(), (mean, q)

  grads, (mean, q) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(p.out, p.mass)
  grads = grads[0], jnp.where(p.count > 0, grads[1], 0)  # what has seen nothing is in no unit
  return mean, q.mass, q.peak, q.count, grads


@pytest.mark.parametrize("dtype, close", [(jnp.float32, 1e-6), (jnp.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_butterfly_is_an_all_reduce_and_a_left_fold(size, dtype, close):
  with jax.enable_x64(dtype == jnp.float64):
    p = partials(size, dtype)
    actual = finished(over(mesh(size), "butterfly"), p)
    assert not any(np.any(np.isnan(x)) for x in jax.tree.leaves(actual))
    for other in (over(mesh(size), "all_reduce"), left_fold):
      expected = finished(other, p)
      for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x, y, rtol=close, atol=close)


@pytest.mark.parametrize("sizes", [(3,), (5,), (8,), (2, 4), (3, 2)], ids=str)
def test_every_device_ends_with_the_same_bits(sizes):
  p = partials(math.prod(sizes), jnp.float32)
  merged = jax.jit(over(mesh(*sizes), "butterfly"))(p)
  for x in jax.tree.leaves(merged):
    bits = np.asarray(x).view(np.uint32)
    assert (bits == bits[:1]).all() and np.any(bits)


@pytest.mark.parametrize("sizes", [(2, 4), (3, 2)], ids=str)
def test_axes_are_merged_one_after_the_other(sizes):
  p = partials(math.prod(sizes), jnp.float32)
  actual = finished(over(mesh(*sizes), "butterfly", ("device", "node")), p)
  for x, y in zip(*map(jax.tree.leaves, (actual, finished(left_fold, p))), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("sizes, rounds", [
  ((1,), 0), ((2,), 1), ((4,), 2), ((8,), 3), ((2, 4), 3), ((3,), 3), ((5,), 4), ((7,), 4),
], ids=str)  # fmt: skip
def test_a_round_is_one_message_and_rounds_are_logarithmic(sizes, rounds):
  p = partials(math.prod(sizes), jnp.float32)
  text = jax.jit(over(mesh(*sizes), "butterfly")).lower(p).compile().as_text()
  assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == rounds
  assert not re.search(r"all-reduce|all-gather|all-to-all|reduce-scatter", text)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_attention_by_butterfly_is_attention_in_value_and_gradients(size):
  keys = jax.random.split(jax.random.key(0), 3)
  qkv = tuple(jax.random.normal(k, (2, 24, n, 8)) for k, n in zip(keys, (4, 2, 2), strict=True))
  spec, where = AttentionSpec(masks.Causal()), Tokens.of_length(24)
  shard = P(None, "keys")
  run = jax.shard_map(
    lambda q, k, v, at: tree_attend(
      q, k, v, spec, q_tokens=where, k_tokens=at, axis_names="keys", reduction="butterfly"
    ),
    mesh=mesh(size), in_specs=(P(), shard, shard, shard), out_specs=P(), check_vma=False,
  )  # fmt: skip
  alone = lambda q, k, v, at: attend(q, k, v, spec, q_tokens=at, k_tokens=at)
  for f in (lambda g: g, lambda g: jax.grad(lambda *x: jnp.cos(g(*x)).sum(), (0, 1, 2))):
    actual, expected = (jax.jit(f(g))(*qkv, where) for g in (run, alone))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), actual, expected)


def test_a_reduction_that_is_unknown_is_refused():
  with pytest.raises(ValueError, match="reduction='star' must be one of all_reduce, butterfly"):
    merge_tree(empty(SHAPE), "keys", "star")
