"""The GPU kernels of the recurrences give what the recurrences give, gradients included.

Numbers come from JAX's interpreter of GPU kernels, in which products are those of the CPU. `cuda`
tests compile the kernels for an H100 ahead of time; no GPU is needed.
"""

import collections
import functools
import types

import ahead
import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.recurrence import mosaic_gpu, pallas_tpu
from attnx.recurrence.delta import delta_rule
from attnx.recurrence.linear import linear_attention
from pallas_kernels.gpu import chunk_scan, delta_rule as systems

pytestmark = pytest.mark.usefixtures("compiled_once")
B, T, N, K, H, V = 1, 100, 2, 1, 128, 64  # a remainder, and heads that share keys
SEGMENT = np.array([0] * 20 + [1] * 60 + [5] * 20)[None]  # one of them crosses chunks
DECAYS = {"head": (N, 1), "scalar": (B, T, N, 1), "vector": (B, T, N, H), "channel": (T, 1, H)}


@pytest.fixture
def kernels(monkeypatch):
  """Recurrences run in the kernels, interpreted."""
  calls, run = [], functools.partial(mosaic_gpu.run, interpret=InterpretGPUParams())
  monkeypatch.setattr(pallas_tpu, "refusal", lambda xs, chunk: None)
  monkeypatch.setattr(pallas_tpu, "run", lambda *args: calls.append(args) or run(*args))
  yield calls
  gpu_callbacks.reset_gpu_interpret_mode_state()


def arrays(rule, kind="none", *, bonus=False, scale=0.3):
  random = np.random.default_rng(3)
  normal = lambda *shape: np.float32(random.normal(size=shape))
  x = dict(q=normal(B, T, N, H) / H**0.5, k=normal(B, T, K, H) / H**0.5, v=normal(B, T, N, V))
  x["state"] = normal(B, N, H, V)
  if rule == "delta":
    x["beta"] = np.float32(random.uniform(0, 2, size=(B, T, N)))
  if kind in DECAYS:
    x["log_decay"] = -np.float32(random.exponential(scale=scale, size=DECAYS[kind]))
  if bonus:
    x["bonus"] = normal(N, H)
  x = jax.tree.map(jnp.asarray, x)
  return x | {name: x[name].astype(jnp.bfloat16) for name in "qkv"}


def recurrence(x, segment=None):
  return (delta_rule if "beta" in x else linear_attention)(**x, segment=segment, chunk=64)


def weighed(out):
  """A scalar of arrays, whose gradient differs from entry to entry."""
  weigh = lambda y: jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))
  return sum(weigh(y) for y in jax.tree.leaves(out))


def with_gradient(function, x):
  """What a function gives, and the gradient of a scalar of it."""
  loss = lambda x: (lambda out: (weighed(out), out))(function(x))
  return jax.jit(jax.grad(loss, has_aux=True))(x)


def oracle(function, x):
  """`with_gradient` in float64."""
  with jax.enable_x64(True):
    return with_gradient(function, jax.tree.map(lambda a: a.astype(jnp.float64), x))


def assert_close(got, want, tolerance):
  """Relative to the largest of each array."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert a.shape == b.shape
    a, b = np.float64(a), np.float64(b)
    error = np.max(np.abs(a - b)) / np.max(np.abs(b))
    assert error <= tolerance, (jax.tree_util.keystr(path), error)


CASES = [
  ("linear", "none", False), ("linear", "head", False), ("linear", "scalar", True),
  ("linear", "vector", False), ("linear", "channel", True),
  ("delta", "none", False), ("delta", "scalar", False), ("delta", "vector", False),
]  # fmt: skip


@pytest.mark.parametrize("rule,kind,bonus", CASES)
def test_kernels_are_the_recurrences_with_their_gradients(rule, kind, bonus, request):
  x = arrays(rule, kind, bonus=bonus)
  run = functools.partial(recurrence, segment=SEGMENT)
  want = oracle(run, x)
  calls = request.getfixturevalue("kernels")
  got = with_gradient(run, x)
  gradient, (out, state) = got
  assert out.dtype == gradient["v"].dtype == jnp.bfloat16 and state.dtype == jnp.float32
  assert_close(got, want, 1e-2)
  assert calls


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_full_decay_leaves_the_token_alone_and_gradients_finite(kind, kernels):
  x = arrays("linear", kind)
  x["log_decay"] = jnp.full_like(x["log_decay"], -50.0).at[:, ::3].set(-np.inf)
  gradient, (out, _) = with_gradient(recurrence, x)
  assert all(np.isfinite(np.float64(y)).all() for y in jax.tree.leaves((gradient, out)))
  q, k, v = (np.float64(x[name]) for name in "qkv")
  assert_close(out, np.sum(q * np.repeat(k, N // K, axis=2), axis=-1, keepdims=True) * v, 1e-2)


def scan_by_definition(tokens, values, state):
  """`chunk_scan.scan` of one head, as it is written."""
  outs = []
  for c in range(tokens.total.shape[1]):
    q, k = (x[:, 64 * c : 64 * c + 64, 0] for x in tokens[:2])
    inside = tokens.inside[:, c, 0] * (1 if tokens.read is None else q @ k.mT)
    read, write = (1 if x is None else x[:, c, 0, :, None] for x in (tokens.read, tokens.write))
    if isinstance(values, chunk_scan.Correction):
      u, p = (x[:, 64 * c : 64 * c + 64, 0] for x in values)
      y = u + p @ state
    else:
      y = values[:, 64 * c : 64 * c + 64, 0]
    outs.append(read * (q @ state) + inside @ y)
    state = tokens.total[:, c, 0, :, None] * state + k.mT @ (write * y)
  return jnp.concatenate(outs, axis=1)[:, :, None], state[:, None]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("weighs", [False, True])
def test_a_ring_of_tiles_goes_round_without_races(corrected, weighs):
  random, chunks, dtype = np.random.default_rng(5), 5, jnp.bfloat16  # 5 is more than its stages
  normal = lambda *shape: jnp.asarray(random.normal(size=shape) / 8, dtype)
  token = lambda width: normal(2, 64 * chunks, 1, width)
  between = lambda *shape: jnp.asarray(random.uniform(0.5, 1, size=shape), jnp.float32)
  tokens = chunk_scan.Tokens(token(H), token(H), normal(2, chunks, 1, 64, 64),
                             between(1, chunks, 1, H))  # rows share it
  if weighs:
    tokens = tokens._replace(read=between(2, chunks, 1, 64), write=between(2, chunks, 1, 64))
  values = chunk_scan.Correction(token(V), token(H)) if corrected else token(V)
  x = (tokens, values, normal(2, 1, H, V).astype(jnp.float32))
  plan = chunk_scan.Plan(1, InterpretGPUParams(detect_races=True), weighs)
  want = oracle(lambda x: scan_by_definition(x[0], x[1], x[2][:, 0]), x)
  assert_close(with_gradient(lambda x: chunk_scan.scan(*x, plan), x), want, 1e-2)
  assert not gpu_callbacks.get_races().races_found


def corrections_by_definition(keys, values, beta, gamma, overlap, weighs):
  """`delta_rule.corrections` of one chunk, as it is written."""
  k, v = (jnp.moveaxis(x, 2, 1)[:, None] for x in (keys, values))
  lower = jnp.tril(beta[..., None] * overlap * (k @ k.mT if weighs else 1), -1)
  inverse = jnp.linalg.inv(jnp.eye(64) + lower)
  back = lambda x: jnp.moveaxis(x[:, 0], 1, 2)
  return back((inverse * beta[..., None, :]) @ v), back((inverse * gamma[..., None, :]) @ k)


@pytest.mark.parametrize("weighs", [False, True])
def test_systems_are_solved_without_races(weighs):
  random = np.random.default_rng(7)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape) / 8, jnp.bfloat16)
  between = lambda *shape: jnp.asarray(random.uniform(0.2, 1, size=shape), jnp.float32)
  x = [normal(1, 64, 2, H), normal(1, 64, 2, V), between(1, 1, 2, 64), -between(1, 1, 2, 64)]
  x.append(between(1, 1, 2, 64, 64).astype(jnp.bfloat16) if weighs else between(1, 1, 2, 64, 64))
  plan = chunk_scan.Plan(2, InterpretGPUParams(detect_races=True), weighs)
  scaled = lambda x: x if weighs else [*x[:4], x[4] / 8]
  want = oracle(lambda x: corrections_by_definition(*scaled(x), weighs), x)
  got = with_gradient(lambda x: tuple(systems.corrections(*scaled(x), plan)), x)
  assert_close(got, want, 1e-2)
  assert not gpu_callbacks.get_races().races_found


def test_inverses_are_as_exact_as_bfloat16():
  random, plan = np.random.default_rng(1), chunk_scan.Plan(2, InterpretGPUParams())
  k = random.normal(size=(1, 1, 2, 64, 8))
  k[0, 0, 0] = k[0, 0, 0, :1]  # the hardest: all keys alike
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  lower = np.tril(k @ k.swapaxes(-1, -2), -1)
  above = jnp.asarray(lower + np.triu(np.ones((64, 64))), jnp.float32)  # is not looked at
  one = jnp.broadcast_to(jnp.eye(64, dtype=jnp.bfloat16)[None, :, None], (1, 64, 2, 64))
  ones = jnp.ones((1, 1, 2, 64), jnp.float32)
  u, p = systems.corrections(one, one, ones, -ones, above, plan)
  want = np.moveaxis(np.linalg.inv(np.eye(64) + lower)[:, 0], 1, 2)
  assert_close((u, p), (want, -want), 2.0**-8)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_gradients_keep_arguments_states_and_corrections(rule):
  run = lambda xs, _, state, segment: mosaic_gpu.run(xs, None, state, segment, 64)
  xs, _, state, _ = case(None, rule, kind="vector")[1]
  pull = jax.eval_shape(lambda xs, state: jax.vjp(run, xs, None, state, None)[1], xs, state)
  shapes = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(pull) if x.size > 2**12)
  (B, T, N, H), V, dtype = xs["q"].shape, xs["v"].shape[3], jnp.dtype(jnp.bfloat16)
  want = collections.Counter((x.shape, x.dtype) for x in xs.values() if x.size > 2**12)
  want[(B, T // 64, N, H, V), dtype] += 1
  want[(B, T, N, V), dtype] += rule == "delta"
  assert shapes == want


def test_refusals_name_the_reason(monkeypatch):
  x = {name: jnp.zeros((1, 64, 2, 64), jnp.bfloat16) for name in "qkv"}
  assert "runs on Hopper GPUs, not on cpu" in mosaic_gpu.refusal(x, 64)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  for capability in ("8.0", "10.0", "9.0"):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda device=device: [device])
    found = mosaic_gpu.refusal(x, 64)
    assert found is None if capability == "9.0" else f"not on {capability}" in found
  assert "got 128 and T=64" in mosaic_gpu.refusal(x, 128)
  short = {name: y[:, :40] for name, y in x.items()}
  assert "got 64 and T=40" in mosaic_gpu.refusal(short, 64)
  wide = {name: jnp.zeros((1, 64, 2, 192), jnp.bfloat16) for name in "qkv"}
  assert "got H=192 and V=192" in mosaic_gpu.refusal(wide, 64)
  assert "got float32; cast" in mosaic_gpu.refusal(x | {"k": x["k"].astype(jnp.float32)}, 64)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  assert "inside jax.shard_map where there are 4 devices" in mosaic_gpu.refusal(x, 64)


def case(devices, rule="linear", kind="none", H=128, V=128, more=False, sharded=False):
  """The gradients of a recurrence, to compile; `more` are a bonus, documents and a remainder."""
  B, N, K, T, f32 = 2, 4, 2, 1000 if more else 1024, jnp.float32
  shape = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  xs = dict(q=shape(B, T, N, H), k=shape(B, T, K, H), v=shape(B, T, N, V))
  if rule == "delta":
    xs["beta"] = shape(B, T, N, 1, dtype=f32)
  if kind != "none":
    xs["log_decay"] = shape(B, T, N, {"scalar": 1, "vector": H}[kind], dtype=f32)
  bonus = shape(N, H, dtype=f32) if more and rule == "linear" else None
  segment = shape(B, T, dtype=jnp.int32) if more else None
  run = lambda xs, bonus, state, segment: mosaic_gpu.run(xs, bonus, state, segment, 64)
  if sharded:
    mesh, rows = jax.sharding.Mesh(np.array(devices[:1]), ("data",)), jax.P("data")
    run = jax.shard_map(run, mesh=mesh, in_specs=(rows, jax.P(), rows, rows), out_specs=rows)
  loss = lambda *args: sum(jnp.sum(y.astype(f32)) for y in run(*args))
  return jax.grad(loss, (0, 2)), [xs, bonus, shape(B, N, H, V, dtype=f32), segment]


# Kernels of gradients. Of the linear rule: the walk, the reverse walk and gradients of chunks; a
# vector decay has besides the scores, which are computed again, and their gradients. Of the delta
# rule besides: the systems, which are computed again, and their gradients.
COMPILED = {
  "linear none": (3, dict()),
  "linear scalar": (3, dict(kind="scalar", more=True)),
  "linear vector": (6, dict(kind="vector")),
  "linear wide": (6, dict(kind="vector", H=256, V=256, more=True)),
  "linear sharded": (3, dict(kind="scalar", more=True, sharded=True)),
  "delta none": (6, dict(rule="delta", H=64, V=64)),
  "delta scalar": (6, dict(rule="delta", kind="scalar", more=True)),
  "delta scalar wide": (6, dict(rule="delta", kind="scalar", H=256, V=256)),
  "delta vector": (9, dict(rule="delta", kind="vector")),
  "delta wide": (9, dict(rule="delta", kind="vector", H=256, V=256)),
  "delta sharded": (9, dict(rule="delta", kind="vector", more=True, sharded=True)),
}


@pytest.fixture(scope="module")
def compiled():
  return ahead.for_h100(__file__)


@pytest.mark.cuda
@pytest.mark.parametrize("name", COMPILED)
def test_gradients_compile_for_an_h100(compiled, name):
  program = compiled[name]
  assert not program.error
  assert sum(target.startswith("mosaic_gpu") for target in program.calls) == COMPILED[name][0]


@pytest.mark.cuda
def test_kernels_hardly_spill(compiled):
  kernels = {name: program.kernels for name, program in compiled.items()}
  assert sum(map(len, kernels.values())) > len(COMPILED)  # programs share some, assembled once
  for name, found in kernels.items():
    most = 1280 if name.endswith("wide") else 256  # a state of width 256 fills half the registers
    assert all(kernel.stored <= most for kernel in found), (name, found)


if __name__ == "__main__":
  cases = {name: options for name, (_, options) in COMPILED.items()}
  ahead.compile_for_h100(__file__, "case", cases)
