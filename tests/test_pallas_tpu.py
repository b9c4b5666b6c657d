"""The streaming kernels in interpret mode: every entry whose parts work tile by tile."""

import dataclasses
import functools
import math

from flax import nnx
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from specs import B, N, SAME, assert_near, floating, inputs, instance, packed, wide

from attnx.attention import (
  AttentionSpec, api, explain, masks, pallas_tpu, reference, transforms,
)  # fmt: skip
from attnx.attention.handed import hand_over
from attnx.attention.partial import merge
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.sharded.rules import AXES
from attnx.sharded.sequence import over
from attnx.sharded.ulysses import numbered
from pallas_kernels.blocks import Blocks, Chosen
from pallas_kernels.tpu import streaming

T, S = 150, 200  # no tile divides them
BLOCKS, LYING = (Chosen(*[Blocks(128, 128, 128, 128, 0, lying)] * 2) for lying in (False, True))
both = pytest.mark.parametrize("cut", [BLOCKS, LYING], ids=["standing", "lying"])
INTERFACES = ("masks", "transforms", "normalisers", "edits")
ENTRIES = [(interface, name) for interface in INTERFACES for name in registry.names(interface)]
ROWS = {"entmax15", "lssa", "lssar", "sparsemax", "talking_heads"}
REFUSED = {("normalisers", name) for name in ROWS}
FIT = [entry for entry in ENTRIES if entry not in REFUSED]


def spec_of(interface: str, name: str) -> AttentionSpec:
  """A causal, packed spec with an entry in its place."""
  if (interface, name) == ("masks", "top_k_blocks"):
    scores = np.random.default_rng(2).standard_normal((B, N, 10, 13))
    blocks = dict(scores=scores, top_k=5, q_block=16, k_block=16)
    part = registry.build(interface, dict(blocks, name=name))
  else:
    part = instance(interface, name)
  if interface == "masks":
    return AttentionSpec(mask=part)
  mask = masks.Causal() & SAME
  if interface == "normalisers":
    return AttentionSpec(mask=mask, normaliser=part)
  spec = AttentionSpec(mask=mask, **{interface: (part,)})
  return dataclasses.replace(spec, readouts=())  # relative values are refused


def run(partial, spec, qkv, q_tokens, k_tokens):
  """The partial, and the gradients of a loss that all of it but its unit has a share in."""
  leaves, tree = jax.tree.flatten((qkv, spec))
  moving = [floating(x) for x in leaves]

  @jax.jit
  def loss(given, q_tokens, k_tokens):
    rest = iter(given)
    qkv, spec = tree.unflatten([next(rest) if m else x for x, m in zip(leaves, moving)])
    p = partial(*qkv, spec, q_tokens, k_tokens)
    mass = p.mass * jnp.exp(jnp.where(jnp.isneginf(p.peak), 0.0, p.peak - 3))
    return jnp.sin(spec.finish(p)).sum() + jnp.log1p(mass).sum(), (spec.finish(p), p.count)

  given = [x for x, m in zip(leaves, moving) if m]
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  return gradient(given, q_tokens, k_tokens)


def kernel(blocks: Chosen = BLOCKS):
  return functools.partial(pallas_tpu.partial, blocks=blocks, interpret=True)


def exact(spec, qkv, *tokens):
  with jax.enable_x64(True):
    return run(reference.partial, wide(spec), wide(qkv), *tokens)


@both
@pytest.mark.parametrize("entry", FIT, ids="-".join)
def test_an_entry_in_the_kernel_is_the_reference_in_values_and_gradients(entry, cut):
  qkv, tokens = inputs(T, S, np.float32), (packed(T), packed(S))
  spec = spec_of(*entry)
  assert pallas_tpu.unfit(*qkv, spec) is None
  traced = jax.tree.map(jnp.asarray, tokens)  # an argument of jit: planned at run time
  assert_near(run(kernel(cut), spec, qkv, *traced), exact(spec, qkv, *tokens), 4e-6)


@pytest.mark.parametrize("entry", sorted(REFUSED), ids="-".join)
def test_what_does_not_work_by_tile_is_refused_with_a_sentence(entry):
  qkv, spec = inputs(T, S, np.float32), spec_of(*entry)
  if "row" in spec.needs:  # not offered: the choice of an implementation says so
    return
  assert "tiles" in pallas_tpu.unfit(*qkv, spec)


WIDTHS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]


def arguments(H: int, V: int, dtype=np.float32, heads=(4, 2), lengths=(T, S)):
  rng = np.random.default_rng(3)
  (t, s), (n, k) = lengths, heads
  shapes = ((1, t, n, H), (1, s, k, H), (1, s, k, V))
  return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@both
@pytest.mark.parametrize("widths", [*WIDTHS, (24, 20)], ids=str)
def test_heads_of_any_width_share_keys(widths, cut):
  spec, qkv = AttentionSpec(mask=masks.Causal()), arguments(*widths)
  tokens = Tokens.of_length(T, offset=60), Tokens.of_length(S)
  assert_near(run(kernel(cut), spec, qkv, *tokens), exact(spec, qkv, *tokens), 2e-6)


@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize("pieces", [(256, 128, 0), (128, 256, 1), (128, 128, 3)], ids=str)
def test_pieces_and_what_is_started_ahead_change_nothing(pieces, lying):
  cut = Chosen(*[Blocks(256, 256, *pieces, lying)] * 2)
  spec = AttentionSpec(mask=masks.Causal(), transforms=(transforms.SoftCap(2.0),))
  qkv = arguments(32, 16, lengths=(300, 500))
  tokens = Tokens.of_length(300), Tokens.of_length(500)
  assert_near(run(kernel(cut), spec, qkv, *tokens), exact(spec, qkv, *tokens), 2e-6)


@pytest.mark.parametrize("pieces", [(256, 128, 1), (128, 256, 1)], ids=str)
def test_pieces_that_are_not_square_are_told_where_they_are(pieces):
  """Of bfloat16 heads of 128, whose factor is on queries and keys where sums lie."""
  cut = Chosen(*[Blocks(256, 256, *pieces, True)] * 2)
  spec, qkv = BFLOAT16["biased"], arguments(128, 64, jnp.bfloat16, lengths=(300, 500))
  tokens = Tokens.of_length(300, offset=200), Tokens.of_length(500)
  actual = run(kernel(cut), spec, qkv, *tokens)
  expected = exact(spec, tuple(x.astype(jnp.float32) for x in qkv), *tokens)
  assert_near(actual[1], expected[1], 2**-8)
  assert_near(actual[0], expected[0], 8 * 2**-8)


@both
@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize("mask", [masks.Window(100), masks.Window(100) & SAME], ids=["", "empty"])
def test_the_copies_of_query_gradients_do_not_race(mask, mode, cut):
  """A block twice in a row, and lines of one visit or of none; two heads share keys."""
  spec, qkv = AttentionSpec(mask=mask), arguments(64, 64, lengths=(384, 384))
  segment = np.repeat(np.arange(3, dtype=np.int32), 128)[None]
  sides = [dataclasses.replace(Tokens.of_length(384), segment=s) for s in (segment, 2 * segment)]
  detect = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
  emulated = functools.partial(pallas_tpu.partial, blocks=cut, interpret=detect)
  assert_near(run(emulated, spec, qkv, *sides), exact(spec, qkv, *sides), 2e-6)
  assert not interpret_pallas_call.races.races_found


ALIBI = registry.build("transforms", dict(name="alibi", num_heads=4))
BFLOAT16 = {
  "softmax": AttentionSpec(mask=masks.Causal() & masks.Window(90)),
  "biased": AttentionSpec(
    mask=masks.Causal(), transforms=(transforms.SoftCap(5.0), ALIBI),
  ),
  "relu": AttentionSpec(mask=masks.Causal(), normaliser=registry.build("normalisers", "relu")),
  "cog": AttentionSpec(mask=masks.Causal(), normaliser=registry.build("normalisers", "cog")),
  "widened": AttentionSpec(
    mask=masks.Causal(), transforms=(instance("transforms", "rotary_bias"),)
  ),
}


@both
@pytest.mark.parametrize("H", [64, 128])  # twice 128 fits a matrix unit that sums lie for
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_off_by_a_few_roundings(name, H, cut):
  spec, qkv = BFLOAT16[name], arguments(H, 64, jnp.bfloat16)
  tokens = Tokens.of_length(T), Tokens.of_length(S)
  assert pallas_tpu.unfit(*qkv, spec) is None
  wide_qkv = tuple(x.astype(jnp.float32) for x in qkv)  # the same numbers
  gradient, value = run(kernel(cut), spec, qkv, *tokens)
  exact_gradient, exact_value = exact(spec, wide_qkv, *tokens)
  assert_near(value, exact_value, 2**-8)  # weights are rounded once, by 2^-9
  assert_near(gradient, exact_gradient, 8 * 2**-8)  # so are cotangents, of which sums of V cancel


@both
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", BFLOAT16)
def test_the_kernel_divides_and_rounds_where_weights_rescale(name, dtype, cut, monkeypatch):
  spec, qkv, outputs = BFLOAT16[name], arguments(64, 64, dtype), []
  tokens = Tokens.of_length(T, offset=S - 20), Tokens.of_length(S)  # the window leaves the keys
  forward = streaming.forward

  def spy(*args, **how):
    outputs.append(forward(*args, **how))
    return outputs[-1]

  monkeypatch.setattr(streaming, "forward", spy)
  p, divided = kernel(cut)(*qkv, spec, *tokens), name != "relu"
  ((out, _),) = outputs
  assert out.dtype == (dtype if divided else np.float32)
  assert (p.whole is not None) == divided
  with jax.enable_x64(True):
    expected = reference.partial(*wide([x.astype(np.float32) for x in qkv]), spec, *tokens)
  p, expected = jax.tree.map(np.asarray, (p, expected))
  total = lambda p: p.mass * np.exp(np.where(np.isneginf(p.peak), 0.0, p.peak))
  weights = cut is LYING and name != "cog"  # the mass is of rounded ones
  rounded = dtype == jnp.bfloat16 and (weights or name == "widened")  # as what is appended to q is
  assert_near(total(p), total(expected), 2**-9 if rounded else 4e-6)
  np.testing.assert_array_equal(p.mass == 0, expected.mass == 0)
  assert (name != "softmax") or (p.mass == 0).any()


@both
def test_weights_that_are_all_zero_move_nothing(cut):
  """Scores of zero have no sign: there is a highest one, and no mass."""
  spec, (q, k, v) = BFLOAT16["cog"], arguments(64, 64)
  qkv, tokens = (q.at[:, 40:].set(0), k, v), (Tokens.of_length(T), Tokens.of_length(S))
  actual = run(kernel(cut), spec, qkv, *tokens)
  assert_near(actual, exact(spec, qkv, *tokens), 4e-6)
  assert not actual[1][0][:, 40:].any()


def test_a_plan_made_on_the_host_is_the_plan_made_at_run_time():
  spec = AttentionSpec(mask=masks.Causal() & SAME)
  qkv, tokens = inputs(T, S, np.float32), (packed(T), packed(S))
  host = lambda *qkv: kernel()(*qkv, spec, *tokens)
  traced = lambda qkv, tokens: kernel()(*qkv, spec, *tokens)
  jax.tree.map(np.testing.assert_array_equal, jax.jit(host)(*qkv), jax.jit(traced)(qkv, tokens))


@both
def test_rows_that_see_nothing_are_zero_and_move_nothing(cut):
  nothing = AttentionSpec(mask=masks.Causal() & ~masks.Causal())
  tokens = packed(T), packed(S)
  gradient, (out, count) = run(kernel(cut), nothing, inputs(T, S, np.float32), *tokens)
  assert not out.any() and not count.any() and not any(g.any() for g in gradient)
  some = AttentionSpec(mask=masks.Causal() & ~masks.Window(2))
  gradient, (out, _) = run(kernel(cut), some, inputs(T, S, np.float32), *tokens)
  assert not out[:, :3].any() and out[0, 3:70].any()
  assert all(np.isfinite(g).all() for g in gradient) and not gradient[0][:, :3].any()


def test_partials_of_the_kernel_merge_with_those_of_the_reference():
  spec, (q, k, v) = AttentionSpec(mask=masks.Causal()), arguments(32, 16)
  where = Tokens.of_length(S)
  pieces = [(kernel(), slice(0, 130)), (reference.partial, slice(130, S))]
  tokens = Tokens.of_length(T, offset=50)
  parts = [f(q, k[:, at], v[:, at], spec, tokens, where[at]) for f, at in pieces]
  expected = spec.finish(reference.partial(q, k, v, spec, tokens, where))
  np.testing.assert_allclose(spec.finish(merge(*parts)), expected, rtol=2e-5, atol=2e-6)


BIASES = [(1, 4, T, S), (2, 1, 1, S), (1, 4, T, 1), (2, 1, T, S), (1, 1, 1, 1)]


@both
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_learned_arrays_of_pairs_have_gradients_of_their_shape(shape, cut):
  bias = jnp.asarray(np.random.default_rng(4).standard_normal(shape), jnp.float32)
  spec = AttentionSpec(mask=masks.Causal(), transforms=(transforms.Add(bias),))
  qkv, tokens = inputs(T, S, np.float32), (packed(T), packed(S))
  (*_, gradient), _ = actual = run(kernel(cut), spec, qkv, *tokens)
  assert gradient.shape == shape
  assert_near(actual, exact(spec, qkv, *tokens), 4e-6)


def test_shards_of_a_mesh_have_values_and_gradients_of_their_own():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  dropout = transforms.Dropout(np.array([0, 7], np.uint32), 0.4)
  spec = AttentionSpec(mask=masks.Causal(), edits=(dropout,))
  qkv, tokens = inputs(T, S, np.float32), (Tokens.of_length(T), Tokens.of_length(S))

  def sharded(q, k, v, spec, *tokens):
    def here(q, k, v):
      first = jax.lax.axis_index("data") * q.shape[0]
      return kernel()(q, k, v, numbered(spec, batch=first), *tokens)

    rows = jax.sharding.PartitionSpec("data")
    return jax.shard_map(here, mesh=mesh, in_specs=rows, out_specs=rows)(q, k, v)

  assert_near(run(sharded, spec, qkv, *tokens), exact(spec, qkv, *tokens), 4e-6)


def closes_over_an_array(batch, head, q, k):
  return jnp.asarray(np.arange(9) % 2 == 0)[k % 9]


def gathers(scores, batch, head, q, k):
  return scores + jnp.take(jnp.arange(9.0), k % 9)


@pytest.mark.parametrize("mods, says", [
  (dict(mask_mod=closes_over_an_array), "arrays"), (dict(score_mod=gathers), "gather"),
])  # fmt: skip
def test_functions_that_no_tile_can_compute_are_refused(mods, says):
  assert says in pallas_tpu.unfit(*inputs(T, S, np.float32), AttentionSpec.from_mods(**mods))


def test_functions_of_coordinates_run_in_the_kernel():
  spec = AttentionSpec.from_mods(
    lambda b, n, q, k: (k <= q) | (n == 1), lambda s, b, n, q, k: s - 0.1 * (q - k) * (n + b)
  )
  qkv, tokens = inputs(T, S, np.float32), (Tokens.of_length(T), Tokens.of_length(S))
  assert pallas_tpu.unfit(*qkv, spec) is None
  assert_near(run(kernel(), spec, qkv, *tokens), exact(spec, qkv, *tokens), 4e-6)


def test_what_cannot_run_says_why():
  q, k, v = arguments(64, 64)
  assert "TPU" in pallas_tpu.refusal(q, k, v, AttentionSpec())
  assert "bfloat16" in pallas_tpu.unfit(q, k.astype(jnp.bfloat16), v, AttentionSpec())
  shaw = AttentionSpec(transforms=(instance("transforms", "shaw"),))
  assert "RelativeValues" in pallas_tpu.unfit(*inputs(T, S, np.float32), shaw)
  long = jax.ShapeDtypeStruct((64, 2**20, 1, 64), jnp.bfloat16)
  assert "tiles" in pallas_tpu.unfit(long, long, long, AttentionSpec())


def test_explain_tells_the_tiles_of_the_kernel_and_how_it_cuts_them():
  shape = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
  explanation = explain(shape, shape, shape, AttentionSpec(mask=masks.Causal()))
  tiles = explanation.tiles["pallas_tpu"]
  assert tiles.empty and tiles.partial and tiles.full
  assert f"tiles of {tiles.q_chunk} x {tiles.k_chunk} in pieces of" in str(explanation)


FEW = [("masks", "causal"), ("masks", "sink_window"), ("masks", "top_k_blocks"),
       ("transforms", "alibi"), ("transforms", "t5_bias"), ("transforms", "music_relative"),
       ("transforms", "rotary_bias"), ("normalisers", "relu"), ("normalisers", "sink"),
       ("edits", "dropout")]  # fmt: skip


@pytest.mark.parametrize("entry", FEW, ids="-".join)
def test_a_few_queries_are_decoded_to_the_same_values(entry):
  (q, k, v), spec = inputs(T, S, np.float32), spec_of(*entry)
  rows = slice(100, 103)
  tokens = packed(T)[rows], packed(S)
  decode = jax.jit(lambda q, k, v: spec.finish(kernel()(q, k, v, spec, *tokens)))
  expected = spec.finish(reference.partial(q[:, rows], k, v, spec, *tokens))
  np.testing.assert_allclose(decode(q[:, rows], k, v), expected, rtol=2e-5, atol=2e-6)
  assert "attnx_decode" in str(decode.trace(q[:, rows], k, v).jaxpr)


@pytest.mark.parametrize("name", BFLOAT16)
def test_a_few_queries_of_bfloat16_are_decoded_within_a_rounding(name):
  spec, (q, k, v) = BFLOAT16[name], arguments(64, 64, jnp.bfloat16)
  tokens = Tokens.of_length(3, offset=100), Tokens.of_length(S)
  actual = spec.finish(kernel()(q[:, 100:103], k, v, spec, *tokens))
  given = (x.astype(jnp.float32) for x in (q[:, 100:103], k, v))
  assert_near(actual, spec.finish(reference.partial(*given, spec, *tokens)), 2**-8)


def test_a_few_queries_have_gradients():
  spec, (q, k, v) = AttentionSpec(mask=masks.Causal()), arguments(32, 16)
  qkv, tokens = (q[:, 100:103], k, v), (Tokens.of_length(3, offset=160), Tokens.of_length(S))
  assert_near(run(kernel(), spec, qkv, *tokens), exact(spec, qkv, *tokens), 2e-6)


MESHES = [(2, 1, 1, 1), (1, 1, 2, 1)]  # data, fsdp, tensor, seq: plans that differ by device
# are beyond the emulators, so that tests/test_tpu_compile.py compiles a ring instead


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_attention_over_a_mesh_of_tpus_runs_in_kernels(sizes, monkeypatch):
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  mesh = jax.make_mesh(sizes, AXES, auto, devices=jax.devices()[: math.prod(sizes)])
  calls = []

  def emulated(*args):
    calls.append(args[0].shape)
    return kernel()(*args)

  as_there = dataclasses.replace(api.IMPLEMENTATIONS["pallas_tpu"], partial=emulated)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_tpu", as_there)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  spec, qkv = AttentionSpec(mask=masks.Causal()), inputs(256, 256, np.float32)
  tokens = Tokens.of_length(256), Tokens.of_length(256)

  def over_devices(*args):
    with over(mesh):
      return api.attend_partial(*args[:4], q_tokens=args[4], k_tokens=args[5])

  assert_near(run(over_devices, spec, qkv, *tokens), exact(spec, qkv, *tokens), 4e-6)
  assert calls


def test_kernels_are_not_left_to_xla_to_split(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert "shard_map" in pallas_tpu.refusal(*arguments(64, 64), AttentionSpec())


def cuts(spec: AttentionSpec, length: int = 4096, traced: bool = False) -> Chosen:
  """The blocks of a call of bfloat16 heads of 128, without its arrays; tokens may be traced."""
  found: list[Chosen] = []
  x = jax.ShapeDtypeStruct((1, length, 4, 128), jnp.bfloat16)
  known = Tokens.of_length(length), Tokens.of_length(length)

  def look(q, spec, given):
    tokens = given if traced else known
    handed = hand_over(spec, q, *tokens)
    found.append(pallas_tpu.cut(spec, q, q, *tokens, handed))

  jax.eval_shape(look, x, spec, known)
  return found[0]


def test_blocks_are_smaller_where_a_mask_or_arrays_want_it():
  full, window = (cuts(AttentionSpec(mask=m)) for m in (masks.Everything(), masks.Window(255)))
  causal, long = (cuts(AttentionSpec(mask=masks.Causal()), length) for length in (4096, 2**15))
  size = lambda chosen: chosen.forward.q * chosen.forward.k
  assert size(window) < size(causal) <= size(full) == size(long)
  assert min(window.forward.q, window.forward.k) >= 512
  packed = cuts(AttentionSpec(mask=masks.Causal() & SAME), 2**15, traced=True)
  assert size(packed) < size(long)
  bias = transforms.Add(jax.ShapeDtypeStruct((1, 4, 4096, 4096), jnp.float32))
  biased = cuts(AttentionSpec(transforms=(bias,)))
  assert biased.backward.q * biased.backward.k <= 2**19
  table = registry.build("transforms", "t5_bias", num_heads=4, rngs=nnx.Rngs(0))
  assert cuts(AttentionSpec(transforms=(table,))).backward.rows == 128
