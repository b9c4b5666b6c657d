"""Chunked attention is the reference in linear memory: values, derivatives, plans, composition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from attnx.attention import AttentionSpec, attend, chunked, explain, masks, plan, reference
from attnx.attention import transforms
from attnx.core import registry
from attnx.core.tokens import Tokens

B, T, S, N, K, H, V = 2, 37, 53, 4, 2, 8, 6
SAME = registry.build("masks", "same_segment")
SPECS = {
  "full": AttentionSpec(),
  "causal": AttentionSpec(mask=masks.Causal(), transforms=(transforms.SoftCap(3.0),)),
  "window": AttentionSpec(mask=masks.Causal() & masks.Window(9), scale=0.4),
  "packed": AttentionSpec(mask=masks.Causal() & SAME),
  "relu": AttentionSpec(mask=~masks.Window(3, 3), normaliser=registry.build("normalisers", "relu")),
}


def arguments(dtype=np.float64, length=T):
  rng = np.random.default_rng(0)
  shapes = ((B, length, N, H), (B, S, K, H), (B, S, K, V))
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def packed(length: int) -> Tokens:
  """Three documents in a row; the second row of the batch ends in padding, the first begins so."""
  where = Tokens.of_length(length)
  exists = np.stack([where.index[0] >= 5, where.index[0] < length - 11])
  return dataclasses.replace(
    where,
    position=np.where(exists, where.index, -1).astype(np.int32),
    segment=(where.index // 17).astype(np.int32) + np.zeros((B, 1), np.int32),
  )


def run(partial, spec, q_tokens, k_tokens):
  """q, k, v to a loss that every part of the partial has a share in, but for its unit."""

  def loss(q, k, v, spec=spec):
    p = partial(q, k, v, spec, q_tokens, k_tokens)
    mass = p.mass * jnp.exp(jnp.where(jnp.isneginf(p.peak), 0.0, p.peak))
    return jnp.sin(spec.finish(p)).sum() + jnp.log1p(mass).sum() + p.count.sum()

  return loss


@pytest.mark.parametrize("tokens", [Tokens.of_length, packed], ids=["plain", "packed"])
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_those_of_the_reference_in_float64(name, tokens):
  spec, where = SPECS[name], (tokens(T), tokens(S))
  small = functools.partial(chunked.partial, q_chunk=8, k_chunk=16)
  with jax.enable_x64(True):
    expected, actual = (
      jax.jit(jax.value_and_grad(run(f, spec, *where), (0, 1, 2)))(*arguments())
      for f in (reference.partial, small)
    )
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11), actual, expected
    )


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_any_tile_gives_the_same(chunk):
  spec, where = SPECS["packed"], (packed(T), packed(S))
  with jax.enable_x64(True):
    q, k, v = arguments()
    out = chunked.partial(q, k, v, spec, *where, q_chunk=chunk, k_chunk=max(chunk, 3))
    expected = reference.partial(q, k, v, spec, *where)
    np.testing.assert_allclose(spec.finish(out), spec.finish(expected), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(out.count, expected.count)


def test_traced_tokens_give_what_tokens_on_the_host_give():
  spec, (q_tokens, k_tokens) = SPECS["packed"], (packed(T), packed(S))
  small = functools.partial(chunked.partial, q_chunk=8, k_chunk=16)
  q, k, v = arguments(np.float32)
  traced = jax.jit(lambda q, k, v, *tokens: spec.finish(small(q, k, v, spec, *tokens)))
  static = jax.jit(lambda q, k, v: spec.finish(small(q, k, v, spec, q_tokens, k_tokens)))
  np.testing.assert_array_equal(traced(q, k, v, q_tokens, k_tokens), static(q, k, v))


def test_forward_and_second_derivatives_are_those_of_the_reference():
  spec, where = SPECS["causal"], (Tokens.of_length(T), Tokens.of_length(S))
  small = functools.partial(chunked.partial, q_chunk=16, k_chunk=16)

  def curvature(partial):
    loss = run(partial, spec, *where)
    slope = lambda *x: jax.jvp(loss, x, jax.tree.map(jnp.cos, x))[1]  # forward mode
    return jax.jit(lambda *x: (slope(*x), jax.grad(slope, (0, 1, 2))(*x)))(*arguments())

  with jax.enable_x64(True):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9),
      curvature(small),
      curvature(reference.partial),
    )


def test_parameters_of_a_spec_have_gradients():
  bias = jax.random.normal(jax.random.key(1), (N, T, S))[None]
  where = Tokens.of_length(T), Tokens.of_length(S)
  q, k, v = arguments(np.float32)

  def loss(partial, bias):
    spec = AttentionSpec(mask=masks.Causal(), transforms=(transforms.Add(bias),))
    return run(partial, spec, *where)(q, k, v)

  small = functools.partial(chunked.partial, q_chunk=8, k_chunk=16)
  gradient = lambda partial: jax.grad(functools.partial(loss, partial))(bias)
  actual, expected = gradient(small), gradient(reference.partial)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_it_works_under_vmap_and_remat():
  spec, (q, k, v) = SPECS["window"], arguments(np.float32)
  f = lambda q, k, v: attend(q[None], k[None], v[None], spec)[0]
  mapped = jax.grad(lambda *x: jnp.sin(jax.vmap(jax.checkpoint(f))(*x)).sum(), (0, 1, 2))
  loss = lambda *x: jnp.sin(attend(*x, spec, implementation="reference")).sum()
  plain = jax.grad(loss, (0, 1, 2))
  for actual, expected in zip(mapped(q, k, v), plain(q, k, v)):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_it_works_inside_shard_map_over_batch_and_heads():
  mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
  spec, x = SPECS["causal"], arguments(np.float32)
  sharded = jax.shard_map(
    lambda q, k, v: attend(q, k, v, spec), mesh=mesh,
    in_specs=PartitionSpec("data", None, "heads"), out_specs=PartitionSpec("data", None, "heads"),
  )  # fmt: skip
  grads = [
    jax.jit(jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2)))(*x)
    for f in (sharded, lambda q, k, v: attend(q, k, v, spec, implementation="reference"))
  ]
  for actual, expected in zip(*grads):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def visited(spec, q_tokens, k_tokens, *chunks):
  return plan.outcome(spec.mask, q_tokens, k_tokens, *chunks)


def test_tiles_that_a_mask_leaves_empty_are_not_visited():
  where = Tokens.of_length(1024)
  causal = visited(SPECS["causal"], where, where, 128, 128)
  assert (causal.empty, causal.partial, causal.full) == (28, 8, 28)
  window = visited(AttentionSpec(mask=masks.Causal() & masks.Window(127)), where, where, 128, 128)
  assert (window.empty, window.partial, window.full) == (64 - 15, 15, 0)
  documents = dataclasses.replace(where, segment=where.index // 256)
  same = visited(AttentionSpec(mask=SAME), documents, documents, 128, 128)
  assert (same.empty, same.partial, same.full) == (48, 0, 16)


def test_no_number_of_a_tile_that_is_not_visited_reaches_the_output():
  k_tokens = dataclasses.replace(Tokens.of_length(S), position=np.r_[:16, [-1] * (S - 16)][None])
  q, k, v = arguments(np.float32)
  k, v = k.at[:, 16:].set(np.nan), v.at[:, 16:].set(np.nan)
  out = chunked.partial(
    q, k, v, SPECS["full"], Tokens.of_length(T), k_tokens, q_chunk=16, k_chunk=16
  )
  assert np.isfinite(out.out).all()


def temporaries(f, *shapes) -> int:
  return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
def test_memory_is_linear_in_the_length(grad):
  def bytes_at(length):
    x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    f = lambda q, k, v: jnp.square(attend(q, k, v, SPECS["causal"])).sum()
    return temporaries(jax.grad(f, (0, 1, 2)) if grad else f, x, x, x)

  small, large = bytes_at(4096), bytes_at(16384)
  assert large < 4.4 * small


def test_explain_names_what_runs_and_what_it_costs():
  q, k, v = arguments(np.float32, length=S)
  told = explain(q, k, v, SPECS["causal"])
  assert told.runs == "chunked" and "chunked" in str(told) and "tiles of" in str(told)
  *elsewhere, tiled, dense = told.rows
  assert [row.name for row in elsewhere] == ["pallas_tpu", "cudnn", "mosaic_gpu"]
  assert (tiled.name, dense.name) == ("chunked", "reference")
  assert all("not on cpu" in row.verdict and row.flops is None for row in elsewhere)
  assert all(row.flops and row.bytes and row.memory is not None for row in (tiled, dense))
