"""The TPU kernels of the recurrences give what the recurrences give, gradients included."""

import collections
import functools
import re
import sys

import ahead
import jax
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.recurrence import pallas_tpu
from attnx.recurrence.delta import delta_rule
from attnx.recurrence.linear import linear_attention
from pallas_kernels.tpu import chunk_scan, linear_recurrence
from pallas_kernels.tpu.delta_rule import inverses

B, T, N, K, H, V, CHUNK = 2, 37, 2, 1, 16, 24, 16  # a remainder, and heads that share keys
SEGMENT = np.sort(np.random.default_rng(7).integers(0, 4, size=(B, T)), axis=1)
DECAYS = {"head": (N, 1), "scalar": (B, T, N, 1), "vector": (B, T, N, H), "channel": (T, 1, H)}


@pytest.fixture
def kernels(monkeypatch):
  """Recurrences run in the kernels, emulated."""
  calls, run = [], functools.partial(pallas_tpu.run, interpret=True)
  monkeypatch.setattr(pallas_tpu, "refusal", lambda xs, chunk: None)
  monkeypatch.setattr(pallas_tpu, "run", lambda *args: calls.append(args) or run(*args))
  return calls


def arrays(rule, kind="none", *, bonus=False, scale=0.3, heads=N):
  random = np.random.default_rng(3)
  normal = lambda *shape: np.float32(random.normal(size=shape))
  x = dict(q=normal(B, T, heads, H), k=normal(B, T, K, H), v=normal(B, T, N, V))
  x["state"] = normal(B, N, H, V)
  if rule == "delta":
    x["k"] /= H**0.5
    x["beta"] = np.float32(random.uniform(0, 2, size=(B, T, N)))
  if kind in DECAYS:
    x["log_decay"] = -np.float32(random.exponential(scale=scale, size=DECAYS[kind]))
  if bonus:
    x["bonus"] = normal(N, H)
  return jax.tree.map(jnp.asarray, x)


def recurrence(x, segment=None, chunk=CHUNK):
  return (delta_rule if "beta" in x else linear_attention)(**x, segment=segment, chunk=chunk)


def with_gradient(x, segment=None):
  """Outputs, last state and the gradient of a scalar of both."""

  def loss(x):
    out = recurrence(x, segment)
    weigh = lambda y: jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))
    return sum(weigh(y) for y in out), out

  return jax.jit(jax.grad(loss, has_aux=True))(x)


def oracle(x, segment=None):
  """`with_gradient` of the recurrences without kernels, in float64."""
  with jax.enable_x64(True):
    return with_gradient(jax.tree.map(lambda a: a.astype(jnp.float64), x), segment)


def assert_close(got, want, tolerance):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.shape == b.shape
    a, b = np.float64(a), np.float64(b)
    assert np.max(np.abs(a - b)) <= tolerance * (1 + np.max(np.abs(b)))


CASES = [
  ("linear", "none", False), ("linear", "head", False), ("linear", "scalar", True),
  ("linear", "scalar", False), ("linear", "vector", False), ("linear", "channel", True),
  ("delta", "none", False), ("delta", "scalar", False), ("delta", "vector", False),
]  # fmt: skip


@pytest.mark.parametrize("rule,kind,bonus", CASES)
def test_kernels_are_the_recurrences_with_their_gradients(rule, kind, bonus, request):
  x = arrays(rule, kind, bonus=bonus)
  want = oracle(x, SEGMENT)
  calls = request.getfixturevalue("kernels")
  assert_close(with_gradient(x, SEGMENT), want, 2e-6)
  assert calls


@pytest.mark.parametrize("rule,kind", [("linear", "scalar"), ("delta", "vector")])
def test_bfloat16_is_as_exact_as_its_inputs(rule, kind, request):
  x = arrays(rule, kind)
  x |= {name: x[name].astype(jnp.bfloat16) for name in "qkv"}
  want = oracle(x)
  request.getfixturevalue("kernels")
  gradient, (out, state) = with_gradient(x)
  assert out.dtype == gradient["v"].dtype == jnp.bfloat16 and state.dtype == jnp.float32
  assert_close((gradient, (out, state)), want, 1e-2)


@pytest.mark.parametrize("most", [1, 3, 6])
def test_programs_share_heads_of_keys_and_of_values(most, request, monkeypatch):
  random = np.random.default_rng(0)
  normal = lambda heads, width: jnp.float32(random.normal(size=(B, T, heads, width)))
  x = dict(q=normal(6, H), k=normal(2, H), v=normal(1, V))
  want = oracle(x)
  request.getfixturevalue("kernels")
  together, found = chunk_scan.heads_together, []
  limit = lambda N, shared, _: found.append(together(N, shared, most)) or found[-1]
  monkeypatch.setattr(chunk_scan, "heads_together", limit)
  assert_close(with_gradient(x), want, 2e-6)
  assert set(found) == {most}


def test_heads_together_divide_groups_or_hold_whole_ones():
  assert chunk_scan.heads_together(8, [8, 2, 1], 8) == 8
  assert chunk_scan.heads_together(12, [4], 8) == 6  # not 4, which is no multiple of 3
  assert chunk_scan.heads_together(7, [7], 4) == 1
  assert chunk_scan.heads_together(4, [4], 0) == 1


@pytest.mark.parametrize("decay", [0.0, -50.0, -np.inf])
@pytest.mark.parametrize("rule,kind", [("linear", "scalar"), ("linear", "vector")])
def test_any_decay_has_finite_gradients_and_full_decay_leaves_the_token_alone(
  rule, kind, decay, kernels
):
  x = arrays(rule, kind)
  x["log_decay"] = jnp.full_like(x["log_decay"], decay)
  gradient, (out, _) = with_gradient(x)
  assert all(np.isfinite(y).all() for y in jax.tree.leaves((gradient, out)))
  if decay < 0:
    k = jnp.repeat(x["k"], N // K, axis=2)
    assert_close(out, jnp.sum(x["q"] * k, axis=-1, keepdims=True) * x["v"], 2e-6)


@pytest.mark.parametrize("C,count", [(16, 3), (64, 3), (128, 2)])
def test_inverses_are_as_exact_as_substitution(C, count):
  random = np.random.default_rng(1)
  k = random.normal(size=(count, C, 8))
  k[0] = k[0, :1]  # the hardest: all keys alike
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  lowers = np.tril(k @ k.swapaxes(1, 2), -1).astype(np.float32)
  want = np.linalg.inv(np.eye(C) + np.float64(lowers))
  exact = inverses(list(jnp.asarray(lowers)), linear_recurrence.EXACT)
  assert_close(exact, list(want), 2e-6)
  three = inverses(list(jnp.asarray(lowers)), linear_recurrence.THREE_PASSES)
  assert_close(three, list(want), 1e-4)


def test_products_have_the_gradients_of_products():
  random = np.random.default_rng(2)
  shapes = {"nn": ((8, 4), (4, 6)), "nt": ((8, 4), (6, 4)), "tn": ((4, 8), (4, 6))}
  for kind, pair in shapes.items():
    a, b = (jnp.float32(random.normal(size=shape)) for shape in pair)
    plain = lambda a, b: (a.T if kind[0] == "t" else a) @ (b.T if kind[1] == "t" else b)
    for passes, tolerance in ((1, 2e-2), (3, 4e-5), (6, 1e-6)):
      loss = lambda f: lambda a, b: jnp.sum(jnp.sin(f(a, b)))
      product = lambda a, b: linear_recurrence.product(a, b, kind, passes)
      got = jax.grad(loss(product), (0, 1))(a, b)
      assert_close(got, jax.grad(loss(plain), (0, 1))(a, b), tolerance)


def test_refusals_name_the_reason(monkeypatch):
  x = {name: jnp.zeros((1, 64, 2, 64)) for name in "qkv"}
  assert "runs on TPU, not on cpu" in pallas_tpu.refusal(x, 64)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert pallas_tpu.refusal(x, 64) is None
  assert "got 48 and T=64" in pallas_tpu.refusal(x, 48)
  assert "T=64" in pallas_tpu.refusal(x, 128)
  wide = {name: jnp.zeros((1, 64, 2, 192)) for name in "qkv"}
  assert "at least half of H" in pallas_tpu.refusal(wide, 64)
  assert "got H=64 and V=40" in pallas_tpu.refusal(x | {"v": x["v"][..., :40]}, 64)
  assert "got float16" in pallas_tpu.refusal(x | {"k": x["k"].astype(jnp.float16)}, 64)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  assert "inside jax.shard_map where there are 4 devices" in pallas_tpu.refusal(x, 64)


def compile_ahead(dtype: str) -> str:
  """The program of the gradients of all kinds, on a mesh of TPUs; needs libtpu and no TPU."""
  pallas_tpu.refusal = lambda xs, chunk: None
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=devices)
  rows, size = P("data"), (4, 256, 4, 64)
  shape = lambda size, dtype=jnp.float32, spec=rows: jax.ShapeDtypeStruct(
    size, dtype, sharding=jax.NamedSharding(mesh, spec)
  )
  x = {name: shape(size, dtype) for name in "qv"} | dict(k=shape((4, 256, 2, 64), dtype))
  decays = [{}, *(dict(log_decay=shape((*size[:3], width))) for width in (1, 64))]
  cases = [x | decay | rule for decay in decays for rule in ({}, dict(beta=shape(size[:3])))]
  cases[-2]["bonus"] = shape((4, 64), spec=P())
  specs = jax.tree.map(lambda x: x.sharding.spec, cases)
  run = lambda cases, segment: [recurrence(x, segment, 64) for x in cases]
  run = jax.shard_map(run, mesh=mesh, in_specs=(specs, rows), out_specs=rows)
  loss = lambda *args: sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(run(*args)))
  lowered = jax.jit(jax.grad(loss)).lower(cases, shape((4, 256), jnp.int32))
  return lowered.compile().as_text()


@pytest.mark.libtpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile_for_a_tpu(dtype):
  found = collections.Counter(re.findall(r"%\w*attnx_(\w+?ward)\S* = ", ahead.run(__file__, dtype)))
  assert found == {
    f"{rule}_{direction}": 3  # no decay, a scalar, a vector
    for rule in ("linear_attention", "delta_rule") for direction in ("forward", "backward")
  }  # fmt: skip


if __name__ == "__main__":
  print(compile_ahead(sys.argv[1]))
