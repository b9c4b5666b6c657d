"""Building by name: the user must fit the entry, the surroundings are taken if wanted."""

import pathlib

import hypothesis
from hypothesis import strategies as st
import jax
import pytest
import specs

from attnx.core import registry

INTERFACES = [
  "masks", "transforms", "normalisers", "edits", "positions", "features", "combiners", "mixers",
  "caches", "analyses",
]  # fmt: skip
FACTS = {  # what each word means stands in the base class or in the `__init__.py` of the folder
  "masks": ["causal"],
  "transforms": ["relative"],
  "normalisers": ["nonnegative", "sums_to_one", "shift_invariant"],
  "edits": ["unbiased"],
  "positions": ["additive", "identity_at_zero", "keeps_norm", "relative"],
  "features": ["exponential", "nonnegative"],
  "combiners": ["balanced", "identity"],
  "mixers": [
    "any_length", "constant_state", "linear_in_values", "linear_state", "packed", "streaming",
  ],
  "caches": ["constant_state", "exact", "masked"],
  "analyses": ["by_example", "by_head", "by_layer"],
}  # fmt: skip


@pytest.mark.parametrize("interface", INTERFACES)
def test_every_file_of_an_interface_is_an_entry(interface):
  entries = [registry.get(interface, name) for name in registry.names(interface)]
  assert entries and all(isinstance(entry, registry.Entry) and entry.make for entry in entries)


def test_every_entry_says_where_it_comes_from():
  for interface in INTERFACES:
    for name in registry.names(interface):
      assert registry.get(interface, name).paper, f"{interface}.{name}"


@pytest.mark.parametrize("interface", INTERFACES)
def test_facts_are_words_that_a_contract_knows(interface):
  for name in registry.names(interface):
    entry = registry.get(interface, name)
    unknown = {fact.split(":")[0] for fact in entry.facts} - set(FACTS[interface])
    near = [registry.suggestion(fact, FACTS[interface]) for fact in unknown]
    assert not unknown, f"{interface}.{name} declares {unknown}; {near}"
    assert bool(entry.patterns) == (interface == "mixers"), f"{interface}.{name}.patterns"


@pytest.mark.parametrize("interface", ["masks", "transforms", "normalisers", "edits"])
def test_arrays_with_gradients_are_declared_as_parameters(interface):
  for name in registry.names(interface):
    part = specs.instance(interface, name)
    learned = any(map(specs.floating, jax.tree.leaves(part)))
    assert ("parameters" in part.needs) == learned, f"{interface}.{name}"


@pytest.mark.parametrize("given, words", [
  (dict(facts="causal"), "facts='causal' must be a set"),
  (dict(patterns={"causal_self"}), "patterns={'causal_self'} must be a mapping of causal_self"),
  (dict(patterns={"causal": {}}), "must be a mapping of causal_self, noncausal_self"),
])  # fmt: skip
def test_an_entry_that_is_none_is_refused(given, words):
  with pytest.raises(TypeError, match=words):
    registry.Entry(make=dict, paper="", **given)


def test_a_file_without_an_entry_is_named(monkeypatch):
  monkeypatch.delattr("attnx.mechanisms.masks.causal.ENTRY")
  with pytest.raises(TypeError, match="masks.causal must end with ENTRY = Entry"):
    registry.get("masks", "causal")


def test_every_entry_has_a_test_of_its_own():
  tests = pathlib.Path(__file__).parent
  names = {name for interface in INTERFACES for name in registry.names(interface)}
  found = {path.stem.removeprefix("test_") for path in tests.glob("**/test_*.py")}
  assert not names - found


def test_a_near_name_is_suggested():
  with pytest.raises(KeyError, match="has no 'casual'; did you mean 'causal'"):
    registry.build("masks", "casual")


def test_a_misspelt_argument_is_named():
  with pytest.raises(TypeError, match="masks.sliding_window takes no 'windw'; did you mean"):
    registry.build("masks", dict(name="sliding_window", windw=3))


def test_a_missing_argument_is_named():
  with pytest.raises(TypeError, match="transforms.alibi needs 'num_heads'"):
    registry.build("transforms", "alibi")


def test_the_surroundings_offer_and_the_user_decides():
  alibi = registry.build("transforms", "alibi", num_heads=4, dim=7)
  assert alibi.num_heads == 4
  chosen = registry.build("transforms", dict(name="alibi", num_heads=2), num_heads=4)
  assert chosen.num_heads == 2


def test_built_objects_pass_through():
  built = registry.build("masks", "causal")
  assert registry.build("masks", built) is built


EXTRA = st.dictionaries(st.text(max_size=4), st.integers(), max_size=2)


@hypothesis.given(st.text(max_size=8), EXTRA)
def test_any_name_and_arguments_raise_one_sentence_of_a_stated_kind(name, extra):
  hypothesis.assume(name not in registry.names("normalisers"))
  with pytest.raises((KeyError, TypeError, ValueError)) as error:
    registry.build("normalisers", {**extra, "name": name})
  assert len(error.value.args) == 1 and "normalisers" in error.value.args[0]
