"""Every recurrence, chunked in any way, is the recurrence token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.recurrence import kernels
from attnx.recurrence.convolution import exponential_convolution, exponential_kernel
from attnx.recurrence.convolution import exponential_step, long_convolution, short_convolution
from attnx.recurrence.delta import delta_rule
from attnx.recurrence.diagonal import diagonal_scan
from attnx.recurrence.linear import linear_attention

B, T, N, K, H, V = 2, 37, 4, 2, 8, 6
CHUNKS = (1, 4, 16, 64, T)  # none but 1 and T divides T


def arrays(kind, *, bonus=False, seed=0):
  """Random arguments: decays from 1 to exp(-30) a step, or none."""
  rng = np.random.default_rng(seed)
  width = {"scalar": (B, T, N, 1), "vector": (B, T, N, H), "head": (N, 1), "channel": (N, H)}
  x = {
    "q": rng.normal(size=(B, T, N, H)),
    "k": rng.normal(size=(B, T, K, H)) / H**0.5,
    "v": rng.normal(size=(B, T, N, V)),
    "state": rng.normal(size=(B, N, H, V)),
  }
  if kind != "none":
    strength = rng.choice([0.0, 0.1, 1.0, 30.0], size=width[kind], p=[0.3, 0.4, 0.2, 0.1])
    x["log_decay"] = -strength * rng.uniform(0.5, 1.0, size=width[kind])
  if bonus:
    x["bonus"] = rng.normal(size=(N, H))
  return x


SEGMENT = np.repeat([3, 1, 1, 3, 0, 2, 2], [5, 4, 8, 1, 1, 10, 8])[None]  # 3 comes back


def tokenwise(x, segment=None):
  """The oracle: the recurrences one token after the other."""
  k, v = (jnp.repeat(x[n], N // x[n].shape[2], axis=2) for n in "kv")
  decay = jnp.broadcast_to(jnp.exp(x.get("log_decay", jnp.zeros(1))), k.shape)
  beta = x.get("beta", jnp.zeros((B, T, N)))
  segment = jnp.zeros((B, T)) if segment is None else jnp.broadcast_to(segment, (B, T))
  same = jnp.pad(segment[:, 1:] == segment[:, :-1], [(0, 0), (1, 0)], constant_values=True)

  def step(state, t):
    q, k, v, decay, beta, same = t
    state = state * same[:, None, None, None]
    new = decay[..., None] * state
    if "beta" in x:
      v = beta[..., None] * (v - jnp.einsum("bnh,bnhv->bnv", k, new))
    written = k[..., None] * v[..., None, :]
    new = new + written
    read = state + x["bonus"][..., None] * written if "bonus" in x else new
    return new, jnp.einsum("bnh,bnhv->bnv", q, read)

  over = [jnp.moveaxis(y, 1, 0) for y in (x["q"], k, v, decay, beta, same)]
  state, out = jax.lax.scan(step, x["state"], over)
  return jnp.moveaxis(out, 0, 1), state


def recurrence(x, **how):
  rule = delta_rule if "beta" in x else linear_attention
  return rule(**x, **how)


def with_gradient(function, x):
  """Outputs and the gradient of a scalar of all of them."""

  def loss(x):
    out = function(x)
    weigh = lambda y: jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))
    return sum(jnp.real(weigh(y)) for y in jax.tree.leaves(out)), out

  return jax.jit(jax.grad(loss, has_aux=True))(x)


def assert_close(got, want, tolerance=1e-10):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a).astype(b.dtype), np.asarray(b)
    assert np.max(np.abs(a - b)) <= tolerance * (1 + np.max(np.abs(b)))


LINEAR = [("none", False), ("head", False), ("channel", True), ("scalar", False), ("scalar", True),
          ("vector", False), ("vector", True)]


@pytest.mark.parametrize("kind,bonus", LINEAR)
def test_linear_attention_in_chunks_is_the_recurrence_token_by_token(kind, bonus):
  with jax.enable_x64(True):
    x = arrays(kind, bonus=bonus)
    want = with_gradient(functools.partial(tokenwise, segment=SEGMENT), x)
    for chunk in CHUNKS:
      got = with_gradient(functools.partial(recurrence, segment=SEGMENT, chunk=chunk), x)
      assert_close(got, want)


def with_beta(kind):
  x = arrays(kind) | {"beta": np.random.default_rng(5).uniform(0, 2, size=(B, T, N))}
  return x


@pytest.mark.parametrize("kind", ["none", "head", "scalar", "vector"])
def test_the_delta_rule_in_chunks_is_the_recurrence_token_by_token(kind):
  with jax.enable_x64(True):
    x = with_beta(kind)
    want = with_gradient(functools.partial(tokenwise, segment=SEGMENT), x)
    for chunk in CHUNKS:
      got = with_gradient(functools.partial(recurrence, segment=SEGMENT, chunk=chunk), x)
      assert_close(got, want)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_float32_is_as_exact_as_float32_and_bfloat16_as_its_inputs(kind, delta):
  x = with_beta(kind) if delta else arrays(kind)
  with jax.enable_x64(True):
    want = with_gradient(functools.partial(tokenwise, segment=SEGMENT), x)
  single = jax.tree.map(jnp.float32, x)
  function = functools.partial(recurrence, segment=SEGMENT, chunk=16)
  assert_close(with_gradient(function, single), want, 2e-5)
  half = single | {name: single[name].astype(jnp.bfloat16) for name in "qkv"}
  with jax.enable_x64(True):
    rounded = jax.tree.map(jnp.float64, half)
    out, state = tokenwise(rounded, segment=SEGMENT)
  got, last = jax.jit(function)(half)
  assert got.dtype == jnp.bfloat16 and last.dtype == jnp.float32
  assert_close(got, out, 1e-2)
  assert_close(last, state, 2e-5)


@pytest.mark.parametrize("decay", [0.0, -30.0, -np.inf])
@pytest.mark.parametrize("width", [1, H])
def test_any_decay_has_finite_gradients_and_full_decay_leaves_the_token_alone(decay, width):
  x = jax.tree.map(jnp.float32, arrays("none"))
  x["log_decay"] = jnp.full((1, T, N, width), decay, jnp.float32)
  gradient, (out, _) = with_gradient(functools.partial(recurrence, chunk=16), x)
  assert all(np.isfinite(y).all() for y in jax.tree.leaves((gradient, out)))
  k = jnp.repeat(x["k"], N // K, axis=2)
  if decay < 0:
    alone = jnp.sum(x["q"] * k, axis=-1, keepdims=True) * x["v"]
    assert_close(out, alone, 1e-5)
  else:
    assert_close(out, tokenwise(x)[0], 1e-5)


@pytest.mark.parametrize("delta", [False, True])
def test_two_calls_that_hand_over_the_state_are_one_call(delta):
  x = jax.tree.map(jnp.float32, with_beta("vector") if delta else arrays("vector", bonus=True))
  want = recurrence(x, segment=SEGMENT, chunk=8)
  cut = lambda s: {n: y[:, s] if y.ndim > 2 and n != "state" else y for n, y in x.items()}
  early, middle = recurrence(cut(slice(0, 10)), segment=SEGMENT[:, :10], chunk=4)
  late, last = recurrence(
    cut(slice(10, T)) | {"state": middle}, segment=SEGMENT[:, 10:], chunk=16
  )
  assert_close((jnp.concatenate([early, late], axis=1), last), want, 2e-6)


def test_a_decode_step_is_one_more_token():
  x = jax.tree.map(jnp.float32, arrays("scalar", bonus=True))
  step = jax.jit(functools.partial(linear_attention, chunk=1))
  (out, last), state = recurrence(x), x["state"]
  for t in range(T):
    token = {n: x[n][:, t : t + 1] for n in ("q", "k", "v", "log_decay")}
    y, state = step(**token, bonus=x["bonus"], state=state)
    assert_close(y, out[:, t : t + 1], 2e-6)
  assert_close(state, last, 2e-6)


def test_heads_may_be_shared_by_queries_and_by_values():
  x = arrays("scalar")
  x["q"] = x["q"][:, :, :1]
  assert_close(
    linear_attention(**x), linear_attention(**x | {"q": jnp.repeat(x["q"], N, axis=2)}), 1e-6
  )


def test_without_decay_and_state_it_is_causal_attention_without_softmax():
  x = arrays("none")
  k = np.repeat(x["k"], N // K, axis=2)
  scores = np.tril(np.einsum("btnh,bsnh->bnts", x["q"], k))
  want = np.einsum("bnts,bsnv->btnv", scores, x["v"])
  assert_close(linear_attention(x["q"], x["k"], x["v"], chunk=8)[0], want, 1e-5)


def test_jvp_and_vmap_agree_with_grad_and_with_single_calls():
  x = jax.tree.map(jnp.float32, with_beta("vector"))
  for y in (x, {n: a for n, a in x.items() if n != "beta"}):
    loss = lambda y: jnp.sum(jnp.sin(recurrence(y, chunk=8)[0]))
    tangent = jax.tree.map(jnp.cos, y)
    _, slope = jax.jvp(loss, (y,), (tangent,))
    pairs = jax.tree.map(jnp.vdot, jax.grad(loss)(y), tangent)
    assert_close(slope, sum(jax.tree.leaves(pairs)), 1e-4)
    twice = jax.tree.map(lambda a: jnp.stack([a, -a if a.shape[-1] == V else a]), y)
    many = jax.vmap(lambda y: recurrence(y, chunk=8))(twice)
    assert_close(jax.tree.map(lambda a: a[0], many), recurrence(y, chunk=8), 1e-6)


def scalar_loss(length, rule):
  q = jnp.zeros((2, length, 8, 64))
  decay = jnp.zeros((2, length, 8))
  if rule is delta_rule:
    return (q, q, q, decay, decay), lambda *a: jnp.sum(rule(*a)[0] ** 2)
  return (q, q, q, decay[..., None]), lambda *a: jnp.sum(rule(*a)[0] ** 2)


@pytest.mark.parametrize("rule", [linear_attention, delta_rule])
def test_the_memory_of_a_gradient_is_linear_in_length(rule):
  memory, inputs = [], []
  for length in (512, 1024):
    x, loss = scalar_loss(length, rule)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in x]
    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(len(x))))).lower(*shapes).compile()
    memory.append(gradient.memory_analysis().temp_size_in_bytes)
    inputs.append(sum(a.nbytes for a in x))
  assert memory[1] - memory[0] <= 3 * (inputs[1] - inputs[0])


def elementwise(a, b, state, segment):
  same = np.r_[True, segment[0, 1:] == segment[0, :-1]]
  h, out = state, []
  for t in range(b.shape[1]):
    h = jnp.broadcast_to(a, b.shape)[:, t] * h * same[t] + b[:, t]
    out.append(h)
  return jnp.stack(out, axis=1), h


@pytest.mark.parametrize("shape", [(B, T, 3, 2), (1, 1, 3, 1)])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_a_diagonal_scan_is_the_recurrence_token_by_token(shape, kind):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    a = np.exp(-rng.choice([0.0, 0.1, 30.0, np.inf], size=shape))
    x = {"a": a, "b": rng.normal(size=(B, T, 3, 2)), "state": rng.normal(size=(B, 3, 2))}
    if kind == "complex":
      x["a"] = x["a"] * np.exp(1j * rng.normal(size=shape))
      x["state"] = x["state"] + 1j
    want = with_gradient(lambda x: elementwise(**x, segment=SEGMENT), x)
    for chunk in (1, 5, 64):
      got = with_gradient(lambda x: diagonal_scan(**x, segment=SEGMENT, chunk=chunk), x)
      assert_close(got, want)


def direct(x, kernel, segment=None):
  """The oracle: sum_s kernel_{t-s} x_s over the earlier tokens of the same document."""
  t = np.arange(x.shape[1])
  runs = np.cumsum(np.r_[0, segment[0, 1:] != segment[0, :-1]]) if segment is not None else 0 * t
  seen = (t[:, None] >= t) & (runs[:, None] == runs) & (t[:, None] - t < len(kernel))
  taps = kernel[np.minimum(np.maximum(t[:, None] - t, 0), len(kernel) - 1)] * seen[..., None]
  return jnp.einsum("tsd,bsd->btd", jnp.broadcast_to(taps, (*taps.shape[:2], x.shape[2])), x)


@pytest.mark.parametrize("taps", [(1, 5), (7, 1), (T, 5), (3 * T, 5)])
def test_long_and_short_convolutions_are_the_direct_sum(taps):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x = {"x": rng.normal(size=(B, T, 5)), "kernel": rng.normal(size=taps)}
    want = with_gradient(lambda x: direct(**x), x)
    assert_close(with_gradient(lambda x: long_convolution(**x), x), want)
    assert_close(with_gradient(lambda x: short_convolution(**x)[0], x), want)
    want = with_gradient(lambda x: direct(**x, segment=SEGMENT), x)
    assert_close(with_gradient(lambda x: long_convolution(**x, segment=SEGMENT), x), want)


def test_a_short_convolution_keeps_documents_apart_and_goes_on_where_it_stopped():
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(B, T, 5)).astype("f"), rng.normal(size=(4, 5)).astype("f")
  want = direct(x, kernel, SEGMENT)
  for stop in (2, 5, 18, 30):
    early, state = short_convolution(x[:, :stop], kernel, segment=SEGMENT[:, :stop])
    # a change of document between two calls is for the caller to see: the state is then dropped
    state = state if SEGMENT[0, stop - 1] == SEGMENT[0, stop] else None
    late, _ = short_convolution(x[:, stop:], kernel, state=state, segment=SEGMENT[:, stop:])
    assert_close(jnp.concatenate([early, late], axis=1), want, 1e-6)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_an_exponential_kernel_has_a_state_that_is_its_convolution(kind):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    log_decay = -rng.choice([0.0, 0.1, 30.0], size=(5, 3))
    c = rng.normal(size=(5, 3))
    if kind == "complex":
      log_decay, c = log_decay + 1j * rng.normal(size=c.shape), c + 1j * rng.normal(size=c.shape)
    x = {"x": rng.normal(size=(B, T, 5)), "log_decay": log_decay, "c": c}
    kernel = exponential_kernel(log_decay, c, T)
    powers = np.exp(np.arange(T)[:, None, None] * log_decay)
    assert_close(kernel, np.sum(c * powers, axis=-1).real)
    kernel_of = lambda x: exponential_kernel(x["log_decay"], x["c"], T)
    want = with_gradient(lambda x: long_convolution(x["x"], kernel_of(x)), x)
    for chunk in (1, 8, 64):
      got = with_gradient(lambda x: exponential_convolution(**x, chunk=chunk)[0], x)
      assert_close(got, want)
    packed = exponential_convolution(**x, segment=SEGMENT, chunk=8)[0]
    assert_close(packed, direct(x["x"], kernel, SEGMENT))
    y, state = exponential_convolution(x["x"][:, :20], log_decay, c, chunk=8)
    for t in range(20, T):
      y, state = exponential_step(x["x"][:, t], log_decay, c, state=state)
    assert_close(y, want[1][:, -1])
    assert_close(state, exponential_convolution(**x)[1])


def test_what_does_not_fit_says_so():
  x = arrays("none")
  q, k, v = x["q"], x["k"], x["v"]
  for call in (
    lambda: linear_attention(q, k[:, :5], v),
    lambda: linear_attention(q, k[..., :5], v),
    lambda: linear_attention(q, np.ones((B, T, 3, H)), v),
    lambda: linear_attention(q, k, v, np.zeros((B, T, 1, H + 1))),
    lambda: linear_attention(q, k, v, bonus=np.ones(H)),
    lambda: linear_attention(q, k, v, state=x["state"][:1]),
    lambda: linear_attention(q, k, v, segment=np.zeros((B, T + 1), int)),
    lambda: linear_attention(q, k, v, chunk=0),
    lambda: delta_rule(q, k, v, np.ones((B, T))),
    lambda: diagonal_scan(np.ones((B, T, 3)), np.ones((B, T, 2))),
    lambda: short_convolution(v[..., 0], np.ones((3, 7))),
    lambda: exponential_convolution(v[..., 0], np.ones((3, 7)), np.ones((3, 7))),
  ):
    with pytest.raises(ValueError, match="expected|must"):
      call()
  with pytest.raises(TypeError, match="floating"):
    linear_attention(q.astype(int), k, v)


def test_kernels_that_are_asked_for_run_or_say_why_not():
  x = jax.tree.map(jnp.float32, arrays("scalar"))
  call = lambda: recurrence(x)
  with kernels.asking("chunked"):
    assert_close(call(), recurrence(x), 0)
  for name, words in (("mosaic_gpu", "GPU"), ("pallas_tpu", "TPU")):
    with kernels.asking(name), pytest.raises(NotImplementedError, match=words):
      call()
  with pytest.raises(ValueError, match="'triton' is not one of auto"), kernels.asking("triton"):
    pass
