"""The definition against plain NumPy, the monoid, the choice of implementation, bad arguments."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, UnsupportedError, api, attend, choose, masks, reference
from attnx.attention import transforms
from attnx.attention.partial import Partial, empty, from_lse, merge, merge_across, rebase
from attnx.core import registry
from attnx.core.tokens import Tokens

B, T, S, N, K, H, V = 2, 7, 11, 4, 2, 8, 3
EXACT = dict(rtol=1e-12, atol=1e-12)


def arguments(dtype=np.float64):
  rng = np.random.default_rng(0)
  shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V))
  return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def tokens(length: int) -> Tokens:
  """Two documents in a row, and padding at its end in one of them."""
  where = Tokens.of_length(length)
  pad = np.array([[length], [length - 2]])
  return dataclasses.replace(
    where,
    position=np.where(where.index < pad, where.index, -1),
    segment=(where.index >= 5).astype(np.int32),
  )


def by_hand(q, k, v, visible, bias=0.0):
  """Softmax attention one row at a time; empty rows are zero."""
  out = np.zeros((B, T, N, V))
  for b, t, n in np.ndindex(B, T, N):
    scores = (k[b, :, n // (N // K)] @ q[b, t, n]) * H**-0.5 + bias
    weights = np.where(visible[b, t], np.exp(scores), 0.0)
    if weights.any():
      out[b, t, n] = weights / weights.sum() @ v[b, :, n // (N // K)]
  return out


def test_the_reference_is_the_formula_in_float64():
  q, k, v = arguments()
  q_tokens, k_tokens = tokens(T), tokens(S)
  spec = AttentionSpec(mask=masks.Causal() & registry.build("masks", "same_segment"))
  qp, kp = q_tokens.position[:, :, None], k_tokens.position[:, None]
  same = q_tokens.segment[:, :, None] == k_tokens.segment[:, None]
  visible = (kp <= qp) & same & (kp >= 0) & (qp >= 0)
  with jax.enable_x64(True):
    actual = attend(
      q, k, v, spec, q_tokens=q_tokens, k_tokens=k_tokens, implementation="reference"
    )
    np.testing.assert_allclose(actual, by_hand(q, k, v, visible), **EXACT)
  assert actual.dtype == np.float64 and not actual[1, -1].any()


def test_weights_times_values_are_the_output():
  q, k, v = arguments(np.float32)
  spec = AttentionSpec(mask=masks.Causal())
  weights = reference.weights(q, k, spec, Tokens.of_length(T), Tokens.of_length(S))
  values = np.repeat(v, N // K, axis=2)
  np.testing.assert_allclose(
    np.einsum("bnts,bsnv->btnv", weights, values), attend(q, k, v, spec), rtol=1e-5, atol=1e-6
  )


def pieces(spec: AttentionSpec, cuts=(0, 3, 4, 9, S)) -> list[Partial]:
  q, k, v = arguments()
  where = tokens(S)
  return [
    reference.partial(q, k[:, a:b], v[:, a:b], spec, tokens(T), where[a:b])
    for a, b in zip(cuts, cuts[1:])
  ]


def test_partials_are_a_commutative_monoid():
  with jax.enable_x64(True):
    a, b, c, d = pieces(AttentionSpec(mask=masks.Causal()))
    one = empty(a.out.shape, jnp.float64)
    equal = lambda x, y: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **EXACT), x, y)
    equal(merge(one, a), a)
    equal(merge(a, one), a)
    equal(merge(one, one), one)
    equal(merge(a, b), merge(b, a))
    equal(merge(merge(a, b), merge(c, d)), merge(a, merge(b, merge(c, d))))


def test_gradients_through_a_merge_of_uneven_pieces_are_those_of_one_piece():
  q, k, v = arguments()
  spec = AttentionSpec(mask=masks.Causal())
  loss = lambda p: jnp.sin(spec.finish(p)).sum() + jnp.sin(p.peak + jnp.log(p.mass)).sum()

  def whole(q, k, v):
    return loss(reference.partial(q, k, v, spec, Tokens.of_length(T), Tokens.of_length(S)))

  def merged(q, k, v):
    where, parts = Tokens.of_length(S), []
    for piece in (slice(0, 1), slice(1, 8), slice(8, S)):
      parts.append(
        reference.partial(q, k[:, piece], v[:, piece], spec, Tokens.of_length(T), where[piece])
      )
    return loss(merge(parts[2], merge(parts[0], parts[1])))

  with jax.enable_x64(True):
    for actual, expected in zip(*(jax.grad(f, (0, 1, 2))(q, k, v) for f in (merged, whole))):
      np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_an_output_with_its_log_sum_exp_is_a_partial_with_both_gradients():
  spec, (q, k, v) = AttentionSpec(), arguments()

  def shards(q, as_library):
    parts = []
    for piece in (slice(0, 4), slice(4, S)):
      where = Tokens.of_length(S)[piece]
      p = reference.partial(q, k[:, piece], v[:, piece], spec, Tokens.of_length(T), where)
      if as_library:
        p = from_lse(spec.finish(p), p.peak + jnp.log(p.mass), p.count)
      parts.append(p)
    return jnp.sin(spec.finish(merge(*parts))).sum()

  with jax.enable_x64(True):
    grads = [jax.grad(shards)(q, as_library) for as_library in (False, True)]
    np.testing.assert_allclose(*grads, rtol=1e-10, atol=1e-12)


def test_an_empty_log_sum_exp_is_the_identity():
  p = from_lse(jnp.zeros((B, T, N, V)), jnp.full((B, T, N), -jnp.inf), jnp.zeros((B, T, N)))
  assert not p.mass.any() and not merge(p, p).out.any() and np.isneginf(p.peak).all()
  assert np.isfinite(jax.grad(lambda x: from_lse(x, p.peak, p.count).out.sum())(p.out)).all()


def test_rebasing_changes_no_output():
  with jax.enable_x64(True):
    spec = AttentionSpec()
    p = pieces(spec, (0, S))[0]
    np.testing.assert_allclose(spec.finish(rebase(p, p.peak + 3.0)), spec.finish(p), **EXACT)


def test_merging_across_devices_is_merging():
  with jax.enable_x64(True):
    spec = AttentionSpec(mask=masks.Causal())
    parts = pieces(spec)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    across = jax.vmap(lambda p: merge_across(p, "devices"), axis_name="devices")(stacked)
    a, b, c, d = parts
    np.testing.assert_allclose(
      spec.finish(jax.tree.map(lambda x: x[2], across)),
      spec.finish(merge(merge(a, b), merge(c, d))),
      **EXACT,
    )


def test_mods_see_places_heads_and_batch_rows():
  q, k, v = arguments(np.float32)
  visible = jax.random.bernoulli(jax.random.key(0), 0.6, (B, N, T, S))
  bias = jax.random.normal(jax.random.key(1), (B, N, T, S))
  mods = AttentionSpec.from_mods(
    lambda b, h, i, j: visible[b, h, i, j], lambda s, b, h, i, j: s + bias[b, h, i, j]
  )
  dense = AttentionSpec(mask=masks.Dense(visible), transforms=(transforms.Add(bias),))
  np.testing.assert_allclose(attend(q, k, v, mods), attend(q, k, v, dense), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_rows_that_see_nothing_are_zero_with_zero_gradients(implementation):
  nothing = AttentionSpec(mask=~masks.Everything())
  loss = lambda *qkv: attend(*qkv, nothing, implementation=implementation).sum()
  value, grads = jax.value_and_grad(loss, (0, 1, 2))(*map(jnp.asarray, arguments(np.float32)))
  assert value == 0 and not any(g.any() for g in grads)


def test_every_implementation_drops_the_same_weights():
  q, k, v = arguments(np.float32)
  spec = AttentionSpec(edits=(transforms.Dropout(jax.random.key(0), 0.4),))
  outs = [attend(q, k, v, spec, implementation=name) for name in ("chunked", "reference")]
  np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-6)
  assert not np.allclose(outs[0], attend(q, k, v))


def test_the_output_has_the_dtype_of_the_values():
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arguments())
  assert attend(q, k, v).dtype == jnp.bfloat16
  expected = attend(*(x.astype(jnp.float32) for x in (q, k, v)))
  np.testing.assert_allclose(attend(q, k, v).astype(jnp.float32), expected, rtol=0.02, atol=0.02)


def test_choosing_says_why_each_implementation_refuses(monkeypatch):
  busy = dataclasses.replace(api.IMPLEMENTATIONS["chunked"], refusal=lambda *_: "is asleep")
  monkeypatch.setitem(api.IMPLEMENTATIONS, "chunked", busy)
  assert choose(*arguments(), AttentionSpec()) == "reference"
  with pytest.raises(UnsupportedError, match="chunked: is asleep"):
    attend(*arguments(np.float32), implementation="chunked")
  with pytest.raises(ValueError, match="'flash' is not one of .*'chunked'"):
    attend(*arguments(np.float32), implementation="flash")


BAD = {
  "query has dtype int32; expected a floating": lambda q, k, v: (q.astype(np.int32), k, v),
  "query is a list": lambda q, k, v: (q.tolist(), k, v),
  r"query has shape \(7, 4, 8\); expected \(B, T, N, H\)": lambda q, k, v: (q[0], k, v),
  r"key has shape \(1, 11, 2, 8\); expected \(2, S, K, 8\)": lambda q, k, v: (q, k[:1], v),
  r"value has shape \(2, 10, 2, 3\); expected \(2, 11, 2, V\)": lambda q, k, v: (q, k, v[:, 1:]),
  "key has 2 heads, which must divide the 3 heads": lambda q, k, v: (q[:, :, 1:], k, v),
  r"key has shape \(2, 0, 2, 8\)": lambda q, k, v: (q, k[:, :0], v[:, :0]),
  "spec is a str; expected an AttentionSpec": lambda q, k, v: (q, k, v, "causal"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
  with pytest.raises((TypeError, ValueError), match=message):
    attend(*BAD[message](*arguments(np.float32)))


def test_tokens_must_fit_the_arrays():
  with pytest.raises(ValueError, match=r"k_tokens.index has shape \(1, 7\); expected \(1, 11\)"):
    attend(*arguments(np.float32), k_tokens=Tokens.of_length(T))
  with pytest.raises(TypeError, match="q_tokens is a ndarray; expected Tokens"):
    attend(*arguments(np.float32), q_tokens=np.arange(T))


def test_needs_that_are_none_are_named():
  class Misspelt(transforms.SoftCap):
    needs = frozenset({"rows"})

  with pytest.raises(ValueError, match=r"needs=\['rows'\] must be some of heads, row, index"):
    attend(*arguments(np.float32), AttentionSpec(transforms=(Misspelt(),)))


def test_arrays_by_place_must_reach_every_token():
  q, k, v = arguments(np.float32)
  said = r"a dense {} has shape \({}\); expected \(1 or 2, 1 or 4, 1 or 7, 1 or 11\)"
  for shape in ((2, 4, 7, 10), (2, 4, 6, 11), (2, 3, 7, 11), (3, 1, 1, 11), (7, 11), (1, 1, 8, 11)):
    words = ", ".join(map(str, shape))
    causal_too = masks.Causal() & ~masks.Dense(np.ones(shape, bool))
    with pytest.raises(ValueError, match=said.format("mask", words)):
      attend(q, k, v, AttentionSpec(causal_too))
    with pytest.raises(ValueError, match=said.format("bias", words)):
      attend(q, k, v, AttentionSpec(transforms=(transforms.Add(np.zeros(shape)),)))
  # Some of the rows and keys of larger arrays, as an implementation over devices has them.
  bias = np.random.default_rng(0).normal(size=(1, 4, 20, 20)).astype(np.float32)
  spec = AttentionSpec(transforms=(transforms.Add(bias),))
  there = dict(q_tokens=Tokens.of_length(20)[5:12], k_tokens=Tokens.of_length(20)[9:])
  part = AttentionSpec(transforms=(transforms.Add(bias[:, :, 5:12, 9:]),))
  np.testing.assert_allclose(attend(q, k, v, spec, **there), attend(q, k, v, part), rtol=1e-5)
  with pytest.raises(ValueError, match="a dense bias has shape"):
    attend(q, k, v, part, **there)


sizes = st.lists(st.integers(0, 3), min_size=0, max_size=5).map(tuple)
dtypes = st.sampled_from([np.float32, np.int32, np.bool_, np.complex64])


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.tuples(sizes, sizes, sizes), st.tuples(dtypes, dtypes, dtypes))
def test_any_shapes_and_dtypes_run_or_raise_one_sentence(shapes, kinds):
  arrays = [np.zeros(shape, kind) for shape, kind in zip(shapes, kinds)]
  try:
    out = jax.eval_shape(attend, *arrays)
  except (TypeError, ValueError) as error:
    assert str(error).startswith(("query ", "key ", "value ")) and "\n" not in str(error)
  else:
    assert out.shape == (*arrays[0].shape[:3], arrays[2].shape[3])
