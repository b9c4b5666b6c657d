"""The contract of token mixers, run for every file in attnx/mechanisms/mixers."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.analysis.observe import observe
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.nn.implicit import implicit_attention

B, T, S, D = 2, 12, 9, 16
CLOSE = dict(rtol=2e-4, atol=2e-5)
NAMES = registry.names("mixers")
CASES = [(n, p) for n in NAMES for p in registry.get("mixers", n).patterns]
FIRST = [(n, list(registry.get("mixers", n).patterns)[0]) for n in NAMES
         if registry.get("mixers", n).patterns]  # fmt: skip


def cases(of=CASES, *, facts=(), patterns=registry.PATTERNS):
  """Runs a test for every mixer that declares all of `facts`, in each of its `patterns`."""
  declares = lambda name: registry.get("mixers", name).facts >= set(facts)
  chosen = [(n, p) for n, p in of if p in patterns and declares(n)]
  return pytest.mark.parametrize("name, pattern", chosen)


@functools.cache
def make(name: str, pattern: str, seed: int = 0):
  entry = registry.get("mixers", name)
  config = {"name": name, **entry.tiny, **entry.patterns[pattern]}
  with jax.ensure_compile_time_eval():  # the first to ask may be a function that is traced
    return registry.build("mixers", config, dim=D, rngs=nnx.Rngs(seed))


@functools.cache
def inputs(length: int = T, seed: int = 1) -> jax.Array:
  with jax.ensure_compile_time_eval():
    return jax.random.normal(jax.random.key(seed), (B, length, D))


def run(mixer, pattern: str, x: jax.Array, **options) -> jax.Array:
  if "cross" in pattern:
    options.setdefault("context", inputs(S, 2))
  return mixer(x, **options)


@functools.cache
def compiled(name: str, pattern: str):
  return jax.jit(lambda x, **options: run(make(name, pattern), pattern, x, **options))


@functools.cache
def transforms(name: str, pattern: str) -> bool:
  """Whether a mixer goes through an FFT over tokens, whose rounding knows no past and no future."""
  jaxpr = jax.make_jaxpr(functools.partial(run, make(name, pattern), pattern))(inputs())
  return " fft[" in str(jaxpr)


@cases()
def test_the_shape_and_dtype_of_the_input_are_kept(name, pattern):
  for dtype in (jnp.float32, jnp.bfloat16):
    x = jax.ShapeDtypeStruct((B, T, D), dtype)
    context = {"context": jax.ShapeDtypeStruct((B, S, D), dtype)} if "cross" in pattern else {}
    out = jax.eval_shape(functools.partial(run, make(name, pattern), pattern), x, **context)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)


@cases(FIRST)
def test_parameters_are_float32_and_follow_the_seed(name, pattern):
  leaves = [jax.tree.leaves(nnx.state(make(name, pattern, s), nnx.Param)) for s in (0, 0, 1)]
  assert leaves[0] and all(x.dtype == jnp.float32 for x in leaves[0])
  make.cache_clear()
  again = jax.tree.leaves(nnx.state(make(name, pattern, 0), nnx.Param))
  assert all((x == y).all() for x, y in zip(leaves[0], again))
  assert any((x != y).any() for x, y in zip(leaves[0], leaves[2]))


@cases(FIRST)
def test_gradients_are_finite_and_reach_every_parameter(name, pattern):
  graph, params, rest = nnx.split(make(name, pattern), nnx.Param, ...)
  target = jnp.cos(7 * inputs())

  def loss(params):
    return jnp.square(run(nnx.merge(graph, params, rest), pattern, inputs()) - target).sum()

  for path, g in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
    assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


@cases(FIRST)
def test_remat_and_vmap_change_nothing(name, pattern):
  mixer = make(name, pattern)
  if "cross" in pattern:
    rows = lambda x: jax.vmap(lambda x, c: mixer(x[None], context=c[None])[0])(x, inputs(S, 2))
  else:
    rows = lambda x: jax.vmap(lambda x: mixer(x[None])[0])(x)
  both = jax.jit(lambda x: (jax.checkpoint(functools.partial(run, mixer, pattern))(x), rows(x)))
  expected = compiled(name, pattern)(inputs())
  for actual in both(inputs()):
    np.testing.assert_allclose(actual, expected, **CLOSE)


@cases(FIRST)
def test_bfloat16_is_close_to_float32(name, pattern):
  expected = compiled(name, pattern)(inputs())
  low = lambda x: x.astype(jnp.bfloat16)
  options = {"context": low(inputs(S, 2))} if "cross" in pattern else {}
  actual = compiled(name, pattern)(low(inputs()), **options).astype(jnp.float32)
  assert np.linalg.norm(actual - expected) < 0.06 * np.linalg.norm(expected)


@cases(FIRST, facts=["any_length"])
@pytest.mark.parametrize("length", [1, 5, 70])
def test_one_instance_serves_other_lengths(name, pattern, length):
  x = jax.ShapeDtypeStruct((B, length, D), jnp.float32)
  out = jax.eval_shape(functools.partial(run, make(name, pattern), pattern), x)
  assert out.shape == x.shape


@cases(patterns=["causal_self", "noncausal_self"])
def test_the_pattern_of_self_attention_is_the_one_declared(name, pattern):
  cut = 7
  before = compiled(name, pattern)(inputs())
  after = compiled(name, pattern)(inputs().at[:, cut:].add(1.0))
  assert not np.allclose(before[:, cut:], after[:, cut:])
  if pattern == "causal_self":  # exactly, but for the rounding of Fourier transforms
    rounding = dict(rtol=1e-5, atol=1e-6) if transforms(name, pattern) else dict(rtol=0)
    np.testing.assert_allclose(before[:, :cut], after[:, :cut], **rounding)
  else:
    assert not np.allclose(before[:, :cut], after[:, :cut])


@cases(patterns=["causal_cross", "noncausal_cross"])
def test_the_pattern_of_cross_attention_is_the_one_declared(name, pattern):
  cut = 4
  before = compiled(name, pattern)(inputs(), context=inputs(S, 2))
  after = compiled(name, pattern)(inputs(), context=inputs(S, 2).at[:, cut:].add(1.0))
  assert not np.allclose(before[:, cut:], after[:, cut:])
  if pattern == "causal_cross":
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
  else:
    assert not np.allclose(before[:, :cut], after[:, :cut])


@pytest.mark.parametrize("name", NAMES)
def test_patterns_that_are_not_declared_are_refused_or_broken(name):
  entry = registry.get("mixers", name)
  assert entry.patterns and set(entry.patterns) <= set(registry.PATTERNS)
  if not any("cross" in pattern for pattern in entry.patterns):
    mixer = make(name, next(iter(entry.patterns)))
    with pytest.raises((NotImplementedError, ValueError)):
      mixer(inputs(), context=inputs(S, 2))


def steps(mixer, x, cuts, tokens=None):
  step, cache, outputs = jax.jit(mixer.step), mixer.init_cache(B, x.shape[1]), []
  for a, b in zip((0, *cuts), (*cuts, x.shape[1])):
    options = {} if tokens is None else {"tokens": tokens[a:b]}
    y, cache = step(x[:, a:b], cache, **options)
    outputs.append(y)
  return jnp.concatenate(outputs, 1)


@cases(facts=["streaming"], patterns=["causal_self"])
def test_steps_equal_one_call(name, pattern):
  actual = steps(make(name, pattern), inputs(), (6, *range(7, T)))
  np.testing.assert_allclose(actual, compiled(name, pattern)(inputs()), **CLOSE)


@cases(facts=["streaming", "packed"], patterns=["causal_self"])
def test_prompts_padded_on_the_left_step_as_if_they_were_alone(name, pattern):
  pad, mixer = 2, make(name, pattern)
  where = Tokens.of_length(T, offset=-pad)
  tokens = dataclasses.replace(
    where, position=jnp.where(where.position >= 0, where.position, -1),
    index=jnp.maximum(where.position, 0),
  )  # fmt: skip
  actual = steps(mixer, inputs(), (6, 7, 8), tokens)
  expected = steps(mixer, inputs()[:, pad:], (4, 5, 6))
  np.testing.assert_allclose(actual[:, pad:], expected, **CLOSE)


@cases(facts=["packed"], patterns=["causal_self", "noncausal_self"])
def test_packed_documents_do_not_see_each_other(name, pattern):
  cut, pad = 5, 3
  where = Tokens.of_length(T)
  position = np.r_[np.arange(cut), np.arange(T - cut - pad), [-1] * pad][None]
  tokens = dataclasses.replace(where, position=position, segment=(where.index >= cut) + 0)
  entry = registry.get("mixers", name)
  config = {"name": name, **entry.tiny, **entry.patterns[pattern]}
  if "mask" in registry.arguments(entry.make):  # where documents meet is its to say
    config["mask"] = (config.get("mask", "causal"), "same_segment")
  mixer = registry.build("mixers", config, dim=D, rngs=nnx.Rngs(0))
  actual = jax.jit(lambda x, tokens: mixer(x, tokens=tokens))(inputs(), tokens)
  first, second = mixer(inputs()[:, :cut]), mixer(inputs()[:, cut : T - pad])
  np.testing.assert_allclose(actual[:, :cut], first, **CLOSE)
  np.testing.assert_allclose(actual[:, cut : T - pad], second, **CLOSE)
  assert np.isfinite(actual).all()


def sizes(name, pattern, length) -> int:
  shapes = jax.eval_shape(lambda: make(name, pattern).init_cache(B, length))
  return sum(x.size for x in jax.tree.leaves(shapes))


@cases(facts=["streaming"], patterns=["causal_self"])
def test_the_state_grows_as_declared(name, pattern):
  facts = registry.get("mixers", name).facts
  assert len(facts & {"constant_state", "linear_state"}) == 1, "declare how the state grows"
  small, large = sizes(name, pattern, 64), sizes(name, pattern, 128)
  assert (large == small) == ("constant_state" in facts) and large <= 2 * small


@cases(FIRST)
def test_what_does_not_stream_says_so(name, pattern):
  entry = registry.get("mixers", name)
  if "streaming" not in entry.facts:
    with pytest.raises((NotImplementedError, ValueError)):
      make(name, pattern).init_cache(B, T)


@cases(facts=["linear_in_values"])
def test_the_implicit_matrix_times_the_values_is_what_is_mixed(name, pattern):
  mixer, x = make(name, pattern), inputs()
  where = {"context": inputs(S, 2)} if "cross" in pattern else {}
  values = mixer.values(where.get("context", x))
  matrix = jax.jit(lambda x: implicit_attention(mixer, x, **where))(x)
  heads = jax.jit(lambda x: mixer.mix(x, values, **where))(x)
  repeated = jnp.repeat(values, matrix.shape[1] // values.shape[2], axis=2)
  np.testing.assert_allclose(
    jnp.einsum("bnts,bsnv->btnv", matrix, repeated), heads, rtol=1e-3, atol=1e-4
  )
  seen = jax.jit(lambda x: observe(mixer, x, **where)[1])(x)
  if name != "rg_lru":  # of which there would be a map for each of D channels
    np.testing.assert_allclose(seen["weights"], matrix, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(seen["heads"], heads, rtol=1e-3, atol=1e-4)
  later = np.abs(matrix[..., np.triu(np.ones(matrix.shape[2:], bool), 1)])
  rounding = 1e-6 * np.abs(matrix).max() if transforms(name, pattern) else 0.0
  assert (later.max() <= rounding) == ("noncausal" not in pattern)


@cases(FIRST)
def test_what_is_not_linear_in_values_says_so(name, pattern):
  if "linear_in_values" not in registry.get("mixers", name).facts:
    with pytest.raises(NotImplementedError):
      make(name, pattern).values(inputs())
