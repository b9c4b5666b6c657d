"""The contract of analyses: pure functions of what was seen, whose shape is what they declare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core import registry

B, N, T, LAYERS = 3, 4, 5, 12
NAMES = registry.names("analyses")
FACTS = {"by_layer", "by_example", "by_head"}
RNG = np.random.default_rng(0)


def facts(name: str):
  return registry.get("analyses", name).facts


def analysis(name: str):
  return registry.build("analyses", dict(registry.get("analyses", name).tiny, name=name))


def softmax(scores) -> np.ndarray:
  e = np.where(np.tri(scores.shape[-1], dtype=bool), np.exp(scores), 0.0)
  return (e / e.sum(-1, keepdims=True)).astype(np.float32)


SEEN = {
  f"stack/blocks/{i}/mixer/{name}": x
  for i in range(LAYERS)
  for name, x in dict(
    weights=softmax(RNG.normal(size=(B, N, T, T))),
    gate_gradients=RNG.normal(size=(B, N, T)).astype(np.float32),
  ).items()
}


def layers(result, name: str) -> dict:
  return result if "by_layer" in facts(name) else {"": result}


def close(actual, expected) -> bool:
  same = jax.tree.map(lambda a, b: bool(np.allclose(a, b, rtol=1e-4, atol=1e-6)), actual, expected)
  return jax.tree.all(same)


@pytest.mark.parametrize("name", NAMES)
def test_the_result_has_the_layers_that_are_declared(name):
  result = analysis(name)(SEEN)
  assert facts(name) <= FACTS and isinstance(result, dict) == ("by_layer" in facts(name))
  if "by_layer" in facts(name):
    assert list(result) == [f"stack/blocks/{i}/mixer" for i in range(LAYERS)]


@pytest.mark.parametrize("name", NAMES)
def test_permuting_heads_permutes_the_result_or_changes_nothing(name):
  order = np.array([2, 0, 3, 1])
  before = layers(analysis(name)(SEEN), name)
  after = layers(analysis(name)({path: x[:, order] for path, x in SEEN.items()}), name)
  axis = int("by_example" in facts(name))
  moved = {path: jnp.take(x, order, axis) if "by_head" in facts(name) else x
           for path, x in before.items()}  # fmt: skip
  assert close(after, moved) and close(after, before) == ("by_head" not in facts(name))


@pytest.mark.parametrize("name", NAMES)
def test_permuting_examples_permutes_the_result_or_changes_nothing(name):
  order = np.array([2, 0, 1])
  before = layers(analysis(name)(SEEN), name)
  after = layers(analysis(name)({path: x[order] for path, x in SEEN.items()}), name)
  moved = {path: x[order] if "by_example" in facts(name) else x for path, x in before.items()}
  assert close(after, moved) and close(after, before) == ("by_example" not in facts(name))


@pytest.mark.parametrize("name", NAMES)
def test_examples_do_not_see_each_other(name):
  whole, alone = analysis(name)(SEEN), [
    analysis(name)({path: x[b : b + 1] for path, x in SEEN.items()}) for b in range(B)
  ]
  join = jnp.concatenate if "by_example" in facts(name) else lambda parts: sum(parts) / B
  assert close(jax.tree.map(lambda *parts: join(parts), *alone), whole)


@pytest.mark.parametrize("name", NAMES)
def test_compiling_changes_nothing_though_it_sorts_layers_as_text(name):
  assert close(jax.jit(analysis(name))(SEEN), analysis(name)(SEEN))


@pytest.mark.parametrize("name", NAMES)
def test_what_else_was_seen_does_not_matter_and_nothing_is_written(name):
  more = dict(SEEN) | {"stack/blocks/0/mixer/state": np.full((2, 3), np.nan), "decays": np.ones(1)}
  keys, copies = list(more), [x.copy() for x in more.values()]
  assert close(analysis(name)(more), analysis(name)(SEEN))
  assert list(more) == keys
  assert all(np.array_equal(x, c, equal_nan=True) for x, c in zip(more.values(), copies))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named(name):
  with pytest.raises(ValueError, match="nothing sowed '(weights|gate_gradients)' among decays"):
    analysis(name)({"decays": np.ones(3)})


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_measured_in_float32(name):
  low = {path: jnp.asarray(x, jnp.bfloat16) for path, x in SEEN.items()}
  for x in jax.tree.leaves(analysis(name)(low)):
    assert x.dtype == jnp.float32 and np.isfinite(x).all()


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_zeros_have_finite_results_and_gradients(name):
  nothing = {path: jnp.zeros_like(x) for path, x in SEEN.items()}
  total = lambda seen: sum(x.sum() for x in jax.tree.leaves(analysis(name)(seen)))
  value, slope = jax.value_and_grad(total)(nothing)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(slope))
