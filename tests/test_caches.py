"""The contract of caches, run for every file in attnx/mechanisms/caches."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import models
from attnx.attention import AttentionSpec
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.models import sampling
from attnx.nn.position import Position

B, T, D, N, K = 2, 12, 16, 4, 2
CLOSE = dict(rtol=1e-4, atol=1e-5)
NAMES = registry.names("caches")
PIECES = [(0, T), (0, 4, 5, T), (0, 4, *range(5, T + 1))]
SPECS = {
  "rope": dict(position="rope", qk_norm=True),
  "alibi and sigmoid": dict(transforms=["alibi"], normaliser=dict(name="sigmoid", length=T)),
  "learned relations": dict(transforms=[dict(name="shaw", max_distance=4), "t5_bias"]),
  "mixed heads": dict(position="rope", normaliser="talking_heads", combiner="head_gate"),
  "whole rows": dict(position="xpos", normaliser="entmax15", transforms=["soft_cap"]),
}


def facts(name) -> set[str]:
  return set(registry.get("caches", name).facts)


def having(fact: str):
  return pytest.mark.parametrize("name", [name for name in NAMES if fact in facts(name)])


def config(name, **options):
  return dict(registry.get("caches", name).tiny, name=name, **options)


def mask_of(name):
  """The mask that the cache is made for, with its tiny arguments."""
  masks = [fact.removeprefix("masked:") for fact in facts(name) if fact.startswith("masked:")]
  return dict(registry.get("masks", masks[0]).tiny, name=masks[0]) if masks else "causal"


@functools.cache
def model(name, spec="rope", dtype="float32"):
  with jax.ensure_compile_time_eval():
    kind = dict(name="attention", num_heads=N, num_kv_heads=K, cache=config(name, dtype=dtype))
    kind |= dict(mask=mask_of(name), **SPECS.get(spec, {}))
    return registry.build("mixers", kind, dim=D, rngs=nnx.Rngs(0))


@functools.cache
def inputs(seed=0):
  with jax.ensure_compile_time_eval():
    return jax.random.normal(jax.random.key(seed), (B, T, D))


def left_padded(pads) -> Tokens:
  where = Tokens.of_length(T, offset=-np.asarray(pads, np.int32)[:, None])
  position = np.maximum(where.position, -1)
  return Tokens(np.maximum(position, 0), position, np.zeros_like(position))


@functools.cache
def compiled(mixer):
  return jax.jit(mixer.step)


def stepped(mixer, x, cuts=PIECES[-1], tokens=None):
  """What steps give together, and the cache after them."""
  step = mixer.step if isinstance(x, jax.core.Tracer) else compiled(mixer)
  cache, outputs = mixer.init_cache(x.shape[0], x.shape[1]), []
  for a, b in zip(cuts, cuts[1:]):
    options = {} if tokens is None else {"tokens": tokens[a:b]}
    y, cache = step(x[:, a:b], cache, **options)
    outputs.append(y)
  return jnp.concatenate(outputs, 1), cache


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, **CLOSE)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_appends_in_pieces_equal_one_append(name, spec):
  expected, whole = stepped(model(name, spec), inputs(), PIECES[0])
  for cuts in PIECES[1:]:
    y, cache = stepped(model(name, spec), inputs(), cuts)
    np.testing.assert_allclose(y, expected, **CLOSE)
    assert_same((cache.kept(), cache.seen), (whole.kept(), whole.seen))


@pytest.mark.parametrize("name", NAMES)
def test_rows_padded_on_the_left_give_what_each_gives_alone(name):
  pads, mixer = (0, 5), model(name)
  y, cache = stepped(mixer, inputs(), (0, 7, 8, 9, T), left_padded(pads))
  for row, pad in enumerate(pads):
    alone, kept = stepped(mixer, inputs()[row : row + 1, pad:], (0, T - pad))
    np.testing.assert_allclose(y[row, pad:], alone[0], **CLOSE)
    there, here = (np.sort(c.kept().tokens.position)[i] for c, i in ((kept, 0), (cache, row)))
    np.testing.assert_array_equal(here[here >= 0], there[there >= 0])
    assert cache.seen[row] == T - pad == cache.next(1).position[row, 0]
  assert np.isfinite(y).all()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_name_what_was_kept(name):
  cache = registry.build("caches", config(name)).empty(B, T, K, 4, 3)
  assert (cache.kept().tokens.position < 0).all()
  rng = np.random.default_rng(0)
  sizes = (N, 4), (K, 4), (K, 3)
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, *size)), jnp.float32) for size in sizes)
  tokens = left_padded((0, 4))
  attend = functools.partial(type(cache).attend, spec=AttentionSpec(), position=Position())
  _, cache = jax.jit(attend)(cache, q, k, v, tokens)
  key, value, where = cache.kept()
  for row in range(B):
    for head in range(K):
      at = where.position[row] if where.position.ndim == 2 else where.position[row, head]
      held = np.flatnonzero(at >= 0)
      place = at[held] + (0, 4)[row]
      assert T - 1 in place and len(set(place.tolist())) == len(held) > 2
      np.testing.assert_array_equal(key[row, held, head], k[row, place, head])
      np.testing.assert_array_equal(value[row, held, head], v[row, place, head])


@pytest.mark.parametrize("name", NAMES)
def test_padding_leaves_no_trace(name):
  mixer = model(name)
  _, before = stepped(mixer, inputs(), (0, 3, 9))
  zero = np.zeros((1, 4), np.int32)
  y, after = compiled(mixer)(inputs(1)[:, :4], before, tokens=Tokens(zero, zero - 1, zero))
  assert_same(after, before)
  np.testing.assert_array_equal(y, jnp.zeros_like(y))


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_know_of_each_other(name):
  mixer = model(name)
  y, _ = stepped(mixer, inputs(), PIECES[1])
  z, _ = stepped(mixer, inputs().at[0].add(1.0), PIECES[1])
  np.testing.assert_array_equal(y[1], z[1])
  assert not np.allclose(y[0], z[0])


@having("exact")
@pytest.mark.parametrize("spec", SPECS)
def test_an_exact_cache_gives_what_one_call_gives(name, spec):
  mixer = model(name, spec)
  for cuts in PIECES:
    np.testing.assert_allclose(stepped(mixer, inputs(), cuts)[0], mixer(inputs()), **CLOSE)


@having("exact")
def test_gradients_pass_through_an_exact_cache(name):
  graph, params, rest = nnx.split(model(name), nnx.Param, ...)

  def loss(params, x, run):
    return jnp.sin(run(nnx.merge(graph, params, rest), x)).sum()

  grads = lambda run: jax.jit(jax.grad(functools.partial(loss, run=run), (0, 1)))(params, inputs())
  stepping = lambda mixer, x: stepped(mixer, x, (0, 7, T))[0]
  assert_same(grads(stepping), grads(lambda mixer, x: mixer(x)))


@having("exact")
def test_what_does_not_fit_an_exact_cache_is_refused_or_nan(name):
  mixer = model(name)
  with pytest.raises(ValueError, match="do not fit"):
    mixer.step(inputs(), mixer.init_cache(B, 8))
  _, full = compiled(mixer)(inputs()[:, :8], mixer.init_cache(B, 8))
  assert np.isnan(compiled(mixer)(inputs()[:, 8:10], full)[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_cache_gives_what_one_call_under_its_mask_gives(name):
  if mask_of(name) == "causal":
    assert not any("masked" in fact for fact in facts(name))
    return
  mixer = model(name, "no positions")  # which a cache may move
  for cuts in PIECES:
    np.testing.assert_allclose(stepped(mixer, inputs(), cuts)[0], mixer(inputs()), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_the_size_grows_as_declared(name):
  make = lambda length: model(name).init_cache(B, length)
  sizes = [sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: make(n)))) for n in (64, 128)]
  assert (sizes[0] == sizes[1]) == ("constant_state" in facts(name))
  assert sizes[1] <= 2 * sizes[0]


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_are_stored_as_asked(name):
  low, high = model(name, dtype="bfloat16"), model(name)
  y, cache = stepped(low, inputs(), PIECES[1])
  kept = cache.kept()
  assert kept.key.dtype == kept.value.dtype == jnp.bfloat16 and y.dtype == jnp.float32
  expected, wide = stepped(high, inputs(), PIECES[1])
  assert 0 < np.linalg.norm(y - expected) < 0.02 * np.linalg.norm(expected)
  rest = lambda c: [x for x in jax.tree.leaves(c) if x.dtype != jnp.bfloat16]
  floating = [x for x in rest(cache) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert all(x.dtype == jnp.float32 for x in floating)
  half = stepped(low, inputs().astype(jnp.bfloat16), PIECES[1])[0]
  assert half.dtype == jnp.bfloat16
  assert np.linalg.norm(half - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_a_loop_body_that_is_traced_once(name):
  mixer, traces = model(name), []

  def body(cache, x):
    traces.append(0)
    y, cache = mixer.step(x[:, None], cache)
    return cache, y[:, 0]

  x = jnp.swapaxes(inputs(), 0, 1)
  after, y = jax.jit(lambda c, x: jax.lax.scan(body, c, x))(mixer.init_cache(B, T), x)
  assert len(traces) <= 2  # scan looks twice where a carry is not what it was
  expected, cache = stepped(mixer, inputs())
  np.testing.assert_allclose(jnp.swapaxes(y, 0, 1), expected, **CLOSE)
  assert_same(after, cache)


@pytest.mark.parametrize("name", NAMES)
def test_attention_may_continue_from_any_moment(name):
  mixer = model(name)
  _, cache = stepped(mixer, inputs(), (0, 8))
  ahead = [compiled(mixer)(inputs(seed)[:, 8:10], cache)[0] for seed in (0, 1, 0)]
  np.testing.assert_array_equal(ahead[0], ahead[2])
  assert not np.allclose(ahead[0], ahead[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_scanned_model_generates_with_it_whatever_the_lengths_of_prompts(name):
  mixer = dict(SPECS["rope"], name="attention", num_heads=N, cache=config(name))
  kind = dict(name="decoder_lm", vocab=11, dim=D, depth=2, mixers=dict(mixer, mask=mask_of(name)))
  lm = models.build(dict(kind, scan=True), rngs=nnx.Rngs(0))
  prompts = np.random.default_rng(0).integers(0, 11, (2, 7))
  generate = jax.jit(lambda ids, lengths: sampling.generate(lm, ids, 4, lengths=lengths))
  together = generate(prompts, np.array([7, 3]))
  for row, length in ((0, 7), (1, 3)):
    alone = generate(prompts[row : row + 1, :length], np.array([length]))
    np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("name", NAMES)
def test_sizes_below_the_least_are_refused(name):
  entry = registry.get("caches", name)
  wrong = {key: -1 for key, value in entry.tiny.items() if isinstance(value, int)}
  with pytest.raises(ValueError, match="-1|length=0"):
    registry.build("caches", dict(wrong, name=name)).empty(B, 0, K, 4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_an_implementation_is_used_or_refused(name):
  x, found = inputs(), set()
  for implementation in ("auto", "reference", "chunked"):
    kind = dict(name="attention", num_heads=N, mask=mask_of(name), cache=config(name))
    mixer = registry.build(
      "mixers", dict(kind, implementation=implementation), dim=D, rngs=nnx.Rngs(0)
    )
    program = lambda: str(jax.make_jaxpr(mixer.step)(x, mixer.init_cache(B, T)))
    if name == "heavy_hitter" and implementation == "chunked":
      with pytest.raises(NotImplementedError, match="'chunked' shows no weights.*'reference'"):
        program()
    else:
      found.add(program())
  assert len(found) == (1 if name == "heavy_hitter" else 2)


def test_mixers_that_store_other_things_refuse_caches_that_choose():
  options = dict(name="mla", num_heads=2, kv_rank=4, head_dim=4, rope_dim=2, value_dim=4)
  for name in NAMES:
    mixer = registry.build("mixers", dict(options, cache=config(name)), dim=D, rngs=nnx.Rngs(0))
    if name in ("sinks", "heavy_hitter"):
      with pytest.raises(NotImplementedError, match="chooses by the queries"):
        mixer.init_cache(B, T)
    elif "exact" in facts(name):
      np.testing.assert_allclose(stepped(mixer, inputs())[0], mixer(inputs()), **CLOSE)


def test_tokens_far_into_a_text_are_like_those_at_its_start():
  for name in NAMES:
    if "constant_state" not in facts(name):
      continue
    mixer, far = model(name), Tokens.of_length(T, offset=1000)
    far = dataclasses.replace(far, position=far.position.astype(np.int32))
    y, _ = stepped(mixer, inputs(), (0, 7, 8, T), far)
    np.testing.assert_allclose(y, stepped(mixer, inputs())[0], rtol=1e-3, atol=2e-4)
