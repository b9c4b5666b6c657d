"""Every normaliser: the same by every route, harmless where nothing is seen, true to its facts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import (
  B, CLOSE, N, S, T, assert_close, evaluate, in_pieces, inputs, instance, packed, wide,
)  # fmt: skip

from attnx.attention import AttentionSpec, attend, chunked, masks, reference, transforms
from attnx.core import registry

NAMES = registry.names("normalisers")
WHOLE = [name for name in NAMES if "row" in instance("normalisers", name).needs]


def spec(name: str, **parts) -> AttentionSpec:
  return AttentionSpec(normaliser=instance("normalisers", name), **parts)


def structured() -> masks.Mask:
  """Rows of 0 to 11 keys in packed documents."""
  return masks.Window(6, 3) & registry.build("masks", "same_segment")


@pytest.mark.parametrize("name", NAMES)
def test_chunked_and_reference_are_one_value_and_one_gradient(name):
  with jax.enable_x64(True):
    of = wide(spec(name, mask=structured())), inputs(), packed(T), packed(S, seed=2)
    assert_close(evaluate(*of, "chunked"), evaluate(*of, "reference"), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_any_size_give_the_same_output(name):
  keys = S if name in WHOLE else 4
  with jax.enable_x64(True):
    s, qkv, sides = wide(spec(name, mask=structured())), inputs(), (packed(T), packed(S))
    p = chunked.partial(*qkv, s, *sides, q_chunk=3, k_chunk=keys)
    whole = reference.partial(*qkv, s, *sides)
    assert_close(s.finish(p), s.finish(whole), **CLOSE)
    assert_close(p.count, whole.count)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_counted_is_not_read(name):
  with jax.enable_x64(True):
    s = spec(name, mask=structured())
    p = reference.partial(*inputs(), s, packed(T), packed(S))
    if s.normaliser.counts:
      assert p.count.max() > 1
    else:
      assert not p.count.any()
      unread = dataclasses.replace(p, count=jnp.full_like(p.count, jnp.nan))
      np.testing.assert_array_equal(s.finish(unread), s.finish(p))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WHOLE])
def test_keys_may_arrive_in_uneven_pieces(name):
  with jax.enable_x64(True):
    of = wide(spec(name, mask=structured())), inputs(), packed(T), packed(S)
    pieces = in_pieces(*of, cuts=(0, 1, 7, 9, S))
    assert_close(pieces, evaluate(*of, "reference"), **CLOSE)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_see_nothing_are_zero_and_move_nothing(name, implementation):
  sides = packed(T), packed(S)
  nothing = spec(name, mask=masks.Window(3) & ~masks.Window(3))
  qkv = inputs(dtype=np.float32)
  out, grads = evaluate(nothing, qkv, *sides, implementation)
  assert not out.any() and not any(g.any() for g in grads)
  some = spec(name, mask=masks.Causal() & ~masks.Window(2))  # position 0, 1 and 2 see nothing
  out, grads = evaluate(some, qkv, *sides, implementation)
  assert not out[:, :3].any() and not out[1, -2:].any() and out[:, 3:-2].any()
  assert all(np.isfinite(g).all() for g in grads)
  assert not grads[0][:, :3].any() and not grads[2][1, -2:].any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
  with jax.enable_x64(True):
    s, sides = wide(spec(name, mask=structured())), (packed(T), packed(S))
    qkv = inputs()
    _, grads = evaluate(s, qkv, *sides, "reference")
    rng = np.random.default_rng(3)
    move = [rng.standard_normal(x.shape) for x in qkv]
    loss = jax.jit(lambda q, k, v: jnp.cos(
      attend(q, k, v, s, q_tokens=sides[0], k_tokens=sides[1], implementation="reference")
    ).sum())  # fmt: skip
    up, down = (loss(*(x + h * d for x, d in zip(qkv, move))) for h in (1e-6, -1e-6))
    slope = sum((g * d).sum() for g, d in zip(grads, move))
    np.testing.assert_allclose((up - down) / 2e-6, slope, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_and_stays(name, implementation):
  qkv = inputs(dtype=jnp.bfloat16)
  s = spec(name, mask=masks.Causal())
  exact = attend(*(x.astype(jnp.float32) for x in qkv), s, implementation="reference")
  actual = attend(*qkv, s, implementation=implementation)
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_any_size_give_finite_outputs_and_gradients(name):
  q, k, v = inputs(dtype=np.float32)
  for size in (0.0, 1e-3, 30.0):
    out, grads = evaluate(spec(name), (size * q, size * k, v), packed(T), packed(S), "chunked")
    assert np.isfinite(out).all() and all(np.isfinite(g).all() for g in grads)


def facts(name: str) -> set[str]:
  """What is so of an instance: of its weights, of values of one, of scores that are moved."""
  q, k, v = inputs()
  s, true = wide(spec(name)), set()
  sides = packed(T), packed(S)
  there = np.broadcast_to(sides[0].position >= 0, (B, T))
  run = lambda s, v, q=q: attend(q, k, v, s, q_tokens=sides[0], k_tokens=sides[1])[there]
  if (reference.unnormalised(q, k, s, *sides)[0] >= 0).all():
    true.add("nonnegative")
  if all(np.allclose(run(s, jnp.ones_like(v), size * q), 1.0, atol=1e-9) for size in (0, 1)):
    true.add("sums_to_one")
  by_row = transforms.Add(jnp.linspace(-3.0, 2.0, B * N * T).reshape(B, N, T, 1))
  moved = wide(spec(name, transforms=(by_row,)))
  if np.allclose(run(moved, v), run(s, v), atol=1e-9):
    true.add("shift_invariant")
  return true


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_declares_what_is_true_of_it_and_nothing_else(name):
  with jax.enable_x64(True):
    assert facts(name) == set(registry.get("normalisers", name).facts)
