"""cuDNN's attention: what it is asked for, its gradient through both results, what is refused.

No GPU is wanted. cuDNN's two calls are replaced by the formulas that they compute, with rubbish
where cuDNN promises nothing; `cuda` tests compile the calls for an H100 ahead of time.
"""

import dataclasses
import functools
import itertools

import ahead
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, api, cudnn, masks, reference, transforms
from attnx.attention.cudnn_spec import Asked, read
from attnx.attention.masks import Causal, Window
from attnx.attention.normalisers import Softmax
from attnx.attention.partial import merge
from attnx.core.tokens import Tokens

B, T, N, K, H, V = 2, 12, 4, 2, 16, 8
Q_ENDS, K_ENDS = np.array([5, 12]), np.array([7, 11])


def scores_of(q, k, bias, asked: Asked):
  """Scores (B, N, T, S) in the dtype of q, -inf where cuDNN masks."""
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  s = asked.scale * jnp.einsum("btnh,bsnh->bnts", q, k) + (0 if bias is None else bias)
  t, at = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
  seen = at < asked.k_ends[:, None, None, None]
  seen = seen & (at <= t) if asked.causal else seen
  seen = seen & (at > t - asked.window) if asked.window is not None else seen
  return jnp.where(seen, s, -jnp.inf)


def wide(*arrays):
  return [None if x is None else x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]


def spoil(x, ends, axis):
  """NaN beyond the ends of rows, where cuDNN's results mean nothing."""
  at = np.arange(x.shape[axis]).reshape(-1, *[1] * (x.ndim - axis - 1))
  return jnp.where(at < ends.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)


def fused(q, k, v, bias, asked):
  scores = scores_of(*wide(q, k, bias), asked)
  values = jnp.repeat(*wide(v), q.shape[2] // v.shape[2], axis=2)
  out = jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(scores, -1), values).astype(q.dtype)
  lse = jax.nn.logsumexp(scores, -1)
  return spoil(out, asked.q_ends, 1), spoil(lse, asked.q_ends, 2)


def fused_gradient(saved, dout, asked):
  q, k, v, bias, out, dout, stats = wide(*saved[:5], dout, saved.stats)
  group = q.shape[2] // k.shape[2]
  rows = (np.arange(q.shape[1]) < asked.q_ends[:, None])[:, None, :, None]
  p = jnp.where(rows, jnp.exp(scores_of(q, k, bias, asked) - stats[..., None]), 0)
  dp = jnp.einsum("btnv,bsnv->bnts", dout, jnp.repeat(v, group, axis=2))
  delta = jnp.einsum("btnv,btnv->bnt", out, dout)
  ds = jnp.where(p > 0, p * (dp - delta[..., None]), 0)
  grouped = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3)
  dq = asked.scale * jnp.einsum("bnts,bsnh->btnh", ds, jnp.repeat(k, group, axis=2))
  dk = asked.scale * grouped(jnp.einsum("bnts,btnh->bsnh", ds, q))
  dv = grouped(jnp.einsum("bnts,btnv->bsnv", p, jnp.where(rows[:, 0, :, :, None], dout, 0)))
  dbias = None
  if bias is not None:
    ones = [axis for axis in (0, 1) if bias.shape[axis] == 1]
    dbias = ds.sum(ones, keepdims=True).astype(bias.dtype)
    pairs = rows & (np.arange(k.shape[1]) < asked.k_ends[:, None, None, None])
    pairs = pairs.any(0, keepdims=True) if bias.shape[0] == 1 else pairs
    dbias = jnp.where(pairs, dbias, jnp.nan)
  like = lambda x: x.astype(saved.q.dtype)
  ends = ((dq, asked.q_ends), (dk, asked.k_ends), (dv, asked.k_ends))
  return *(like(spoil(x, at, 1)) for x, at in ends), dbias


@pytest.fixture
def calls(monkeypatch):
  """The formulas in place of cuDNN; how often each of them was traced."""
  count = {"forward": 0, "backward": 0}

  def counted(name, function):
    @functools.wraps(function)
    def run(*args):
      count[name] += 1
      return function(*args)

    return run

  monkeypatch.setattr(cudnn, "fused", counted("forward", fused))
  monkeypatch.setattr(cudnn, "fused_gradient", counted("backward", fused_gradient))
  return count


def arrays(dtype=jnp.bfloat16, S=T, width=V):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, width)
  return [jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=True)]


def bias(b, n, t=T, s=T, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(4), (b, n, t, s)).astype(dtype)


def packed(ends, length=T):
  """Tokens of rows that end early, known before anything runs."""
  at = np.arange(length)[None]
  return Tokens(at, np.where(at < ends[:, None], at, -1), np.zeros_like(at))


ALL = Tokens.of_length(T)
PADDED = packed(Q_ENDS), packed(K_ENDS)
add = lambda array: (transforms.Add(array),)
CALLS = {
  "full": (AttentionSpec(), ALL, ALL),
  "causal": (AttentionSpec(mask=Causal()), ALL, ALL),
  "scale": (AttentionSpec(scale=0.7), ALL, ALL),
  "window": (AttentionSpec(mask=Window(3)), ALL, ALL),
  "windows": (AttentionSpec(mask=Window(5, after=2) & (Causal() & Window(2, after=9))), ALL, ALL),
  "wide window": (AttentionSpec(mask=Window(T)), ALL, ALL),
  "shared bias": (AttentionSpec(transforms=add(bias(1, 1))), ALL, ALL),
  "bias of heads": (AttentionSpec(mask=Causal(), transforms=add(bias(1, N))), ALL, ALL),
  "bias of rows": (AttentionSpec(transforms=add(bias(B, 1))), ALL, ALL),
  "bias of keys": (AttentionSpec(transforms=add(bias(B, N, t=1))), ALL, ALL),
  "bias by places": (
    AttentionSpec(transforms=add(bias(1, N, T + 4, T + 4))),
    Tokens(ALL.index + 4, ALL.position, ALL.segment),
    Tokens(ALL.index[:, ::-1].copy(), ALL.position, ALL.segment),
  ),
  "lengths": (AttentionSpec(), *PADDED),
  "causal lengths": (AttentionSpec(mask=Causal()), *PADDED),
  "window, lengths, bias": (AttentionSpec(mask=Window(4), transforms=add(bias(1, N))), *PADDED),
  "lengths, bias of rows": (AttentionSpec(transforms=add(bias(B, 1))), *PADDED),
  "later": (AttentionSpec(mask=Causal()), *[Tokens.of_length(T, offset=7)] * 2),
}


def oracle(x):
  return jax.tree.map(
    lambda y: jnp.asarray(y, jnp.float64) if jnp.issubdtype(y.dtype, jnp.floating) else y, x
  )


@pytest.mark.parametrize(
  "call, dtype",
  [*itertools.product(CALLS, [jnp.bfloat16]), ("window, lengths, bias", jnp.float16)],
)
def test_values_and_gradients_are_those_of_the_definition(calls, call, dtype):
  spec, *tokens = CALLS[call]
  q, k, v = arrays(dtype)
  spec = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, spec)

  def loss(q, k, v, spec, partial):
    p = partial(q, k, v, spec, *tokens)
    return jnp.sin(spec.finish(p).astype(jnp.promote_types(q.dtype, jnp.float32))).sum(), p

  actual, p = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, spec, cudnn.partial)
  with jax.enable_x64(True):
    args = oracle((q, k, v, spec))
    expected, exact = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*args, reference.partial)
    wanted = spec.finish(exact)
    expected, exact, wanted = jax.tree.map(np.asarray, (expected, exact, wanted))
  np.testing.assert_allclose(spec.finish(p), wanted, atol=0.02)
  np.testing.assert_array_equal(p.count, exact.count)
  seen = exact.mass > 0
  lse = lambda p: np.asarray(p.peak)[seen] + np.log(np.asarray(p.mass)[seen])
  np.testing.assert_allclose(lse(p), lse(exact), atol=0.02)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.float64(a), b, atol=0.03 * max(1, float(abs(b).max())))


ASKED = {
  "full": Asked(0.3, False, None, np.full(1, T), np.full(1, T), False),
  "window": Asked(0.3, True, 4, np.full(1, T), np.full(1, T), False),
  "lengths": Asked(0.3, True, None, Q_ENDS, K_ENDS, True),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_the_gradient_is_exact_through_the_output_and_the_log_sum_exp(calls, asked, through):
  asked = ASKED[asked]
  rows = (np.arange(T) < asked.q_ends[:, None])[..., None]

  def plain(q, k, v, bias):
    scores = scores_of(q, k, bias, asked)
    values = jnp.repeat(v, N // K, axis=2)
    out = jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(scores, -1), values)
    return out, jnp.swapaxes(jax.nn.logsumexp(scores, -1), 1, 2)

  def loss(function):
    def run(*args):
      out, lse = function(*args)
      out = jnp.where(rows[..., None], jnp.sin(out), 0).sum() * (through != "lse")
      return out + (jnp.where(rows, jnp.cos(lse), 0).sum() if through != "out" else 0.0)

    if through == "lse":
      return lambda *args: jnp.where(rows, jnp.cos(function(*args)[1]), 0).sum()
    return run

  with jax.enable_x64(True):
    args = (*arrays(jnp.float64), bias(1, N, dtype=jnp.float64))
    actual = jax.grad(loss(cudnn.attention(asked)), (0, 1, 2, 3))(*args)
    expected = jax.grad(loss(plain), (0, 1, 2, 3))(*args)
  assert calls["backward"] == {"out": 1, "lse": 1, "both": 2}[through]
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
  assert all(np.abs(x).max() > 0 for x in (actual[0], actual[1], actual[3]))


def test_partials_of_halves_merge_to_the_whole_with_its_gradient(calls):
  """A merge is differentiated through mass, which a gradient without dlse gets wrong."""
  q, k, v = arrays()
  halves = [(slice(0, 6), Tokens.of_length(6)), (slice(6, T), Tokens.of_length(6))]
  spec = AttentionSpec()

  def split(q, k, v):
    parts = [cudnn.partial(q, k[:, at], v[:, at], spec, ALL, tokens) for at, tokens in halves]
    return jnp.sin(spec.finish(merge(*parts)).astype(jnp.float32)).sum()

  def whole(q, k, v):
    return jnp.sin(spec.finish(reference.partial(q, k, v, spec, ALL, ALL))).sum()

  actual = jax.grad(split, (0, 1, 2))(q, k, v)
  with jax.enable_x64(True):
    expected = jax.tree.map(np.asarray, jax.grad(whole, (0, 1, 2))(*oracle((q, k, v))))
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(np.float64(a), b, atol=0.03 * float(abs(b).max()))
  assert calls["backward"] == 4


def test_a_log_sum_exp_is_handed_over_without_being_rounded():
  rows = jax.random.normal(jax.random.key(1), (B, T, N)) * 100
  pieces = cudnn.spread(rows, jnp.zeros((B, T, N, V), jnp.bfloat16))
  assert pieces.dtype == jnp.bfloat16 and pieces.shape == (B, T, N, V)
  np.testing.assert_allclose(pieces.astype(jnp.float32).sum(-1), rows, rtol=2e-7)
  assert np.abs(pieces[..., 0].astype(jnp.float32) - rows).max() > 0.1  # one number does not do


def test_rows_of_padding_are_empty_whatever_the_call_leaves_there(calls):
  q, k, v = arrays()
  p = cudnn.partial(q, k, v, AttentionSpec(), *PADDED)
  gone = np.arange(T) >= Q_ENDS[:, None]
  assert not p.out[gone].any() and not p.mass[gone].any()
  assert np.isneginf(p.peak[gone]).all()
  total = lambda *args: (lambda p: p.out.sum() + p.mass.sum())(
    cudnn.partial(*args, AttentionSpec(), *PADDED)
  )
  dq, dk, dv = jax.grad(total, (0, 1, 2))(q, k, v)
  assert all(np.isfinite(x.astype(jnp.float32)).all() for x in (dq, dk, dv))
  beyond = np.arange(T) >= K_ENDS[:, None]
  assert not dq[gone].any() and not dk[beyond].any() and not dv[beyond].any()


def test_windows_become_the_narrowest_one_and_vanish_where_they_hide_nothing():
  asked = lambda mask: read(*arrays(), AttentionSpec(mask=mask), ALL, ALL)
  both = asked(Window(5, after=2) & Causal() & Window(2, after=9))
  assert (both.causal, both.window, both.padded) == (True, 3, False)
  assert asked(Window(T - 1)).window is None and asked(Window(T - 2)).window == T - 1
  np.testing.assert_array_equal(asked(Window(2)).count(T)[0], [1, 2, *[3] * (T - 2)])


class Sink(Softmax):
  """Something that is not softmax, though it descends from it."""


class Biased(transforms.Add):
  """Something that is not a dense bias, though it descends from it."""


dense = masks.Dense(np.ones((1, 1, T, T), bool))
holes = Tokens(ALL.index, np.where(ALL.index == 3, -1, ALL.index), ALL.segment)
none = packed(np.array([0, T]))
REFUSED = {
  "normaliser": (dict(normaliser=Sink()), "by Softmax, not by Sink"),
  "edit": (dict(edits=(transforms.Dropout(jax.random.key(0), 0.1),)), "got Dropout"),
  "soft cap": (dict(transforms=(transforms.SoftCap(),)), "got SoftCap"),
  "two biases": (dict(transforms=add(bias(1, 1)) * 2), "got Add, Add"),
  "bias like": (dict(transforms=(Biased(bias(1, 1)),)), "got Biased"),
  "bias dtype": (dict(transforms=add(bias(1, 1, dtype=jnp.float32))), "float32: cast it"),
  "dense mask": (dict(mask=Causal() & dense), "got Dense"),
  "either mask": (dict(mask=Causal() | Window(3)), "got Or"),
  "not a mask": (dict(mask=~Causal()), "got Not"),
  "ahead": (dict(mask=Window(3, after=1)), r"after=1: use Causal\(\)"),
  "shifted": (dict(mask=Causal(), q_tokens=Tokens.of_length(T, offset=1)), "other positions"),
  "reversed": (
    dict(mask=Window(3), k_tokens=Tokens(ALL.index, ALL.index[:, ::-1], ALL.segment)),
    "other positions",
  ),
  "holes": (dict(k_tokens=holes), "got some between others"),
  "no keys": (dict(k_tokens=none), "a row of padding"),
  "no queries": (dict(q_tokens=none), "a row of padding"),
  "beyond": (dict(mask=Window(1), k_tokens=packed(np.array([3, T]))), "a window of 2 beyond"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_honoured_is_refused(calls, case):
  parts, sentence = REFUSED[case]
  tokens = [parts.get("q_tokens", ALL), parts.get("k_tokens", ALL)]
  spec = AttentionSpec(**{name: x for name, x in parts.items() if "tokens" not in name})
  with pytest.raises(NotImplementedError, match=f"implementation='cudnn' .*{sentence}"):
    cudnn.partial(*arrays(), spec, *tokens)
  assert calls["forward"] == 0


def test_shapes_and_dtypes_that_are_not_honoured_are_refused():
  unfit = lambda q, k, v, spec=AttentionSpec(): read(
    q, k, v, spec, Tokens.of_length(q.shape[1]), Tokens.of_length(k.shape[1])
  )
  q, k, v = arrays()
  assert "got float32" in unfit(*arrays(jnp.float32))
  assert "got bfloat16, float16" in unfit(q, k.astype(jnp.float16), v)
  assert "H=16 and V=12" in unfit(*arrays(width=12))
  assert "T = S = 1" in unfit(q[:, :1], k[:, :1], v[:, :1])
  assert "T=12 and S=11" in unfit(
    q, k[:, 1:], v[:, 1:], AttentionSpec(transforms=add(bias(1, 1, s=11)))
  )
  assert "T=12 and S=11" in unfit(q, k[:, 1:], v[:, 1:], AttentionSpec(mask=Window(3)))
  assert isinstance(unfit(q, k[:, 1:], v[:, 1:], AttentionSpec(mask=Causal())), Asked)


def test_what_is_known_at_run_time_only_is_refused():
  def run(ends, scale, mask=Causal()):
    tokens = Tokens.of_lengths(ends, T)
    refusals.append(read(*arrays(), AttentionSpec(mask=mask), ALL, tokens))
    refusals.append(read(*arrays(), AttentionSpec(scale=scale), ALL, ALL))

  refusals = []
  jax.jit(run)(K_ENDS, 0.1)
  assert "traced positions" in refusals[0] and "the scale" in refusals[1]
  assert isinstance(read(*arrays(), AttentionSpec(), ALL, Tokens.of_lengths(K_ENDS, T)), Asked)


def test_hardware_that_lacks_it_is_told(monkeypatch):
  q, k, v = arrays()
  refusal = lambda *args, spec=AttentionSpec(): cudnn.refusal(*args, spec)
  assert "runs on NVIDIA GPUs, not on cpu" in refusal(q, k, v)
  monkeypatch.setattr(cudnn, "split", lambda: None)
  monkeypatch.setattr(cudnn, "unbuildable", lambda *kind: kinds.append(kind))
  kinds = []
  on = lambda *found: monkeypatch.setattr(cudnn, "hardware", lambda: found)
  on((7, 5), 92000)
  assert "got 7.5 and 92000" in refusal(q, k, v)
  on((9, 0), 91001)
  assert "cuDNN 91002 or later" in refusal(q, k, v)
  on((8, 0), 92000)
  assert "one width up to 128 here, got H=16 and V=8" in refusal(q, k, v)
  wide = [jnp.zeros((B, T, N, 136), jnp.bfloat16)] * 3
  assert "got H=136 and V=136" in refusal(*wide)
  on((9, 0), 92000)
  assert refusal(*wide) is None and refusal(q, k, v) is None
  assert "got H=264" in refusal(*[jnp.zeros((B, T, N, 264), jnp.bfloat16)] * 3)
  assert "got SoftCap" in refusal(q, k, v, spec=AttentionSpec(transforms=(transforms.SoftCap(),)))
  biased = AttentionSpec(mask=Window(3), transforms=add(bias(B, 1)))
  assert cudnn.refusal(q, k, v, biased, *PADDED) is None
  assert kinds[-1] == (((N, H), (K, H), (K, V)), "bfloat16", (2, 1), True, True, True)


def test_a_call_that_cudnn_does_not_build_is_refused(monkeypatch, calls):
  kind = ((N, H), (K, H), (K, V)), "bfloat16", (1, 2), True, True, True
  cudnn.unbuildable.cache_clear()
  assert cudnn.unbuildable(*kind) is None and calls == {"forward": 1, "backward": 2}

  def broken(*args):
    raise RuntimeError("No execution plans\nand more")

  cudnn.unbuildable.cache_clear()
  monkeypatch.setattr(cudnn, "fused_gradient", broken)
  assert cudnn.unbuildable(*kind) == "is refused by cuDNN: No execution plans"
  cudnn.unbuildable.cache_clear()


@pytest.mark.parametrize("call", CALLS)
def test_jax_is_handed_what_the_spec_says(monkeypatch, call):
  monkeypatch.setattr(cudnn.cudnn, "check_cudnn_version", lambda: 92000)
  spec, *tokens = CALLS[call]
  q, k, v = arrays(width=H)
  traced = jax.make_jaxpr(jax.grad(lambda q: cudnn.partial(q, k, v, spec, *tokens).out.sum()))(q)
  found = [eqn for eqn in equations(traced.jaxpr) if "dot_product_attention" in eqn.primitive.name]
  assert [("fwd" in eqn.primitive.name) for eqn in found] == [True, False, False]
  asked = read(q, k, v, spec, *tokens)
  for eqn in found:
    told = eqn.params
    assert told["scale"] == asked.scale and told["sliding_window_length"] == asked.window
    assert told["mask_type"].name == (
      "NO_MASK PADDING CAUSAL PADDING_CAUSAL".split()[asked.padded + 2 * asked.causal]
    )
    assert told["variadic_args"] == (bool(spec.transforms),) * 2 and told["dropout_rate"] == 0


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        yield from equations(getattr(inner, "jaxpr", inner))


# Ahead of time, in a process of its own.
COMPILED = {
  "full": dict(), "causal": dict(causal=True), "window": dict(causal=True, window=100),
  "longer keys": dict(causal=True, S=1024), "shared heads": dict(heads=(8, 1)),
  "lengths": dict(padded=True), "causal lengths": dict(causal=True, padded=True),
  "bias": dict(bias=(1, 1)), "bias of heads": dict(bias=(1, 4), causal=True),
  "bias of rows, lengths": dict(bias=(2, 1), padded=True),
  "float16": dict(dtype="float16"), "width 64": dict(width=64),
  "merged": dict(through="both"),
}  # fmt: skip


def case(
  causal=False, window=None, padded=False, bias=None, heads=(4, 4), S=512, width=128,
  dtype="bfloat16", through="out",
):  # fmt: skip
  """What `pallas_kernels.aot` compiles: a call forward and backward."""
  B, T, (N, K) = 2, 512, heads
  ends = (np.array([T, 9]), np.array([7, S])) if padded else (np.full(1, T), np.full(1, S))
  asked = Asked(0.1, causal, window, *ends, padded)
  shapes = [(B, T, N, width), *[(B, S, K, width)] * 2, *([(*bias, T, S)] if bias else [])]

  def loss(q, k, v, bias=None):
    out, lse = cudnn.attention(asked)(q, k, v, bias)
    return jnp.sin(out).astype(jnp.float32).sum() + (lse.sum() if through == "both" else 0.0)

  places = tuple(range(len(shapes)))
  return jax.grad(loss, places), [jax.ShapeDtypeStruct(x, jnp.dtype(dtype)) for x in shapes]


@pytest.mark.parametrize("T, H, spec, taken", [
  (128, 64, AttentionSpec(), "cudnn"),
  (128, 256, AttentionSpec(), "mosaic_gpu"),
  (128, 64, AttentionSpec(mask=Causal()), "mosaic_gpu"),
  (1, 128, AttentionSpec(mask=Causal()), "cudnn"),
])  # fmt: skip
def test_auto_takes_what_was_faster_where_both_can_run(T, H, spec, taken, monkeypatch):
  can = lambda name, reason: monkeypatch.setitem(api.IMPLEMENTATIONS, name, dataclasses.replace(
    api.IMPLEMENTATIONS[name], refusal=lambda *call: reason
  ))  # fmt: skip
  q, k = (jax.ShapeDtypeStruct((1, length, 2, H), jnp.bfloat16) for length in (T, 128))
  at = Tokens.of_length(T, offset=128 - T), Tokens.of_length(128)
  can("cudnn", None)
  can("mosaic_gpu", None)
  assert api.choose(q, k, k, spec, *at) == taken
  assert api.choose(q, k, k, spec, *at, implementation="cudnn") == "cudnn"
  can("mosaic_gpu", "is not for this GPU")
  assert api.choose(q, k, k, spec, *at) == "cudnn"


@pytest.fixture(scope="module")
def compiled():
  return ahead.for_h100(__file__)


@pytest.mark.cuda
@pytest.mark.parametrize("name", COMPILED)
def test_a_call_compiles_for_an_h100(compiled, name):
  kind = "ScaleBias" if "bias" in COMPILED[name] else ""
  forward, backward = f"__cudnn$fmha{kind}Softmax", f"__cudnn$fmha{kind}SoftmaxBackward"
  times = 2 if name == "merged" else 1
  assert not compiled[name].error
  found = sorted(target for target in compiled[name].calls if "cudnn" in target)
  assert found == [forward, *itertools.repeat(backward, times)]


if __name__ == "__main__":
  ahead.compile_for_h100(__file__, "case", COMPILED)
