"""Whole arrays over a mesh of rows, heads and tokens: nothing changes but where things are."""

import functools
import math
import re

from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs

from attnx import models
from attnx.attention import AttentionSpec, attend, masks, transforms
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.recurrence.convolution import long_convolution
from attnx.recurrence.delta import delta_rule
from attnx.recurrence.diagonal import diagonal_scan
from attnx.recurrence.linear import linear_attention
from attnx.sharded import halo, rules, sequence

B, T, N, K, H = 2, 16, 4, 2, 8
CLOSE = dict(rtol=1e-9, atol=1e-11)
MESHES = [dict(data=1, seq=8), dict(data=2, seq=4), dict(data=2, tensor=2, seq=2), dict(tensor=8)]


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def mesh(**sizes):
  return rules.make_mesh(**dict(data=1) | sizes)


def evaluate(run, arrays, over=None):
  """Outputs of `run(*arrays)`, and gradients of a sum of their cosines."""

  @jax.jit
  def both(arrays):
    def loss(arrays):
      out = run(*arrays)
      return sum(jnp.cos(x).sum() for x in jax.tree.leaves(out)), out

    return jax.grad(loss, has_aux=True)(arrays)

  if over is None:
    return both(arrays)
  with sequence.over(over):
    return both(arrays)


def parts():
  rng = np.random.default_rng(3)
  every = registry.build("masks", "same_segment") & masks.Causal()
  yield "packed, causal", AttentionSpec(every), {}
  yield "a row of its own dropped", AttentionSpec(
    masks.Causal(), edits=(transforms.Dropout(jax.random.key(1), 0.3),)
  ), {}
  yield "biases by place", AttentionSpec(
    masks.Dense(rng.random((B, N, T, T)) < 0.7),
    (transforms.Add(rng.standard_normal((1, N, T, T))),),
  ), {}
  yield "slopes of heads", AttentionSpec(
    masks.Causal(), tuple(specs.instance("transforms", name) for name in ("alibi", "shaw"))
  ), {}
  yield "whole rows", AttentionSpec(
    masks.Causal(), normaliser=specs.instance("normalisers", "sparsemax")
  ), {}
  yield "heads that talk", AttentionSpec(
    masks.Causal(), normaliser=specs.instance("normalisers", "talking_heads")
  ), {}
  yield "lengths that nothing divides", AttentionSpec(masks.Causal()), dict(t=13, s=13)
  yield "few queries", AttentionSpec(masks.Causal()), dict(t=1, s=40)
  yield "a window of whole rows", AttentionSpec(
    masks.Causal() & masks.Window(2), normaliser=specs.instance("normalisers", "sparsemax")
  ), dict(tokens=None)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name, spec, lengths", list(parts()), ids=lambda x: str(x)[:30])
def test_attention_over_a_mesh_is_attention(name, spec, lengths, sizes):
  t, s = lengths.get("t", T), lengths.get("s", T)
  q, k, v = specs.inputs(t, s)
  q_tokens = specs.packed(t) if t == s else Tokens.of_length(t, offset=s - t)
  tokens = lengths.get("tokens", dict(q_tokens=q_tokens, k_tokens=specs.packed(s))) or {}
  run = lambda q, k, v, spec: attend(q, k, v, spec, **tokens)
  moving = lambda q, k, v: run(q, k, v, spec)
  actual, expected = (evaluate(moving, (q, k, v), over) for over in (mesh(**sizes), None))
  jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), actual, expected)


MESH = st.tuples(*[st.sampled_from([1, 2, 4])] * 3).filter(lambda sizes: 8 % math.prod(sizes) == 0)
SPECS = {
  name: AttentionSpec(mask, normaliser=specs.instance("normalisers", normaliser), scale=scale)
  for name, mask, normaliser, scale in (
    ("causal", masks.Causal(), "softmax", None),
    ("documents", registry.build("masks", "same_segment"), "sigmoid", 0.3),
    ("window", masks.Window(3, 2), "relu", None),
    ("rows", masks.Everything(), "entmax15", None),
  )
}


@hypothesis.settings(
  derandomize=True, max_examples=12, deadline=None, database=None,
  phases=[hypothesis.Phase.generate],  # every example is compiled: none is made smaller
)
@hypothesis.given(
  sizes=MESH, name=st.sampled_from(sorted(SPECS)), rows=st.integers(1, 4), t=st.integers(1, 20),
  s=st.integers(1, 20), groups=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_any_mesh_and_any_lengths_give_what_one_device_gives(sizes, name, rows, t, s, groups):
  fsdp, tensor, seq = sizes
  over = rules.make_mesh(fsdp=fsdp, tensor=tensor, seq=seq)
  rng = np.random.default_rng(t)
  shapes = ((rows, t, N, H), (rows, s, N // groups, H), (rows, s, N // groups, 3))
  where = dict(q_tokens=specs.packed(t), k_tokens=specs.packed(s)) if rows == 2 else {}
  run = lambda q, k, v: attend(q, k, v, SPECS[name], **where)
  arrays = tuple(rng.standard_normal(shape) for shape in shapes)
  actual, expected = (evaluate(run, arrays, mesh) for mesh in (over, None))
  jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), actual, expected)


def recurrences():
  rng = np.random.default_rng(5)
  x = lambda *shape: rng.standard_normal(shape)
  q, k, v = x(B, T, N, H), x(B, T, K, H), x(B, T, N, 6)
  decay = lambda *shape: -rng.random(shape)
  segment = np.sort(rng.integers(0, 3, (B, T)), axis=1)
  documents = dict(segment=segment)
  yield linear_attention, (q, k, v), documents
  yield linear_attention, (q, k, v, decay(N, 1)), dict(state=x(B, N, H, 6))
  yield linear_attention, (q, k, v, decay(B, T, N, H)), documents | dict(bonus=x(N, H))
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  yield delta_rule, (unit(q), unit(x(B, T, N, H)), v, rng.random((B, T, N))), documents
  yield delta_rule, (q, unit(x(B, T, N, H)), v, rng.random((B, T, N)), decay(B, T, N, 1)), {}
  yield delta_rule, (q, unit(x(B, T, N, H)), v, rng.random((B, T, N)), decay(B, T, N)), {}
  yield diagonal_scan, (rng.random((B, T, 5)), x(B, T, 5)), documents
  yield diagonal_scan, (rng.random(5), x(B, T, 5)), dict(state=x(B, 5))
  yield long_convolution, (x(B, T, 8), x(T, 8)), documents
  yield long_convolution, (x(B, T, 8), x(T, 1)), {}
  yield linear_attention, tuple(y[:, :13] for y in (q, k, v)), {}  # left to XLA


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
@pytest.mark.parametrize("function, arrays, options", list(recurrences()))
def test_recurrences_over_a_mesh_are_recurrences(function, arrays, options, sizes):
  run = lambda *arrays: function(*arrays, **options)
  actual, expected = (evaluate(run, arrays, over) for over in (mesh(**sizes), None))
  jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), actual, expected)


def collectives(function, arrays, over, place) -> dict[str, int]:
  """Names of the collectives of a compiled function to the numbers in the largest of each."""
  arrays = jax.device_put(arrays, jax.sharding.NamedSharding(over, place))
  with sequence.over(over):
    text = jax.jit(function).lower(*arrays).compile().as_text()
  names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  found: dict[str, int] = {}
  for line in text.splitlines():
    if match := re.search(rf"= (.*?) ({names})(-start)?\(", line):
      shapes = re.findall(r"\[([\d,]*)\]", match[1])
      sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
      found[match[2]] = max([found.get(match[2], 0), *sizes])
  return found


def test_a_ring_gathers_nothing_and_sends_no_more_than_a_shard():
  q, k, v = (jnp.zeros((B, 64, n, H)) for n in (N, K, K))
  run = lambda q, k, v: attend(q, k, v, AttentionSpec(masks.Causal()))
  found = collectives(run, (q, k, v), mesh(seq=8), jax.sharding.PartitionSpec(None, "seq"))
  assert found == {"collective-permute": B * 64 // 8 * K * H}
  assert sequence.first_way(run, mesh(seq=8), q, k, v) == f"seq=8, {sequence.Way('zigzag')}"
  recur = lambda q, k, v: linear_attention(q, k, v)[0]
  found = collectives(recur, (q, k, v), mesh(seq=8), jax.sharding.PartitionSpec(None, "seq"))
  assert found == {"collective-permute": B * N * H * H}


@pytest.mark.parametrize("mask, far", [
  (masks.Causal() & masks.Window(5, 9), (5, 0)),
  (masks.Window(0, 3), (0, 3)),
  (masks.Causal(), (56, 0)),
  (masks.Everything(), (56, 56)),
  (registry.build("masks", dict(name="dilated", window=3, dilation=4)), (8, 0)),
  (registry.build("masks", dict(name="neighborhood", shape=(8, 8), window=(3, 3))), (16, 16)),
])  # fmt: skip
def test_how_far_a_mask_reaches_is_what_it_says_of_tiles(mask, far):
  assert halo.reach(mask, 64, 8) == far
  where = Tokens.of_length(64)
  visible = AttentionSpec(mask).visible(where.rows(1, 1), where.columns())
  q, k = np.nonzero(np.broadcast_to(visible, (1, 1, 64, 64))[0, 0])
  back, ahead = q // 8 * 8 - k, k - (q // 8 * 8 + 7)
  assert far >= (max(back.max(), 0), max(ahead.max(), 0))


def test_windows_send_their_halo_alone():
  q, k, v = (jnp.zeros((B, 64, n, H)) for n in (N, K, K))
  run = lambda q, k, v: attend(q, k, v, AttentionSpec(masks.Causal() & masks.Window(3)))
  found = collectives(run, (q, k, v), mesh(seq=8), jax.sharding.PartitionSpec(None, "seq"))
  assert found == {"collective-permute": B * 3 * K * H}
  assert sequence.first_way(run, mesh(seq=8), q, k, v).startswith("seq=8, devices exchange 3 keys")


ENTRIES = {name: registry.get("mixers", name) for name in registry.names("mixers")}
CAUSAL = [name for name, entry in ENTRIES.items() if "causal_self" in entry.patterns]


@pytest.mark.slow  # a model and its gradient are compiled for each mixer, twice
@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mixer_may_have_its_tokens_over_devices(name):
  entry, over = ENTRIES[name], mesh(data=2, tensor=2, seq=2)
  mixer = dict(name=name, **entry.tiny, **entry.patterns["causal_self"])
  config = dict(name="decoder_lm", vocab=16, dim=32, depth=2, mixers=mixer)
  graph, state = nnx.split(models.build(config, rngs=nnx.Rngs(0)))
  ids = np.random.default_rng(0).integers(0, 16, (4, 16))
  place = jax.NamedSharding(over, jax.sharding.PartitionSpec(rules.ROWS, "seq"))
  loss = lambda state, ids: jnp.sin(nnx.merge(graph, state)(ids)).sum()
  expected = jax.jit(jax.value_and_grad(loss))(state, ids)
  with sequence.over(over):
    actual = jax.jit(jax.value_and_grad(loss))(state, jax.device_put(ids, place))
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert np.abs(a - b).max() <= 2e-5 * (1e-3 + np.abs(b).max())
