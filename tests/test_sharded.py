"""Splitting keys over devices changes nothing, for whatever merges, forwards and backwards."""

import dataclasses
import functools
import re

import jax
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest
import specs

from attnx.attention import AttentionSpec, attend, masks
from attnx.attention.partial import from_lse
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.sharded import ring, tree
from attnx.sharded.halo import halo_attend
from attnx.sharded.ring import ring_attend, striped, to_zigzag, zigzag
from attnx.sharded.sequence import filled
from attnx.sharded.tree import tree_attend
from attnx.sharded.ulysses import ulysses_attend

B, T, N, K, H = 2, 32, 4, 2, 8
KEYS, WHOLE = P(None, "keys"), P()
CLOSE = dict(rtol=1e-9, atol=1e-10)
SIZES = (8, 5, 3, 2, 1)  # devices; what they do not divide is filled up, so that shards are uneven
LAYOUTS = {  # the function, how queries are laid out, and in which order tokens are dealt out
  "tree": (functools.partial(tree_attend, axis_names="keys"), WHOLE, np.arange(T)),
  "ring": (functools.partial(ring_attend, axis_name="keys"), KEYS, np.arange(T)),
  "striped": (functools.partial(ring_attend, axis_name="keys"), KEYS, striped(T, 8)),
  "zigzag": (functools.partial(ring_attend, axis_name="keys"), KEYS, zigzag(T, 8)),
  "ulysses": (functools.partial(ulysses_attend, axis_name="keys"), KEYS, np.arange(T)),
}


def mask(name: str):
  """The tiny instance of an entry, whose blocks reach to T."""
  tiny = specs.instance("masks", name)
  if not hasattr(tiny, "selected"):
    return tiny
  chosen = np.random.default_rng(0).random((B, N, T // tiny.q_block, T // tiny.k_block)) < 0.5
  return dataclasses.replace(tiny, selected=chosen)


PARTS = {
  "plain": AttentionSpec(),
  "causal": AttentionSpec(masks.Causal()),
  "a window of packed documents": AttentionSpec(
    masks.Causal() & masks.Window(5) & registry.build("masks", "same_segment")
  ),
  "nothing": AttentionSpec(masks.Causal() & ~masks.Causal()),
} | {
  name: AttentionSpec(masks.Causal(), normaliser=specs.instance("normalisers", name))
  for name in registry.names("normalisers")
  if "row" not in specs.instance("normalisers", name).needs
} | {
  name: AttentionSpec(masks.Causal(), (specs.instance("transforms", name),))
  for name in ("alibi", "shaw", "t5_bias")
} | {
  f"mask {name}": AttentionSpec(mask(name)) for name in registry.names("masks")
}  # fmt: skip


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def mesh(size: int = 8):
  devices = jax.devices()[:size]
  return jax.make_mesh((size,), ("keys",), (jax.sharding.AxisType.Auto,), devices=devices)


def split(layout, size: int = 8):
  """`attend` of whole arrays, computed over devices; the spec is whole on each."""
  function, queries, order = LAYOUTS[layout] if isinstance(layout, str) else layout

  def run(q, k, v, spec, q_tokens, k_tokens):
    if queries is not WHOLE:
      q, q_tokens = filled(q, q_tokens, size)
    (k, v), k_tokens = filled((k, v), k_tokens, size)
    into = np.concatenate([order, np.arange(T, k.shape[1])])
    deal = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[:, into], tree)
    sharded = jax.shard_map(
      lambda q, k, v, spec, *tokens: function(
        q, k, v, spec, q_tokens=tokens[0], k_tokens=tokens[1]
      ),
      mesh=mesh(size),
      in_specs=(queries, KEYS, KEYS, WHOLE, queries, KEYS),
      out_specs=queries,
    )
    q, q_tokens = (q, q_tokens) if queries is WHOLE else (deal(q), deal(q_tokens))
    out = sharded(q, deal(k), deal(v), spec, q_tokens, deal(k_tokens))
    return out if queries is WHOLE else out[:, np.argsort(into)][:, :T]

  return run


@functools.cache
def inputs(length: int = T):
  with jax.ensure_compile_time_eval():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = zip(keys, (N, K, K), strict=True)
    return tuple(jax.random.normal(key, (B, length, n, H)) for key, n in shapes)


def value_and_gradients(function, spec, where):
  """The output, and the gradients of a sum of its cosines to q, k, v and the arrays of the spec."""
  leaves, tree = jax.tree.flatten(spec)
  moving = [jnp.asarray(x, float) if specs.floating(x) else None for x in leaves]

  def run(qkv, moving):
    here = [x if m is None else m for x, m in zip(leaves, moving, strict=True)]
    out = function(*qkv, tree.unflatten(here), where, where)
    return jnp.cos(out).sum(), out

  grads, out = jax.jit(jax.grad(run, (0, 1), has_aux=True))(inputs(), moving)
  return out, grads


def alone(q, k, v, spec, q_tokens, k_tokens):
  return attend(q, k, v, spec, q_tokens=q_tokens, k_tokens=k_tokens, implementation="reference")


ERF = pytest.mark.xfail(
  jax.__version_info__ >= (0, 12), strict=True, raises=ValueError,
  reason="jax 0.12.0 refuses its own erf inside of shard_map: primitive polynomial",
)  # fmt: skip


@pytest.mark.parametrize(
  "part", [pytest.param(part, marks=ERF if part == "laplace" else ()) for part in PARTS]
)
@pytest.mark.parametrize("layout", ["tree", "ring"])
def test_devices_agree_with_one_in_value_and_gradients(layout, part):
  of, turn = (PARTS[part], specs.packed(T)), [*PARTS].index(part)
  size = SIZES[(turn + (layout == "ring")) % len(SIZES)]
  actual, expected = (value_and_gradients(f, *of) for f in (split(layout, size), alone))
  specs.assert_close(actual, expected, **CLOSE)
  if part == "nothing":
    assert not any(np.any(x) for x in jax.tree.leaves(actual))


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_the_order_in_which_tokens_are_dealt_out_changes_nothing(layout):
  of = PARTS["a window of packed documents"], specs.packed(T)
  actual, expected = (value_and_gradients(f, *of) for f in (split(layout), alone))
  specs.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["tree", "ring"])
def test_any_number_of_devices_will_do(layout, size):
  of = PARTS["a window of packed documents"], specs.packed(T)
  actual, expected = (value_and_gradients(f, *of) for f in (split(layout, size), alone))
  specs.assert_close(actual, expected, **CLOSE)


def test_two_levels_of_a_tree_are_one():
  nodes = jax.make_mesh((2, 4), ("node", "device"), (jax.sharding.AxisType.Auto,) * 2)
  keys = P(None, ("node", "device"))
  where = Tokens.of_length(T)
  run = jax.shard_map(
    lambda q, k, v, tokens: tree_attend(
      q, k, v, PARTS["causal"], q_tokens=where, k_tokens=tokens, axis_names=("device", "node")
    ),
    mesh=nodes, in_specs=(WHOLE, keys, keys, keys), out_specs=WHOLE,
  )  # fmt: skip
  np.testing.assert_allclose(
    jax.jit(run)(*inputs(), where), alone(*inputs(), PARTS["causal"], where, where), **CLOSE
  )


@pytest.mark.parametrize("part", ["a window of packed documents", "nothing", "relu", "shaw"])
@pytest.mark.parametrize("size", [2, 4])  # as many key heads as devices, and fewer
def test_exchanging_tokens_for_heads_changes_nothing(size, part):
  of = PARTS[part], specs.packed(T)
  actual, expected = (value_and_gradients(f, *of) for f in (split("ulysses", size), alone))
  specs.assert_close(actual, expected, **CLOSE)


def test_whole_rows_meet_where_heads_are_split_and_what_wants_all_heads_is_refused():
  rows = AttentionSpec(masks.Causal(), normaliser=registry.build("normalisers", "entmax15"))
  of = rows, Tokens.of_length(T)
  actual, expected = (value_and_gradients(f, *of) for f in (split("ulysses", 4), alone))
  specs.assert_close(actual, expected, **CLOSE)
  with pytest.raises(NotImplementedError, match="sees all heads at once"):
    split("ulysses", 4)(*inputs(), PARTS["sink"], of[1], of[1])
  with pytest.raises(ValueError, match="4 heads and 2 key heads cannot be dealt out to 8 devices"):
    split("ulysses", 8)(*inputs(), PARTS["causal"], of[1], of[1])


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)], ids=str)
def test_heads_over_one_axis_and_a_ring_over_the_other_are_one_device(shape):
  both = jax.make_mesh(shape, ("heads", "ring"), (jax.sharding.AxisType.Auto,) * 2)
  tokens, where, spec = P(None, ("ring", "heads")), specs.packed(T), PARTS["alibi"]

  def hybrid(q, k, v, spec, q_tokens, k_tokens):
    return jax.shard_map(
      lambda q, k, v, spec, a, b: ulysses_attend(
        q, k, v, spec, q_tokens=a, k_tokens=b, axis_name="heads",
        inside=functools.partial(ring_attend, axis_name="ring"),
      ),
      mesh=both, in_specs=(tokens, tokens, tokens, WHOLE, tokens, tokens), out_specs=tokens,
    )(q, k, v, spec, q_tokens, k_tokens)  # fmt: skip

  whole = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (B, T)), where)
  actual, expected = (value_and_gradients(f, spec, whole) for f in (hybrid, alone))
  specs.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("before, after", [(3, 0), (4, 9), (0, 1), (28, 28)])
def test_a_halo_is_all_that_a_window_wants(before, after):
  window = masks.Window(before, after) & registry.build("masks", "same_segment")
  spec = AttentionSpec(window, normaliser=registry.build("normalisers", "sparsemax"))
  halo = functools.partial(halo_attend, axis_name="keys", before=before, after=after)
  of, layout = (spec, specs.packed(T)), (halo, KEYS, np.arange(T))
  actual, expected = (value_and_gradients(f, *of) for f in (split(layout), alone))
  specs.assert_close(actual, expected, **CLOSE)


def test_a_halo_that_is_wider_than_the_sequence_is_refused():
  halo = functools.partial(halo_attend, axis_name="keys", before=29)
  where = Tokens.of_length(T)
  with pytest.raises(ValueError, match="before=29 and after=0 must be in 0 .. 28"):
    split((halo, KEYS, np.arange(T)))(*inputs(), PARTS["causal"], where, where)


def test_dropped_weights_are_those_of_one_device():
  spec = AttentionSpec(masks.Causal(), edits=(specs.instance("edits", "dropout"),))
  where = Tokens.of_length(T)
  for layout, size in (("tree", 8), ("zigzag", 8), ("ulysses", 4)):
    out = jax.jit(split(layout, size))(*inputs(), spec, where, where)
    np.testing.assert_allclose(out, alone(*inputs(), spec, where, where), **CLOSE)


def test_bfloat16_keys_are_merged_in_float32():
  where = Tokens.of_length(T)
  exact = alone(*inputs(), PARTS["causal"], where, where)
  for layout in ("tree", "ring"):
    rounded = [x.astype(jnp.bfloat16) for x in inputs()]
    out = jax.jit(split(layout))(*rounded, PARTS["causal"], where, where)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), exact, rtol=0.03, atol=0.03)


def pairs(order: np.ndarray, size: int) -> int:
  """The sum over hops of the most pairs that a device has under a causal mask."""
  shard = order.reshape(size, -1)
  count = lambda d, hop: (shard[d][:, None] >= shard[(d - hop) % size]).sum()
  return sum(max(count(d, hop) for d in range(size)) for hop in range(size))


def test_layouts_share_the_work_of_a_causal_mask():
  assert pairs(np.arange(64), 4) == 904
  assert pairs(striped(64, 4), 4) == 544
  assert pairs(zigzag(64, 4), 4) == 520 == 64 * 65 // 2 // 4
  with pytest.raises(ValueError, match="length=30 must be a multiple of 2 size=8"):
    zigzag(30, 4)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_tokens_go_into_zigzag_and_back_in_two_sends(size):
  x = np.arange(2 * size * 3)[None]
  there = jax.shard_map(
    lambda x: to_zigzag(x, "keys"), mesh=mesh(size), in_specs=KEYS, out_specs=KEYS
  )
  back = jax.shard_map(
    lambda x: to_zigzag(to_zigzag(x, "keys"), "keys", back=True),
    mesh=mesh(size), in_specs=KEYS, out_specs=KEYS,
  )  # fmt: skip
  dealt = np.sort(np.asarray(there(x)).reshape(size, -1))
  np.testing.assert_array_equal(dealt, np.sort(zigzag(x.size, size).reshape(size, -1)))
  np.testing.assert_array_equal(back(x), x)


@pytest.mark.parametrize("size", [8, 1])
@pytest.mark.parametrize("layout", [ring, tree])
def test_partials_that_come_divided_have_gradients(layout, size, monkeypatch):
  """As library kernels return them, and attnx's own."""
  sums, name = layout.attend_partial, layout.__name__.rpartition(".")[2]

  def divided(*args, **how):
    p = sums(*args, **how)
    return from_lse(p.out / p.mass[..., None], p.peak + jnp.log(p.mass), p.count)

  of = PARTS["plain"], Tokens.of_length(T)
  expected = value_and_gradients(alone, *of)
  monkeypatch.setattr(layout, "attend_partial", divided)
  specs.assert_close(value_and_gradients(split(name, size), *of), expected, **CLOSE)


def test_a_ring_sends_keys_and_a_tree_only_results():
  where = Tokens.of_length(T)

  def compiled(layout):
    lowered = jax.jit(split(layout)).lower(*inputs(), PARTS["causal"], where, where)
    return lowered.compile().as_text()

  ring, tree = compiled("ring"), compiled("tree")
  assert "collective-permute" in ring and "all-reduce" not in ring
  assert "collective-permute" not in tree
  assert len(re.findall(r" all-reduce(?:-start)?\(", tree)) == 2


def test_the_memory_of_a_ring_is_that_of_shards_and_not_of_devices():
  def temporary(size: int) -> int:
    run = jax.shard_map(
      lambda q, k, v, at: ring_attend(
        q, k, v, PARTS["causal"], q_tokens=at, k_tokens=at, axis_name="keys"
      ),
      mesh=mesh(size), in_specs=KEYS, out_specs=KEYS,
    )  # fmt: skip
    grad = jax.grad(lambda *qkv_at: jnp.cos(run(*qkv_at)).sum(), (0, 1, 2))
    place = jax.NamedSharding(mesh(size), KEYS)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    shapes = jax.tree.map(shape, (*inputs(256 * size), Tokens.of_length(256 * size)))
    lowered = jax.jit(grad).lower(*shapes)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporary(8) < 1.1 * temporary(2)


def test_a_normaliser_of_whole_rows_is_refused():
  spec = AttentionSpec(normaliser=registry.build("normalisers", "entmax15"))
  where = Tokens.of_length(T)
  for layout in ("tree", "ring"):
    with pytest.raises(NotImplementedError, match="Entmax15 sees whole rows of keys"):
      split(layout)(*inputs(), spec, where, where)


def test_gradients_are_summed_outside_of_loops_that_devices_leave_at_different_times():
  where = Tokens.of_length(T)
  loss = lambda qkv, spec: jnp.cos(split("tree")(*qkv, spec, where, where)).sum()
  text = jax.jit(jax.grad(loss, (0, 1))).lower(inputs(), PARTS["alibi"]).compile().as_text()
  sums = [line for line in text.splitlines() if re.search(r" all-reduce(?:-start)?\(", line)]
  assert len(sums) >= 3 and not [line for line in sums if "/while/" in line]
