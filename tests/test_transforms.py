"""Every transform: the same by every route, harmless where nothing is seen, true to its facts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import (
  CLOSE, S, T, assert_close, evaluate, in_pieces, inputs, instance, packed, wide,
)  # fmt: skip

from attnx.attention import AttentionSpec, attend, chunked, masks, reference
from attnx.core import registry
from attnx.core.tokens import Tokens

NAMES = registry.names("transforms")
CAUSAL = masks.Causal() & registry.build("masks", "same_segment")


def spec(name: str, mask: masks.Mask = CAUSAL) -> AttentionSpec:
  return AttentionSpec(mask=mask, transforms=(instance("transforms", name),))


@pytest.mark.parametrize("name", NAMES)
def test_chunked_and_reference_are_one_value_and_one_gradient(name):
  with jax.enable_x64(True):
    of = wide(spec(name)), inputs(), packed(T), packed(S, seed=2)
    out, grads = evaluate(*of, "reference")
    assert_close(evaluate(*of, "chunked"), (out, grads), **CLOSE)
    assert all(np.abs(g).max() > 0 for g in grads)  # parameters take part


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_any_size_give_the_same_output(name):
  with jax.enable_x64(True):
    s, qkv, sides = wide(spec(name)), inputs(), (packed(T), packed(S))
    p = chunked.partial(*qkv, s, *sides, q_chunk=3, k_chunk=4)
    assert_close(s.finish(p), s.finish(reference.partial(*qkv, s, *sides)), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_keys_may_arrive_in_uneven_pieces(name):
  with jax.enable_x64(True):
    of = wide(spec(name)), inputs(), packed(T), packed(S)
    assert_close(in_pieces(*of, cuts=(0, 1, 7, 9, S)), evaluate(*of, "reference"), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
  with jax.enable_x64(True):
    s, qkv, sides = wide(spec(name)), inputs(), (packed(T), packed(S))
    _, grads = evaluate(s, qkv, *sides, "reference")
    leaves, tree = jax.tree.flatten((qkv, s))
    rng = np.random.default_rng(3)
    move = [rng.standard_normal(x.shape) for x in leaves]

    @jax.jit
    def loss(h):
      qkv, s = tree.unflatten([x + h * d for x, d in zip(leaves, move)])
      tokens = dict(q_tokens=sides[0], k_tokens=sides[1])
      return jnp.cos(attend(*qkv, s, **tokens, implementation="reference")).sum()

    slope = sum((g * d).sum() for g, d in zip(grads, move, strict=True))
    np.testing.assert_allclose((loss(1e-6) - loss(-1e-6)) / 2e-6, slope, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_see_nothing_are_zero_and_move_nothing(name, implementation):
  nothing = masks.Causal() & ~masks.Causal()
  out, grads = evaluate(
    spec(name, nothing), inputs(dtype=np.float32), packed(T), packed(S), implementation
  )
  assert not out.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_and_stays(name, implementation):
  qkv = inputs(dtype=jnp.bfloat16)
  exact = attend(*(x.astype(jnp.float32) for x in qkv), spec(name), implementation="reference")
  actual = attend(*qkv, spec(name), implementation=implementation)
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_relative_is_declared_exactly_where_moving_both_sides_changes_nothing(name):
  q, k, v = inputs(T, S, np.float32)
  at = lambda offset: dict(q_tokens=Tokens.of_length(T, offset=2 + offset),
                           k_tokens=Tokens.of_length(S, offset=offset))  # fmt: skip
  here, there = (attend(q, k, v, spec(name), **at(offset)) for offset in (0, 1000))
  relative = np.allclose(here, there, rtol=1e-5, atol=1e-6)
  assert relative == ("relative" in registry.get("transforms", name).facts)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_decoding_is_the_row_of_the_whole(name):
  q, k, v = inputs(S, S, np.float32)
  whole = attend(q, k, v, spec(name))
  where = Tokens.of_length(S)
  for t in (0, 4, S - 1):
    step = attend(q[:, t : t + 1], k, v, spec(name), q_tokens=where[t : t + 1], k_tokens=where)
    np.testing.assert_allclose(step[:, 0], whole[:, t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_keys_in_memory_does_not_matter(name):
  q, k, v = inputs(T, S, np.float32)
  where = Tokens.of_length(S)
  order = np.random.default_rng(0).permutation(S)
  shuffled = dataclasses.replace(where, position=where.position[:, order])
  np.testing.assert_allclose(
    attend(q, k[:, order], v[:, order], spec(name), k_tokens=shuffled),
    attend(q, k, v, spec(name)),
    rtol=1e-5,
    atol=1e-6,
  )
