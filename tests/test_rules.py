"""Shardings: the default, rules of the user, and rules that do not fit."""

import types

from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from attnx import models
from attnx.sharded import rules

SHAPES = {
  "params": {
    "embed": jax.ShapeDtypeStruct((64, 128), jnp.float32),
    "heads": jax.ShapeDtypeStruct((128, 4, 128), jnp.float32),
    "odd": jax.ShapeDtypeStruct((63, 65), jnp.float32),
    "bias": jax.ShapeDtypeStruct((128,), jnp.float32),
  },
  "step": jax.ShapeDtypeStruct((), jnp.int32),
}
POLICY = hypothesis.settings(derandomize=True, max_examples=60, deadline=None, database=None)


def specs(mesh, given=()):
  return jax.tree.map(lambda place: place.spec, rules.shardings(SHAPES, mesh, given))


def test_the_default_splits_the_last_of_the_longest_axes_of_large_arrays():
  found = specs(rules.make_mesh(fsdp=8))
  assert found["params"]["embed"] == PartitionSpec(None, "fsdp")
  assert found["params"]["heads"] == PartitionSpec(None, None, "fsdp")
  assert found["params"]["odd"] == found["params"]["bias"] == found["step"] == PartitionSpec()


def test_without_fsdp_everything_is_everywhere():
  assert set(jax.tree.leaves(specs(rules.make_mesh()))) == {PartitionSpec()}


def test_the_first_rule_that_matches_a_path_decides():
  given = [("params.embed", ("fsdp", "data")), ("params", ()), ("embed", ("data",))]
  found = specs(rules.make_mesh(data=2, fsdp=4), given)
  assert found["params"]["embed"] == PartitionSpec("fsdp", "data")
  assert found["params"]["heads"] == PartitionSpec()


def test_rules_may_be_lists_as_a_config_file_makes_them():
  mesh = rules.make_mesh(fsdp=8)
  assert specs(mesh, [["embed", [None, "fsdp"]]]) == specs(mesh, (("embed", (None, "fsdp")),))


@pytest.mark.parametrize("rule, words", [
  (("embed", ("data", None, None)), r"gives \('data', None, None\) to params.embed, whose shape"),
  (("embed", ("model",)), "gives params.embed the axes .*; expected None or, once each"),
  (("embed", ("fsdp", "fsdp")), "gives params.embed the axes .*; expected None or, once each"),
  (("embed", (("data", "fsdp"),)), "gives params.embed the axes"),
  (("odd", ("fsdp",)), r"fsdp=4 does not divide the shape \(63, 65\) of params.odd"),
  (("step", (None,)), r"gives \(None,\) to step, whose shape is \(\)"),
  (("(", ()), "'\\(' is not a regular expression: missing \\)"),
  ("embed", "is a pair"), (("embed",), "is a pair"), (("embed", "fsdp"), "is a pair"),
  ((1, ()), "is a pair"), (None, "is a pair"), ({"embed": ()}, "is a pair"),
])  # fmt: skip
def test_rules_that_do_not_fit_say_so(rule, words):
  with pytest.raises(ValueError, match=words) as error:
    specs(rules.make_mesh(data=2, fsdp=4), [rule])
  assert "\n" not in str(error.value)


AXES = st.lists(st.sampled_from([None, "data", "fsdp", "", 3]), max_size=4)
ANY = st.one_of(st.none(), st.integers(), st.text(max_size=3), AXES)


@POLICY
@hypothesis.given(st.lists(st.tuples(st.text(max_size=3), ANY) | ANY, max_size=3))
def test_any_rules_give_shardings_that_arrays_can_have_or_one_sentence(given):
  mesh = rules.make_mesh(data=4, fsdp=2)
  try:
    places = rules.shardings(SHAPES, mesh, given)
  except ValueError as error:
    assert "\n" not in str(error) and str(error)
    return
  jax.tree.map(lambda x, place: place.shard_shape(x.shape), SHAPES, places)


@POLICY
@hypothesis.given(st.integers(-3, 20), st.integers(-3, 20))
def test_a_mesh_has_every_device_or_is_refused(data, fsdp):
  wanted = 8 // fsdp if data == -1 and fsdp > 0 else data
  if wanted > 0 and fsdp > 0 and wanted * fsdp == 8:
    sizes = dict(data=wanted, fsdp=fsdp, tensor=1, seq=1)
    assert dict(rules.make_mesh(data=data, fsdp=fsdp).shape) == sizes
  else:
    with pytest.raises(ValueError, match=f"times fsdp={fsdp} .* must be the 8 devices"):
      rules.make_mesh(data=data, fsdp=fsdp)


def test_parameters_of_models_are_split_by_heads_and_hidden_channels_and_kept_apart():
  model = dict(vocab=64, dim=64, depth=1, mixers="attention", name="decoder_lm")
  shapes = nnx.eval_shape(lambda: models.build(model, rngs=nnx.Rngs(0)))
  shapes = nnx.split(shapes)[1]
  found = rules.shardings(shapes, rules.make_mesh(data=2, fsdp=2, tensor=2))
  specs = {rules.name(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(found)}
  block = {k.removeprefix("stack.blocks.0."): v for k, v in specs.items()}
  assert block["mixer.query.kernel"] == PartitionSpec("fsdp", "tensor")
  assert block["mixer.out.kernel"] == PartitionSpec("tensor", None, "fsdp")
  assert block["mlp.up.kernel"] == PartitionSpec("fsdp", "tensor")
  assert block["mlp.out.kernel"] == PartitionSpec("tensor", "fsdp")
  assert specs["vocabulary.embed.embedding"] == PartitionSpec("tensor", "fsdp")
  assert block["norms.0.scale"] == PartitionSpec()


def test_a_batch_is_spread_over_rows_and_tokens():
  mesh = rules.make_mesh(data=2, tensor=2, seq=2)
  batch = dict(x=np.arange(32).reshape(4, 8), y=np.arange(4), odd=np.zeros((4, 7)))
  placed = rules.place(batch, mesh)
  assert placed["x"].sharding.spec == PartitionSpec(("data", "fsdp"), "seq")
  assert placed["odd"].sharding.spec == placed["y"].sharding.spec == PartitionSpec(rules.ROWS)
  assert placed["x"].addressable_shards[-1].data.tolist() == [[20, 21, 22, 23], [28, 29, 30, 31]]
  jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_a_batch_is_spread_over_all_devices_in_order():
  mesh = rules.make_mesh(data=2, fsdp=4)
  batch = rules.place(dict(x=np.arange(32).reshape(16, 2)), mesh)["x"]
  assert batch.sharding.spec == PartitionSpec(("data", "fsdp"), "seq")
  assert [shard.data.tolist()[0][0] for shard in batch.addressable_shards] == [*range(0, 32, 4)]
  np.testing.assert_array_equal(batch, np.arange(32).reshape(16, 2))


class Processes:
  """A mesh of devices, each of which is the process that it is of."""

  def __init__(self, devices, **shape):
    self.devices = np.vectorize(lambda p: types.SimpleNamespace(process_index=p))(devices)
    self.shape = dict(fsdp=1) | shape


@pytest.mark.parametrize("devices, index, expected", [
  ([[0, 0], [1, 1]], 1, (1, 2)),  # rows of their own
  ([[0, 1], [0, 1]], 1, (0, 1)),  # tokens of the same rows
  ([[0, 1], [0, 1], [2, 3], [2, 3]], 3, (1, 2)),  # two and two
])  # fmt: skip
def test_processes_that_share_rows_load_the_same(monkeypatch, devices, index, expected):
  monkeypatch.setattr(jax, "process_index", lambda: index)
  devices = np.array(devices)
  assert rules.share(Processes(devices, data=devices.shape[0])) == expected


def test_rows_that_fall_unevenly_on_processes_are_refused(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with pytest.raises(ValueError, match="3 shares of a batch do not fall evenly on"):
    rules.share(Processes(np.array([[0], [0], [1]]), data=3))


def test_names_are_dotted_paths():
  found = jax.tree_util.tree_leaves_with_path(dict(a=[0, dict(b=1)]))
  assert [rules.name(path) for path, _ in found] == ["a.0", "a.1.b"]
