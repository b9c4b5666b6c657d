"""The streaming kernel for Hopper GPUs: its numbers in interpret mode, and that it compiles.

The interpreter has threads, barriers and copies, so that what they do is what a chip would do;
products are those of the CPU. What compiles ahead of time says nothing about numbers.
"""

import dataclasses
import functools

import ahead
from flax import nnx
import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
import jax.numpy as jnp
import numpy as np
import pytest
from specs import SAME, assert_near

from attnx.attention import AttentionSpec, masks, mosaic_gpu, reference, transforms
from attnx.core import registry
from attnx.core.tokens import Tokens
from pallas_kernels import blocks
from pallas_kernels.gpu import streaming, tiles
from pallas_kernels.gpu.tiles import Blocks, Chosen, Order, choose, lists
from pallas_kernels.visits import EMPTY, FULL, PARTIAL

pytestmark = pytest.mark.usefixtures("compiled_once")
T, S = 150, 100  # no tile divides them
INTERPRET = InterpretGPUParams()
BLOCKS = Chosen(*[Blocks(64, 64, 2, 2)] * 3)
ROUNDED = {jnp.dtype(jnp.bfloat16): 2**-8, jnp.dtype(jnp.float16): 2**-11}  # the weights are, once
CAUSAL = masks.Causal()
TOKENS = Tokens.of_length(T, offset=30), Tokens.of_length(S)  # tiles of all kinds under a mask
FAR = AttentionSpec.from_mods(  # falls with distance, at a rate of the head
  score_mod=lambda s, b, n, i, j: s - jnp.exp2(-2.0 * (n + 1)) * jnp.abs(i - j)
).transforms
ALIBI = registry.build("transforms", dict(name="alibi", num_heads=2))
SPECS = {
  "full": AttentionSpec(),
  "causal": AttentionSpec(mask=CAUSAL),
  "window": AttentionSpec(mask=CAUSAL & masks.Window(40)),
  "capped": AttentionSpec(mask=CAUSAL, transforms=(transforms.SoftCap(2.0), *FAR)),
  "alibi": AttentionSpec(mask=CAUSAL, transforms=(ALIBI,)),
  "sigmoid": AttentionSpec(
    mask=CAUSAL, normaliser=registry.build("normalisers", dict(name="sigmoid", length=64))
  ),
  "signed": AttentionSpec(mask=CAUSAL, normaliser=registry.build("normalisers", "cog")),
  "counted": AttentionSpec(mask=CAUSAL, normaliser=registry.build("normalisers", "relu")),
}


def arguments(H=64, V=64, dtype=jnp.float16, heads=(2, 1), lengths=(T, S), batch=1):
  rng = np.random.default_rng(3)
  (t, s), (n, k) = lengths, heads
  shapes = ((batch, t, n, H), (batch, s, k, H), (batch, s, k, V))
  return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def summary(spec, p):
  mass = p.mass * jnp.exp(jnp.where(jnp.isneginf(p.peak), 0.0, p.peak))
  return spec.finish(p), mass, p.count


def assert_reference(spec, qkv, q_tokens, k_tokens, *, traced=False, **how):
  """Values, masses and counts are those of the same numbers in float64; returns the partial."""
  assert mosaic_gpu.unfit(*qkv, spec) is None
  tokens = q_tokens, k_tokens
  with jax.enable_x64(True):
    wide = tuple(jnp.asarray(x, jnp.float64) for x in qkv)
    expected = summary(spec, reference.partial(*wide, spec, *tokens))
  run = functools.partial(mosaic_gpu.partial, **dict(blocks=BLOCKS, interpret=INTERPRET) | how)
  if traced:  # tokens that are arguments of jit are known when the program runs
    p = jax.jit(lambda tokens: run(*qkv, spec, *tokens))(jax.tree.map(jnp.asarray, tokens))
  else:
    p = jax.jit(lambda qkv: run(*qkv, spec, *tokens))(qkv)
  out, mass, count = summary(spec, p)
  assert all(np.isfinite(np.asarray(x)).all() for x in (out, mass))
  assert_near((out, mass), expected[:2], ROUNDED[qkv[0].dtype])
  np.testing.assert_array_equal(count, expected[2])
  return p


@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_is_the_reference(name):
  assert_reference(SPECS[name], arguments(), *TOKENS)


def test_bfloat16_is_off_by_its_roundings():
  assert_reference(SPECS["causal"], arguments(dtype=jnp.bfloat16), *TOKENS)


@pytest.mark.parametrize("widths", [(192, 128), (96, 32)], ids=str)
def test_heads_of_many_widths(widths):
  assert_reference(SPECS["causal"], arguments(*widths), *TOKENS)


@pytest.mark.parametrize("cut", [(64, 128, 3, 3), (128, 64, 1, 2)], ids=str)
def test_blocks_change_nothing(cut):
  cuts = BLOCKS._replace(forward=Blocks(*cut))
  assert_reference(SPECS["causal"], arguments(), *TOKENS, blocks=cuts)


@pytest.mark.parametrize("traced", [False, True])
def test_a_few_queries_have_a_kernel_of_their_own(traced, monkeypatch):
  monkeypatch.setattr(streaming, "forward", None)
  tokens = Tokens.of_length(3, offset=140), Tokens.of_length(152)
  qkv = arguments(heads=(4, 2), lengths=(3, 152))
  assert_reference(SPECS["capped"], qkv, *tokens, traced=traced)


def packed(length: int, documents: tuple[int, ...], padding: int) -> Tokens:
  """So many documents in each row of the batch, and tokens behind them that do not exist."""
  tokens = Tokens.of_length(length)
  segment = np.stack([tokens.index[0] * n // length for n in documents]).astype(np.int32)
  position = np.where(tokens.index < length - padding, tokens.index, -1)
  return dataclasses.replace(tokens, position=position, segment=segment)


@pytest.mark.parametrize("traced", [False, True])
def test_rows_of_the_batch_have_documents_of_their_own(traced):
  spec, tokens = AttentionSpec(mask=CAUSAL & SAME), packed(128, (2, 1), 0)
  if traced:
    tokens = packed(128, (3, 1), 5)
  qkv = arguments(lengths=(128, 128), batch=2)
  assert_reference(spec, qkv, tokens, tokens, traced=traced)


def test_rows_that_see_nothing_are_zero():
  early = dataclasses.replace(TOKENS[0], position=TOKENS[0].index - 20)
  p = assert_reference(SPECS["causal"], arguments(), early, TOKENS[1])
  blind = np.asarray(early.position[0]) < 0
  assert blind.sum() == 20 and not np.asarray(p.out)[:, blind].any()
  assert not np.asarray(p.mass)[:, blind].any() and np.isneginf(p.peak[:, blind]).all()


def test_arrays_of_pairs_stand_beside_the_kernel():
  rng = np.random.default_rng(4)
  bias = jnp.asarray(rng.standard_normal((1, 2, T, S)), jnp.float32)
  seen = rng.random((1, 1, T, S)) < 0.7
  spec = AttentionSpec(mask=masks.Dense(seen), transforms=(transforms.Add(bias),))
  assert_reference(spec, arguments(), *TOKENS)


def test_edits_draw_the_bits_of_the_reference():
  spec = AttentionSpec(edits=(transforms.Dropout(jax.random.key(3), rate=0.3),))
  assert_reference(spec, arguments(), *TOKENS)


def rotary_bias(width: int):
  how = dict(num_heads=2, head_dim=width, rngs=nnx.Rngs(0))
  return registry.build("transforms", "rotary_bias", **how)


def test_heads_that_a_bias_makes_too_wide_are_refused():
  qkv = arguments(192, 128)
  wide, less = (AttentionSpec(transforms=(rotary_bias(width),)) for width in (192, 64))
  assert "up to 256, got H=384" in mosaic_gpu.unfit(*qkv, wide)
  assert mosaic_gpu.summary(wide, *qkv, *TOKENS) is None
  assert mosaic_gpu.unfit(*qkv, less) is None


@pytest.mark.parametrize("name", ["sigmoid", "bias", "rotary"])
def test_gradients_are_those_of_the_reference(name):
  """The seams between the kernels: each has tests of its own."""
  qkv = arguments(lengths=(70, 60))
  tokens = Tokens.of_length(70, offset=30), Tokens.of_length(60)
  rng = np.random.default_rng(4)
  bias = transforms.Add(jnp.asarray(rng.standard_normal((1, 1, 70, 60)), jnp.float32))
  if name == "rotary":
    bias = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape), rotary_bias(32))
    assert mosaic_gpu.unfit(*qkv, AttentionSpec(transforms=(bias,))) is None

  def loss(partial, qkv, bias):
    spec = SPECS["sigmoid"]
    if name != "sigmoid":
      spec = AttentionSpec(mask=CAUSAL, transforms=(bias,))
    p = partial(*qkv, spec, *tokens)
    return jnp.sin(spec.finish(p)).sum() + (jnp.log1p(p.mass).sum() if name == "sigmoid" else 0.0)

  with jax.enable_x64(True):
    wide = tuple(jnp.asarray(x, jnp.float64) for x in qkv)
    exact = functools.partial(loss, reference.partial)
    exactly = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), bias)
    expected = jax.grad(exact, argnums=(0, 1))(wide, exactly)
  run = functools.partial(mosaic_gpu.partial, blocks=BLOCKS, interpret=INTERPRET)
  actual = jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))(qkv, bias)
  assert_near(actual, expected, 2**-8)


def test_gradients_inside_of_shard_map_vary_over_the_mesh():
  """That of ALiBi has an operand besides, which does not vary."""
  qkv, rows = arguments(lengths=(70, 60)), jax.P("rows")
  mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  tokens = Tokens.of_length(70), Tokens.of_length(60)

  def loss(qkv):
    p = mosaic_gpu.partial(*qkv, SPECS["alibi"], *tokens, blocks=BLOCKS, interpret=INTERPRET)
    return jnp.sin(p.out).sum() + p.mass.sum()

  run = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=rows, out_specs=rows)
  assert jax.tree.map(jnp.shape, jax.eval_shape(run, qkv)) == jax.tree.map(jnp.shape, qkv)


@pytest.mark.parametrize("widths", [(64, 64), (256, 256), (64, 32)], ids=str)
@pytest.mark.parametrize("lines", [1, 3])
def test_no_two_threads_touch_the_same_memory_at_once(lines, widths, monkeypatch):
  """More visits than a ring has stages, masks on some of them, turns between two warpgroups.

  One block works on all lines: queries of the next are on their way where two fit, and not where
  heads are wide.
  """
  monkeypatch.setattr(tiles, "PROCESSORS", 1)
  gpu_callbacks.reset_gpu_interpret_mode_state()
  qkv = arguments(*widths, heads=(1, 1), lengths=(lines * 128 - 30, 256))
  tokens = Tokens.of_length(lines * 128 - 30, offset=180), Tokens.of_length(256)
  assert_reference(
    SPECS["causal"], qkv, *tokens, interpret=InterpretGPUParams(detect_races=True)
  )
  assert not gpu_callbacks.get_races().races_found


def test_lists_have_full_tiles_first_and_empty_ones_not_at_all():
  kinds = np.array([[[FULL, PARTIAL, EMPTY, FULL], [EMPTY] * 4]], np.int32)
  for array in (kinds, jnp.asarray(kinds)):
    plan, turned = lists(array), lists(array, by_key=True)
    np.testing.assert_array_equal(plan.at[0, 0, :3], [0, 3, 1])
    np.testing.assert_array_equal(plan.counts, [[[2, 1], [0, 0]]])
    np.testing.assert_array_equal(turned.counts, [[[1, 0], [0, 1], [0, 0], [1, 0]]])


@pytest.mark.parametrize("size", [1, 2**24, 2**40])
def test_every_head_and_line_has_a_block(size):
  order = Order.of(6, 5, size)
  found = [tuple(int(x) for x in order.at(jnp.int32(n))) for n in range(30)]
  assert sorted(found) == [(head, line) for head in range(6) for line in range(5)]
  assert len({head for head, _ in found[: order.together]}) == order.together


def test_blocks_share_lines_by_what_these_visit():
  order, visits = Order.of(64, 32, 2**21), np.arange(1, 33)[None]  # as under a causal mask
  for known, allowed in ((visits, 1.02), (jnp.asarray(visits), 1.2)):
    numbers, own = map(np.asarray, order.shares(known))
    every = [numbers[block, :n] for block, n in enumerate(own)]
    np.testing.assert_array_equal(np.sort(np.concatenate(every)), np.arange(64 * 32))
    loads = [visits[0, order.at(mine)[1]].sum() for mine in every]
    assert max(loads) <= allowed * np.mean(loads)


WIDTHS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]


def test_the_table_has_blocks_for_every_width_that_is_taken():
  for entry in blocks.table("h100"):
    assert choose(entry["H"], entry["V"], entry["dtype"])  # Blocks raises where one is not valid
    for name in Chosen._fields:
      assert entry[name]["shared"] <= 227 * 2**10 and entry[name]["spills"] <= 128
  for H in mosaic_gpu.WIDTHS:
    for V in mosaic_gpu.WIDTHS:
      for dtype in ROUNDED:
        choose(H, V, dtype)
  with pytest.raises(ValueError, match="H=320"):
    choose(320, 64, jnp.bfloat16)


def test_what_fits_no_kernel_is_refused_with_a_sentence():
  spec, (q, k, v) = SPECS["causal"], arguments()
  refused = mosaic_gpu.unfit
  assert "float16, float32" in refused(q.astype(jnp.float32), k, v, spec)
  assert "got float32" in refused(*(x.astype(jnp.float32) for x in (q, k, v)), spec)
  assert "got H=80 and V=64" in refused(*arguments(80), spec)
  assert "got H=64 and V=288" in refused(*arguments(64, 288), spec)
  assert "split tokens" in refused(*(jax.ShapeDtypeStruct(x.shape[:1] + (2**20,) + x.shape[2:],
                                                          x.dtype) for x in (q, k, v)), spec)
  for name in ("shaw", "t5_bias", "relative_bias", "music_relative"):
    options = dict(registry.get("transforms", name).tiny, name=name)
    options |= dict(values=False) if name == "shaw" else {}
    sizes = dict(num_heads=2, head_dim=64, dim=128, rngs=nnx.Rngs(0))
    part = registry.build("transforms", options, **sizes)
    assert "tables" in refused(q, k, v, AttentionSpec(transforms=(part,)))
  halved = AttentionSpec.from_mods(score_mod=lambda s, b, n, i, j: s - jnp.cumsum(s, axis=-1))
  assert "cumsum" in refused(q, k, v, halved)
  sliced = AttentionSpec.from_mods(score_mod=lambda s, b, n, i, j: s - s[..., :1])
  assert "cannot slice in registers" in refused(q, k, v, sliced)


def test_where_it_cannot_run_is_said_in_a_sentence(monkeypatch):
  refused = lambda: mosaic_gpu.refusal(*arguments(), SPECS["causal"])
  assert refused() == "runs on Hopper GPUs (H100, H200), not on cpu"
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  for capability, taken in (("8.0", False), ("10.0", False), ("gfx942", False), ("9.0", True)):
    device = type("Device", (), dict(compute_capability=capability))()
    monkeypatch.setattr(jax, "devices", lambda device=device: [device])
    assert (f"not for {capability}" in refused()) != taken
  assert "inside jax.shard_map where there are 8 devices" in refused()
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert refused() is None


def test_its_plan_is_told():
  qkv = arguments(lengths=(384, 384))
  tokens = Tokens.of_length(384)
  told = str(mosaic_gpu.summary(SPECS["causal"], *qkv, tokens, tokens))
  assert told == "tiles of 192 x 128 in pieces of 64 x 128: 1 empty, 4 partial, 1 full"


COMPILED = [
  f"{H}-{V}-{name}-{dtype}"
  for H, V in WIDTHS for name in ("full", "causal", "packed", "capped") for dtype in ROUNDED
] + ["96-32-odd-bfloat16", "128-128-counted-float16", "128-128-sigmoid-bfloat16"]  # fmt: skip


def ahead_case(name: str):
  """A call of the adapter by its name in COMPILED, as `pallas_kernels.aot` wants it."""
  H, V, which, dtype = name.split("-")
  spec = AttentionSpec(mask=CAUSAL & SAME) if which in ("packed", "odd") else SPECS[which]
  length = 333 if which == "odd" else 768
  array = lambda heads, width: jax.ShapeDtypeStruct((1, length, heads, int(width)), dtype)
  at = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def run(q, k, v, at):
    tokens = Tokens.of_length(length)
    if which in ("packed", "odd"):
      tokens = dataclasses.replace(tokens, position=at, segment=at)
    p = mosaic_gpu.partial(q, k, v, spec, tokens, tokens)
    return spec.finish(p)

  return run, [array(4, H), array(2, H), array(2, V), at]


@pytest.fixture(scope="module")
def compiled():
  return ahead.for_h100(__file__)


@pytest.mark.cuda
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_an_h100_without_spills(compiled, name):
  kernel = compiled[name].kernel()
  assert kernel.stored == kernel.loaded == 0


if __name__ == "__main__":
  ahead.compile_for_h100(__file__, "ahead_case", {name: dict(name=name) for name in COMPILED})
