"""Every edit: the same weights by every route, none where nothing is seen, true to its facts."""

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

NAMES = registry.names("edits")
CAUSAL = masks.Causal() & registry.build("masks", "same_segment")


def spec(name: str, mask: masks.Mask = CAUSAL) -> AttentionSpec:
  return AttentionSpec(mask=mask, edits=(instance("edits", name),))


@pytest.mark.parametrize("name", NAMES)
def test_chunked_and_reference_are_one_value_and_one_gradient(name):
  with jax.enable_x64(True):
    of = wide(spec(name)), inputs(), packed(T), packed(S, seed=2)
    assert_close(evaluate(*of, "chunked"), evaluate(*of, "reference"), **CLOSE)


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
def test_an_edit_multiplies_weights_that_are_normalised_already(name):
  with jax.enable_x64(True):
    q, k, v = inputs()
    s, sides = wide(spec(name)), (packed(T), packed(S))
    plain = reference.weights(q, k, dataclasses.replace(s, edits=()), *sides)
    (edit,) = s.edits
    expected = edit(plain, sides[0].rows(*plain.shape[:2]), sides[1].columns())
    values = jnp.repeat(v, plain.shape[1] // v.shape[2], axis=2)
    out = jnp.einsum("bnts,bsnv->btnv", expected, values)
    assert_close(attend(q, k, v, s, q_tokens=sides[0], k_tokens=sides[1]), out, **CLOSE)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_see_nothing_are_zero_and_move_nothing(name, implementation):
  nothing = masks.Causal() & ~masks.Causal()
  out, grads = evaluate(
    spec(name, nothing), inputs(dtype=np.float32), packed(T), packed(S), implementation
  )
  assert not out.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_and_stays(name):
  qkv = inputs(dtype=jnp.bfloat16)
  exact = attend(*(x.astype(jnp.float32) for x in qkv), spec(name), implementation="reference")
  actual = attend(*qkv, spec(name), implementation="chunked")
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_unbiased_is_declared_exactly_where_the_mean_over_keys_is_the_weight(name):
  edit, declared = instance("edits", name), "unbiased" in registry.get("edits", name).facts
  if not hasattr(edit, "key"):
    assert not declared  # nothing is random
    return
  q, k = packed(T).rows(2, 4), packed(S).columns()
  weights = jnp.linspace(0.1, 1.0, S)
  whole = jnp.broadcast_to(weights, (2, 4, T, S))
  keys = jax.random.split(jax.random.key(0), 400)
  edited = jax.vmap(lambda key: dataclasses.replace(edit, key=key)(whole, q, k))(keys)
  assert np.allclose(edited.mean((0, 1, 2, 3)), weights, rtol=0.02) == declared
