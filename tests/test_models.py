"""Models, blocks and stacks: what a call gives, stepping gives; how layers run changes nothing."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import models
from attnx.core.tokens import Tokens
from attnx.nn.block import Block
from attnx.nn.stack import POLICIES

B, T, S, V, D = 2, 9, 7, 13, 16
ATTENTION = dict(name="attention", num_heads=4, num_kv_heads=2, position="rope")
WINDOW = dict(
  ATTENTION, mask=dict(name="sliding_window", window=3), cache=dict(name="window", size=3)
)
RETENTION = dict(name="retention", num_heads=2)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
SOURCE = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, S)))
CLOSE = dict(rtol=2e-4, atol=2e-5)


def decoder(seed=0, mixers=(ATTENTION, RETENTION), **options):
  config = dict(name="decoder_lm", vocab=V, dim=D, depth=4, mixers=mixers) | options
  return models.build(config, rngs=nnx.Rngs(seed))


def translator(**options):
  config = dict(
    name="encoder_decoder",
    vocab=V,
    dim=D,
    depth=2,
    encoder=(dict(ATTENTION, mask="everything"),),
    decoder=(ATTENTION,),
    cross=dict(name="cross_attention", attention=dict(num_heads=4)),
  )
  return models.build(config | options, rngs=nnx.Rngs(0))


def stepped(model, ids, cache, cuts):
  step, outputs = jax.jit(model.step), []
  for a, b in zip((0, *cuts), (*cuts, ids.shape[1])):
    logits, cache = step(ids[:, a:b], cache)
    outputs.append(logits)
  return jnp.concatenate(outputs, 1)


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(scan=True),
    dict(wiring="post"),
    dict(wiring="parallel"),
    dict(mixers=(WINDOW, RETENTION)),
    dict(vocabulary=dict(tied=False, soft_cap=5.0, position="sinusoidal")),
  ],
  ids=str,
)
def test_steps_of_a_decoder_equal_one_call(options):
  model = decoder(**options)
  actual = stepped(model, IDS, model.init_cache(B, T), (5, 6, 7, 8))
  np.testing.assert_allclose(actual, jax.jit(model)(IDS), **CLOSE)


def same_parameters(scanned, looped):
  """Gives a scanned model the parameters of one that loops: those of a period side by side."""
  state = nnx.state(looped)
  blocks = state["stack"]["blocks"]
  layers = [[blocks[i + j] for j in range(2)] for i in range(0, 4, 2)]
  stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  target = nnx.state(scanned)
  for j in range(2):
    target["stack"]["blocks"][j] = stack[j]
  for name in ("vocabulary", "norm"):
    target[name] = state[name]
  nnx.update(scanned, target)
  return scanned


def loss_and_gradients(model):
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  loss = lambda params: jnp.cos(nnx.merge(graph, params, rest)(IDS)).sum()
  return jax.jit(jax.value_and_grad(loss))(params)


def test_a_scanned_stack_is_the_loop_in_value_and_gradient():
  looped = decoder()
  scanned = same_parameters(decoder(1, scan=True), looped)
  (a, da), (b, db) = loss_and_gradients(looped), loss_and_gradients(scanned)
  np.testing.assert_allclose(a, b, rtol=1e-5)
  np.testing.assert_allclose(
    da["vocabulary"]["embed"]["embedding"], db["vocabulary"]["embed"]["embedding"], **CLOSE
  )
  for i in range(4):
    one = da["stack"]["blocks"][i]["mixer"]["value"]["kernel"][...]
    many = db["stack"]["blocks"][i % 2]["mixer"]["value"]["kernel"][...]
    np.testing.assert_allclose(one, many[i // 2], **CLOSE)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scan", [False, True])
def test_what_the_backward_pass_keeps_changes_nothing(policy, scan):
  plain = loss_and_gradients(decoder(scan=scan))
  actual = loss_and_gradients(decoder(scan=scan, remat=policy))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), actual, plain)


def test_mixers_repeat_in_order():
  kinds = [type(b.mixer).__name__ for b in decoder(depth=5).stack.blocks]
  assert kinds == ["Attention", "Retention"] * 2 + ["Attention"]


def test_a_bfloat16_model_has_float32_parameters_and_logits():
  model = decoder(vocabulary=dict(dtype="bfloat16"))
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
  low, high = model(IDS), decoder()(IDS)
  assert low.dtype == jnp.float32 and not np.array_equal(low, high)
  assert np.linalg.norm(low - high) < 0.05 * np.linalg.norm(high)


def test_soft_caps_bound_logits():
  model = decoder(vocabulary=dict(soft_cap=0.01))
  np.testing.assert_allclose(model(IDS), 0.01 * jnp.tanh(decoder()(IDS) / 0.01), atol=1e-6)


@pytest.mark.parametrize(
  "options",
  [dict(dropout=0.5), dict(mixers=(dict(ATTENTION, dropout=0.5),))],
  ids=["block", "weights"],
)
def test_dropout_wants_a_key_and_follows_it(options):
  model = decoder(**options)
  np.testing.assert_allclose(model(IDS), decoder(**options | dict(seed=0))(IDS), rtol=1e-6)
  one, same, other = (model(IDS, key=jax.random.key(i)) for i in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert not np.allclose(one, other) and not np.allclose(one, model(IDS))


def test_packed_documents_are_models_of_their_own():
  mixers = (dict(ATTENTION, mask=("causal", "same_segment")), RETENTION)
  model, cut = decoder(mixers=mixers), 4
  position = np.r_[np.arange(cut), np.arange(T - cut)][None]
  tokens = Tokens(np.arange(T)[None], position, (np.arange(T) >= cut)[None].astype(int))
  packed = model(IDS, tokens=tokens)
  np.testing.assert_allclose(packed[:, :cut], model(IDS[:, :cut]), **CLOSE)
  np.testing.assert_allclose(packed[:, cut:], model(IDS[:, cut:]), **CLOSE)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("mask", ["everything", "causal"])
def test_steps_of_a_translator_equal_teacher_forcing(mask, scan):
  cross = dict(name="cross_attention", mask=mask, attention=dict(num_heads=4))
  model = translator(cross=cross, scan=scan)
  actual = stepped(model, IDS, model.init_cache(B, T, source=SOURCE), (3, 4, 5))
  np.testing.assert_allclose(actual, jax.jit(model)(SOURCE, IDS), **CLOSE)


def test_causal_cross_attention_does_not_read_ahead_in_the_source():
  cross = dict(name="cross_attention", mask="causal", attention=dict(num_heads=4))
  model = translator(cross=cross, encoder=(ATTENTION,))
  before, after = model(SOURCE, IDS), model(SOURCE.at[:, 4].set(0), IDS)
  np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-6)
  assert not np.allclose(before[:, 4:], after[:, 4:])


def test_padding_of_the_source_is_not_read():
  model = translator()
  tokens = Tokens.of_lengths(jnp.array([S, 4]), S)
  whole = model(SOURCE, IDS, source_tokens=tokens)
  np.testing.assert_allclose(whole[1:], model(SOURCE[1:, :4], IDS[1:]), **CLOSE)


def vit(**options):
  config = dict(
    name="vit", classes=5, image=(8, 12, 3), patch=4, dim=D, depth=2,
    mixers=(dict(ATTENTION, mask="everything", position=None),),
  )  # fmt: skip
  return models.build(config | options, rngs=nnx.Rngs(0))


def test_a_vision_transformer_sees_every_patch_in_its_place():
  images = jax.random.normal(jax.random.key(0), (B, 8, 12, 3))
  model = vit()
  logits = model(images)
  assert logits.shape == (B, 5) and logits.dtype == jnp.float32
  swapped = jnp.concatenate([images[:, :, 4:8], images[:, :, :4], images[:, :, 8:]], axis=2)
  assert not np.allclose(model(swapped), logits)
  model.position.set_value(jnp.zeros_like(model.position[...]))
  np.testing.assert_allclose(model(swapped), model(images), **CLOSE)


def test_a_vision_transformer_scans_and_computes_in_bfloat16():
  images = jax.random.normal(jax.random.key(0), (B, 8, 12, 3))
  low = vit(scan=True, dtype="bfloat16")(images)
  assert low.dtype == jnp.float32 and np.isfinite(low).all()
  with pytest.raises(ValueError, match="patch=5"):
    vit(patch=5)
  with pytest.raises(ValueError, match="images are"):
    vit()(images[:, :4])


def test_wirings_are_their_formulas():
  x = jax.random.normal(jax.random.key(0), (B, T, D))
  block = lambda wiring: Block(D, mixer=ATTENTION, wiring=wiring, rngs=nnx.Rngs(0))
  pre, post, parallel = map(block, ("pre", "post", "parallel"))
  a, b = pre.norms
  y = x + pre.mixer(a(x))
  np.testing.assert_allclose(pre(x), y + pre.mlp(b(y)), **CLOSE)
  np.testing.assert_allclose(parallel(x), x + pre.mixer(a(x)) + pre.mlp(b(x)), **CLOSE)
  y = a(x + pre.mixer(x))
  np.testing.assert_allclose(post(x), b(y + pre.mlp(y)), **CLOSE)


@pytest.mark.parametrize(
  "options, error",
  [
    (dict(depth=0), "depth=0"),
    (dict(mixers=()), "no mixer"),
    (dict(scan=True, depth=3), "depth=3"),
    (dict(remat="all"), "remat='all'"),
    (dict(wiring="serial"), "serial"),
    (dict(dropout=1.0), "dropout=1.0"),
    (dict(vocabulary=dict(soft_cap=-1.0)), "soft_cap=-1.0"),
  ],
)
def test_models_that_cannot_be_are_refused(options, error):
  with pytest.raises(ValueError, match=error):
    decoder(**options)
