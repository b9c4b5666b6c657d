"""Looking into models and changing them leaves them alone, and does what it says."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import models
from attnx.analysis.intervene import edited, patched, replaced, unrolled
from attnx.analysis.observe import gate_gradients, observe
from attnx.attention.transforms import ZeroHeads
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.nn.mixer import Mixer
from attnx.nn.sown import sown

B, T, D, N = 2, 6, 16, 4
ATTENTION = dict(name="attention", num_heads=N, num_kv_heads=2)
IDS = np.random.default_rng(0).integers(0, 11, (B, T))
CLOSE = dict(rtol=1e-4, atol=1e-5)
MIXER = "stack/blocks/1/mixer"


def decoder(depth: int = 3, **options) -> nnx.Module:
  config = dict(name="decoder_lm", vocab=11, dim=D, depth=depth, mixers=ATTENTION, **options)
  return models.build(config, rngs=nnx.Rngs(0))


@jax.jit
def run(model, ids=IDS):
  return model(ids)


@jax.jit
def look(model, ids=IDS):
  return observe(model, ids)


def leaves(model) -> list:
  flat = jax.tree.leaves_with_path(nnx.state(model))
  return [(jax.tree_util.keystr(path), np.asarray(x)) for path, x in flat]


def test_observing_gives_the_output_and_the_maps_and_leaves_the_model_alone():
  model = decoder()
  before, graph = leaves(model), nnx.split(model)[0]
  logits, seen = observe(model, IDS)
  np.testing.assert_array_equal(logits, model(IDS))
  assert nnx.split(model)[0] == graph
  assert all(a == c and (b == d).all() for (a, b), (c, d) in zip(before, leaves(model)))
  assert list(sown(seen, "weights", 4)) == [f"stack/blocks/{i}/mixer" for i in range(3)]
  weights, heads = seen[f"{MIXER}/weights"], seen[f"{MIXER}/heads"]
  assert weights.shape == (B, N, T, T) and heads.shape == (B, T, N, D // N)
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
  assert not np.triu(weights, 1).any()


def test_a_model_that_fails_while_it_is_observed_can_be_observed_again():
  model = decoder()
  with pytest.raises(Exception):
    observe(model, IDS[0])
  assert not any(hasattr(module, "__captures__") for _, module in nnx.iter_modules(model))


def test_layers_are_in_order_also_when_compiled():
  graph, state = nnx.split(decoder(depth=11))
  _, seen = jax.jit(lambda state: observe(nnx.merge(graph, state), IDS))(state)
  maps = sown(seen, "weights", 4)
  assert list(maps) == [f"stack/blocks/{i}/mixer" for i in range(11)]
  for path, x in observe(nnx.merge(graph, state), IDS)[1].items():
    np.testing.assert_allclose(seen[path], x, **CLOSE)


def test_remat_hides_nothing_and_a_scan_says_so_until_it_is_unrolled():
  _, expected = look(decoder())
  _, seen = look(decoder(remat="nothing"))
  assert seen.keys() == expected.keys()
  scanned = decoder(depth=4, scan=True)
  with pytest.raises(NotImplementedError, match="scan=False"):
    observe(scanned, IDS)
  logits, seen = look(unrolled(scanned))
  assert len(sown(seen, "weights", 4)) == 4 and scanned.stack.scan
  np.testing.assert_allclose(logits, run(scanned), **CLOSE)


def test_a_hybrid_that_was_scanned_unrolls_in_the_order_in_which_it_ran():
  mixers = [ATTENTION, dict(ATTENTION, position="rope")]
  config = dict(name="decoder_lm", vocab=11, dim=D, depth=4, mixers=mixers, scan=True)
  scanned = models.build(config, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(run(unrolled(scanned)), run(scanned), **CLOSE)


def test_an_encoder_and_a_decoder_are_seen_apart():
  config = dict(name="encoder_decoder", vocab=11, dim=D, depth=2, decoder=ATTENTION)
  model = models.build(config | dict(encoder=dict(ATTENTION, mask="everything")), rngs=nnx.Rngs(0))
  _, seen = observe(model, IDS, IDS[:, :4])
  assert seen["encoder/blocks/0/mixer/weights"].shape[2:] == (T, T)
  assert seen["decoder/blocks/1/cross/attention/weights"].shape[2:] == (4, T)


class Twice(nnx.Module):
  """Runs a mixer on a sequence and on a part of it."""

  def __init__(self, mixer: Mixer, cut: int):
    self.mixer, self.cut = mixer, cut

  def __call__(self, x):
    return self.mixer(self.mixer(x)[:, : self.cut])


def test_a_module_that_runs_twice_is_stacked_where_shapes_agree():
  x = jnp.ones((B, T, D))
  mixer = registry.build("mixers", ATTENTION, dim=D, rngs=nnx.Rngs(0))
  _, seen = observe(Twice(mixer, T), x)
  assert seen["mixer/weights"].shape == (2, B, N, T, T)
  with pytest.raises(ValueError, match="expected 4 axes"):
    sown(seen, "weights", 4)
  with pytest.raises(ValueError, match="calls of one shape"):
    observe(Twice(mixer, 3), x)


class Doubled(Mixer):
  """2 mixer(x)."""

  def __init__(self, mixer: Mixer):
    self.mixer = mixer

  def __call__(self, x, **options):
    return 2 * self.mixer(x, **options)


def test_a_replaced_submodule_is_wrapped_in_a_copy_only():
  model = decoder()
  expected = run(model)
  copy = replaced(model, MIXER, Doubled)
  assert isinstance(copy.stack.blocks[1].mixer, Doubled)
  assert np.abs(run(copy) - expected).max() > 1e-3
  out = replaced(model, f"{MIXER}/out", Doubled)
  np.testing.assert_allclose(run(out), run(copy), **CLOSE)
  np.testing.assert_array_equal(run(model), expected)
  _, seen = look(copy)
  assert f"{MIXER}/mixer/weights" in seen


class Skip(nnx.Module):
  """x."""

  def __call__(self, x, **options):
    return x


def test_a_block_of_a_list_can_be_replaced_by_the_identity():
  model = decoder()
  skip = replaced(model, "stack/blocks/0", lambda block: Skip())
  x = model.vocabulary(IDS, Tokens.of_length(T))
  for block in list(model.stack.blocks)[1:]:
    x = block(x)
  np.testing.assert_allclose(run(skip), model.vocabulary.logits(model.norm(x)), **CLOSE)
  with pytest.raises(TypeError, match="wrap gave a function for 'norm'; expected an nnx.Module"):
    replaced(model, "norm", lambda norm: lambda x: x)


@pytest.mark.parametrize("path, match", [
  ("stack/blocks/3/mixer", "there is no '3'"), ("stak", "did you mean 'stack'"),
])  # fmt: skip
def test_a_path_that_leads_nowhere_is_named(path, match):
  with pytest.raises(KeyError, match=match):
    replaced(decoder(), path, Doubled)


def test_changes_inside_of_a_scan_are_refused():
  scanned = decoder(scan=True)
  with pytest.raises(NotImplementedError, match="unrolled"):
    replaced(scanned, MIXER, Doubled)
  with pytest.raises(NotImplementedError, match="unrolled"):
    edited(scanned, {MIXER: ZeroHeads(N, (0,))})


def without(model, path: str, head: int):
  """The model whose output projection has lost the rows of a head."""

  def cut(module):
    module.out.kernel[...] = module.out.kernel[...].at[head].set(0.0)
    return module

  return replaced(model, path, cut)


def test_an_ablated_head_is_a_head_whose_output_rows_are_gone_also_in_decoding():
  model = decoder()
  copy = edited(model, {MIXER: ZeroHeads(N, (2,))})
  expected = run(without(model, MIXER, 2))
  np.testing.assert_allclose(run(copy), expected, **CLOSE)
  assert np.abs(run(model) - expected).max() > 1e-3
  cache = copy.init_cache(B, T)
  first, cache = copy.step(IDS[:, :4], cache)
  second, _ = copy.step(IDS[:, 4:], cache)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), expected, **CLOSE)
  _, seen = look(copy)
  assert not seen[f"{MIXER}/weights"][:, 2].any() and seen[f"{MIXER}/weights"][:, 1].any()


def test_edits_want_a_spec():
  with pytest.raises(TypeError, match="'stack/blocks/0/mlp' is a MLP, which has no spec"):
    edited(decoder(), {"stack/blocks/0/mlp": ZeroHeads(N, (0,))})


def test_patched_heads_read_what_is_given():
  model = decoder()
  _, here = look(model)
  _, there = look(model, IDS[::-1])
  path = f"{MIXER}/heads"
  same = patched(model, MIXER, [1, 3], here[path][:, :, np.array([1, 3])])
  np.testing.assert_allclose(run(same), run(model), **CLOSE)
  zero = patched(model, MIXER, [2], jnp.zeros(()))
  np.testing.assert_allclose(run(zero), run(without(model, MIXER, 2)), **CLOSE)
  every = patched(model, MIXER, range(N), there[path])
  assert np.abs(run(every) - run(model)).max() > 1e-4
  with pytest.raises(ValueError, match="must be some of 0 .. 3"):
    patched(model, MIXER, [4], jnp.zeros(()))(IDS)
  with pytest.raises(TypeError, match="no combiner"):
    patched(model, "stack/blocks/0/mlp", [0], jnp.zeros(()))


def nll(model, ids=IDS):
  return -jnp.sum(jax.nn.log_softmax(model(ids))[:, :-1] * jax.nn.one_hot(ids[:, 1:], 11))


def test_the_gradient_of_a_gate_is_what_a_head_reads_times_the_gradient_there():
  model = decoder(remat="nothing")
  _, seen = look(model)
  found = jax.jit(lambda: gate_gradients(nll, model))()
  heads = seen[f"{MIXER}/heads"]
  slope = jax.jit(jax.grad(lambda z: nll(patched(model, MIXER, range(N), z))))(heads)
  expected = jnp.einsum("btnv,btnv->bnt", heads, slope)
  assert len(found) == 3 and found[f"{MIXER}/gate_gradients"].shape == (B, N, T)
  np.testing.assert_allclose(found[f"{MIXER}/gate_gradients"], expected, rtol=1e-4, atol=1e-5)


def test_gates_of_one_example_feel_its_loss_only():
  model = decoder()
  both = jax.jit(lambda: gate_gradients(nll, model))()
  alone = jax.jit(lambda: gate_gradients(lambda model: nll(model, IDS[1:]), model))()
  for path, x in alone.items():
    np.testing.assert_allclose(both[path][1:], x, rtol=1e-4, atol=1e-5)


def test_seen_arrays_are_found_by_name():
  seen = {"a/2/weights": np.ones(3), "a/10/weights": np.ones(3), "a/2/heads": np.ones(3)}
  assert list(sown(seen, "weights", 1)) == ["a/2", "a/10"]
  assert list(sown({"weights": np.ones(3)}, "weights", 1)) == [""]
  with pytest.raises(ValueError, match="nothing sowed 'state'"):
    sown(seen, "state", 1)


def test_every_edit_of_a_spec_is_kept():
  first = edited(decoder(), {MIXER: ZeroHeads(N, (0,))})
  both = edited(first, {MIXER: ZeroHeads(N, (1,))})
  assert both.stack.blocks[1].mixer.spec.edits == (ZeroHeads(N, (0,)), ZeroHeads(N, (1,)))
  assert dataclasses.is_dataclass(first.stack.blocks[1].mixer.spec)
