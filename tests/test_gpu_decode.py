"""The decoding kernel for GPUs against float64, on an emulated GPU that tells of races."""

import dataclasses
from typing import Any

import ahead
from cache_case import CacheCase, meet, paged
import jax
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
  get_races, reset_gpu_interpret_mode_state
)  # fmt: skip
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.algebra import Algebra, softmax
from pallas_kernels.gpu import decode as kernel
from pallas_kernels.gpu.decode import decode
from pallas_kernels.decoding import Partials, combined
from pallas_kernels.gpu.decode_call import Cut
from pallas_kernels.visits import EMPTY, FULL, PARTIAL, Operand

pytestmark = pytest.mark.usefixtures("compiled_once")
EMULATED = InterpretGPUParams()  # what was never written reads as NaN
BLOCK = 64
SCALE = 0.11


SOFTMAX = softmax(SCALE, visible=meet)


@dataclasses.dataclass
class Case(CacheCase):
  """Arrays of a call, (B, S, K, X) for keys and values; the oracle of SOFTMAX."""

  slots = 1
  B: int = 2
  N: int = 4
  K: int = 1
  T: int = 1
  S: int = 200
  H: int = 64
  V: int = 64
  lengths: tuple[int, ...] = (200, 70)
  dtype: str = "bfloat16"
  stored: str = ""

  def __post_init__(self):
    rng = np.random.default_rng(0)
    draw = lambda dtype, *shape: np.asarray(
      jnp.asarray(rng.normal(size=shape), dtype), np.float64
    )
    self.stored = self.stored or self.dtype
    self.q = draw(self.dtype, self.B, self.N, self.T, self.H)
    of = "float32" if self.stored == "int8" else self.stored
    self.k = draw(of, self.B, self.S, self.K, self.H)
    self.v = draw(of, self.B, self.S, self.K, self.V)
    if self.stored == "int8":
      self.k, self.v = (np.round(x * 25).clip(-127, 127) for x in (self.k, self.v))
    self.place(self.S - self.T + np.arange(self.T))

  def softmax(self, visible=None, between=lambda x: x) -> Partials:
    visible = self.visible() if visible is None else visible
    return self.exponential(between(self.products() * SCALE) / np.log(2), visible)

  def decode(self, *more, algebra=SOFTMAX, arguments=None, **how) -> Partials:
    arguments = self.arguments() if arguments is None else arguments
    how = dict(dict(block_k=BLOCK, splits=1, interpret=EMULATED), **how)
    arrays = {name: how.pop(name) for name in list(how) if isinstance(how[name], jax.Array)}
    arrays.setdefault("lengths", jnp.asarray(self.lengths))
    run = lambda arrays, *x: decode(*x, algebra=algebra, **how, **arrays)
    try:
      return jax.jit(run)(arrays, *arguments, *more)
    except BaseException:
      reset_gpu_interpret_mode_state()
      raise


def close(parts: Partials, want: Partials, algebra=SOFTMAX, rtol=1e-2, atol=2e-2):
  got = combined(parts, algebra)
  for field in dataclasses.fields(Partials):
    of = lambda parts: np.asarray(getattr(parts, field.name), np.float64)
    bound = dict(rtol=rtol, atol=atol) if field.name == "out" else dict(rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(of(got), of(want), **bound, err_msg=field.name)


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_merge_to_attention_over_all_keys(splits):
  case = Case(B=3, N=8, K=2, T=4, V=128, lengths=(200, 0, 130))
  parts = case.decode(splits=splits)
  assert parts.out.shape == (splits, case.B, case.N, case.T, case.V)
  close(parts, case.softmax())
  nothing = jax.tree.map(lambda x: np.asarray(x[:, 1]), parts)  # a row of length 0
  assert not nothing.out.any() and not nothing.mass.any() and not nothing.count.any()
  assert np.isneginf(nothing.peak).all()


@pytest.mark.parametrize("dtype, N, K, T", [
  ("float16", 2, 2, 1), ("bfloat16", 8, 1, 1), ("bfloat16", 8, 1, 9),
])  # fmt: skip
def test_groups_of_heads_are_columns_of_a_tile(dtype, N, K, T):
  case = Case(B=1, N=N, K=K, T=T, lengths=(150,), dtype=dtype)
  finer = dict(rtol=2e-3, atol=2e-3) if dtype == "float16" else {}
  close(case.decode(block_k=128), case.softmax(), **finer)


def test_windows_visit_the_tiles_of_their_plan_only():
  case = Case(S=512, T=3, lengths=(512, 200))
  case.q_side[:, :2] = [400, 401, 402]
  recent = softmax(SCALE, visible=lambda f: meet(f) & (f.k.position > f.q.position - 230))
  visible = case.visible() & (np.arange(512) > case.q_side[:, 1, None, :, None] - 230)
  kinds = np.array([[EMPTY, EMPTY, PARTIAL, FULL, FULL, FULL, PARTIAL, EMPTY]])  # of 171 .. 402
  q, k, v, *sides = case.arguments()
  # What must not be read is NaN, what must not be masked sits beyond the query.
  k, v = k.at[:, :128].set(jnp.nan), v.at[:, :128].set(jnp.nan)
  sides[1] = sides[1].at[:, 1, 192:384].set(1000)
  parts = case.decode(
    (), jnp.asarray(kinds), algebra=recent, arguments=(q, k, v, *sides), splits=2
  )
  visible[1, ..., :192] &= np.arange(192) < 200  # FULL tiles of a short row are masked
  short = visible.copy()
  short[1, ..., 192:] = False  # its slots 192 .. 199 sit beyond the query now
  close(parts, case.softmax(short), recent)


def test_packed_text_meets_its_own_segment():
  case = Case(T=2, lengths=(200, 200))
  case.k_side[0, 2], case.k_side[1, 2] = np.arange(200) // 50, np.arange(200) // 60
  case.q_side[0, 2], case.q_side[1, 2] = 1, 2
  case.q_side[:, 1, 0] = 0  # sees nothing of its segment
  parts = case.decode(splits=2)
  close(parts, case.softmax())
  assert np.isneginf(combined(parts, SOFTMAX).peak[:, :, 0]).all()


def test_slots_in_order_need_no_side_and_no_count():
  case = Case(T=4, lengths=(200, 130))
  q, k, v, q_side, _ = case.arguments()
  uncounted = dataclasses.replace(SOFTMAX, counts=False)
  parts = case.decode(arguments=(q, k, v, q_side, None), algebra=uncounted)
  assert not np.asarray(parts.count).any()
  close(dataclasses.replace(parts, count=case.softmax().count[None]), case.softmax())


def test_softcap():
  case = Case(B=1, T=2, lengths=(150,))
  capped = softmax(SCALE, visible=meet, score=lambda x, _: 2 * jnp.tanh(x / 2))
  parts = case.decode(algebra=capped, splits=None, block_k=None)  # 128
  assert parts.out.shape[0] == 2
  close(parts, case.softmax(between=lambda x: 2 * np.tanh(x / 2)))


def test_weights_without_peaks_with_signs_edits_and_operands():
  case = Case(N=4, K=2, T=3, lengths=(200, 77))
  rng = np.random.default_rng(2)
  bias, slope = rng.normal(size=(1, 4, 3, 200)), rng.normal(size=(2, 4, 1, 1))
  table = rng.normal(size=(1, 1, 1, 200))

  def score(products, facts):
    bias, slope, table, one, _ = facts.operands
    return products + bias + slope * facts.k.position.astype(jnp.float32) / 200 + table * one

  def some(facts):
    return meet(facts) & (facts.operands[4].astype(jnp.int32) > 0)

  def weigh(scores, visible, peak):
    return jnp.where(visible, jnp.tanh(scores), 0.0) + peak * 0

  algebra = Algebra(
    score, some, weigh, edit=lambda w, f: w * (1 + f.head + 10 * f.batch).astype(jnp.float32)
  )
  two, truth = np.array([[[[2.0]]], [[[3.0]]]]), rng.uniform(size=(1, 1, 3, 200)) < 0.8
  operands = [jnp.asarray(x, jnp.float32) for x in (bias, slope, table, two)]
  operands.append(jnp.asarray(truth, jnp.int8))
  pairs, single = Operand(pairs=True), Operand()
  layout = (pairs, single, pairs, single, pairs)
  parts = case.decode(operands, algebra=algebra, layout=layout, splits=2)
  scores = case.products() + bias + slope * np.arange(200) / 200 + table * two
  visible = case.visible() & truth
  weights = np.where(visible, np.tanh(scores), 0.0)
  number = 1 + np.arange(4)[:, None, None] + 10 * np.arange(2)[:, None, None, None]
  want = case.partial(weights, np.zeros(weights.shape[:-1]), visible, weights * number)
  close(parts, want, algebra, atol=1.0)  # weights of up to 14, rounded to bfloat16


def test_sigmoid_on_full_and_partial_tiles():
  case = Case(T=2, lengths=(200, 100))
  weigh = lambda scores, visible, _: (
    jax.nn.sigmoid(scores) if visible is True else jnp.where(visible, jax.nn.sigmoid(scores), 0.0)
  )
  algebra = Algebra(
    lambda x, _: x * SCALE, meet, weigh, edit=lambda w, _: w, signed=False
  )
  kinds = jnp.asarray([[FULL, FULL, FULL, PARTIAL]])
  weights = np.where(case.visible(), 1 / (1 + np.exp(-case.products() * SCALE)), 0.0)
  want = case.partial(weights, np.zeros(weights.shape[:-1]), case.visible())
  close(case.decode((), kinds, algebra=algebra), want, algebra, atol=5e-2)


@pytest.mark.parametrize("stored, dtype, per", [
  ("int8", "bfloat16", "head"), ("int8", "float16", "row and head"),
  ("int8", "bfloat16", "token"), ("float8_e4m3fn", "bfloat16", "head"),
  ("float8_e4m3fn", "float16", "token"),
])  # fmt: skip
def test_stored_in_eight_bits(stored, dtype, per):
  case = Case(N=4, K=2, lengths=(200, 130), dtype=dtype, stored=stored)
  shape = {"head": (2,), "row and head": (2, 2), "token": (2, 2, 200)}[per]
  scales = [np.random.default_rng(seed).uniform(0.01, 0.03, shape) for seed in (4, 5)]
  k_scale, v_scale = (jnp.asarray(x, jnp.float32) for x in scales)
  if per == "token":  # what lies in slots without tokens is NaN
    v_scale = v_scale.at[1, :, 130:].set(jnp.nan)
  parts = case.decode(k_scale=k_scale, v_scale=v_scale, block_k=128)
  by = [x.swapaxes(1, 2) if per == "token" else np.expand_dims(x, -2) for x in scales]
  case.k, case.v = case.k * by[0][..., None], case.v * by[1][..., None]
  close(parts, case.softmax())


@pytest.mark.parametrize("page, splits, stored", [
  (16, 2, ""), (128, 1, ""), (32, 1, "float8_e4m3fn"),
])  # fmt: skip
def test_pages_arrive_before_they_are_read(page, splits, stored):
  case = Case(B=3, lengths=(200, 0, 145), stored=stored)
  q, k, v, q_side, _ = case.arguments()
  table, pools, side = paged(case, page, k, v)
  parts = case.decode(
    arguments=(q, *pools, q_side, side), pages=table, splits=splits,
    interpret=InterpretGPUParams(detect_races=True),
  )  # fmt: skip
  jax.block_until_ready(parts)
  assert not get_races().races_found
  close(parts, case.softmax())


@dataclasses.dataclass
class Other:
  """A ring of two places, each taken for the other."""

  ring: Any

  @property
  def at(self):
    return self

  def __getitem__(self, slot):
    return self.ring.at[1 - slot]


def test_the_detector_sees_tiles_that_are_sent_to_a_place_in_use(monkeypatch):
  send = kernel._send
  wrong = lambda block, place, scratch, *more: send(
    block, place, scratch._replace(k=Other(scratch.k)), *more
  )
  monkeypatch.setattr(kernel, "_send", wrong)
  monkeypatch.setattr(kernel.decode_call, "cut_of", lambda *_: Cut(8, 1, stages=2))
  parts = Case(B=1, lengths=(200,)).decode(interpret=InterpretGPUParams(detect_races=True))
  jax.block_until_ready(parts)
  assert get_races().races_found


def test_pages_of_int8_with_a_plan_and_scales_of_tokens():
  case = Case(N=4, K=2, lengths=(190, 40), stored="int8")
  table, pools, side = paged(case, 32, case.k.astype(np.int8), case.v.astype(np.int8))
  scale = np.random.default_rng(4).uniform(0.01, 0.03, (2, 2, side.shape[2]))
  q, _, _, q_side, _ = case.arguments()
  scales = jnp.asarray(scale, jnp.float32)
  parts = case.decode(
    (), jnp.asarray([[FULL, PARTIAL, PARTIAL, EMPTY]]), arguments=(q, *pools, q_side, side),
    pages=table, k_scale=scales, v_scale=scales,
  )  # fmt: skip
  by = scale[:, :, :200].swapaxes(1, 2)[..., None]
  case.k, case.v = case.k * by, case.v * by
  close(parts, case.softmax())


def refused(error, says, *arguments, **how):
  with pytest.raises(error, match=says):
    decode(*arguments, **dict(dict(algebra=SOFTMAX, block_k=BLOCK), **how))


@pytest.mark.parametrize("how, error, says", [
  (dict(splits=0), ValueError, "splits=0"),
  (dict(block_k=100), ValueError, "block_k=100 must be a multiple of 64"),
  (dict(block_k=320), ValueError, "at most 256"),
  (dict(k_scale=np.ones((3, 4))), ValueError, "a scale has the shape"),
  (dict(kinds=np.ones((1, 2), int)), ValueError, "kinds has the shape"),
  (dict(lengths=np.ones((3,), int)), ValueError, "lengths has the shape"),
  (dict(layout=(Operand(),)), ValueError, "0 operands"),
  (dict(operands=[np.ones((1, 4, 1, 9))], layout=[Operand(pairs=True)]), ValueError, "an operand"),
  (dict(operands=[np.ones((1, 4, 1, 9))], layout=[Operand()]), NotImplementedError, "table"),
  (dict(algebra=dataclasses.replace(SOFTMAX, turns=False)), NotImplementedError, "turns=False"),
])  # fmt: skip
def test_wrong_arguments(how, error, says):
  refused(error, says, *Case().arguments(), **how)


def test_wrong_arrays():
  q, k, v, *sides = Case(K=2).arguments()
  refused(ValueError, "cannot share", q[:, :3], k, v, *sides)
  refused(ValueError, "v has the shape", q, k, v[:, :5], *sides)
  refused(ValueError, "k_side has the shape", q, k, v, sides[0], sides[1][..., :5])
  refused(ValueError, "four axes", q[0], k, v, *sides)
  refused(NotImplementedError, "rows of 196 slots", q, k[:, :196], v[:, :196], *sides)
  refused(NotImplementedError, "width 32", q[..., :32], k[..., :32], v, *sides)
  refused(NotImplementedError, "q is float32", q.astype(jnp.float32), k, v, *sides)
  refused(NotImplementedError, "both alike", q, k, v.astype(jnp.int8), *sides)
  pages = jnp.zeros((2, 2), jnp.int32)
  refused(ValueError, "pages need lengths", q, k[:, :128], v[:, :128], *sides[:1], None,
          pages=pages)  # fmt: skip
  table = dict(pages=pages, lengths=jnp.ones(2, jnp.int32))
  refused(NotImplementedError, "pages of 100 slots", q, k[:, :100], v[:, :100], *sides, **table)
  refused(NotImplementedError, "do not divide", q, k[:, :96], v[:, :96], *sides, **table)
  wide = [jnp.zeros((1, 512, 1, 256), jnp.bfloat16)] * 2
  refused(NotImplementedError, "do not fit", jnp.zeros((1, 32, 1, 256), jnp.bfloat16), *wide,
          sides[0][:1], None, block_k=256)  # fmt: skip


COMPILED = {
  "eight heads of queries": dict(),
  "no groups": dict(N=2, K=2, dtype="float16"),
  "three parts": dict(B=3, splits=3, side=False),
  "four queries": dict(T=4),
  "sixteen queries": dict(T=16),
  "narrow": dict(H=64, V=64),
  "wide": dict(H=256, V=256),
  "uneven": dict(H=192, V=128),
  "small pages": dict(page=16),
  "large pages": dict(page=128, H=64, V=64),
  "int8": dict(stored="int8", per="head"),
  "int8 of tokens in pages": dict(stored="int8", per="token", page=32),
  "float8": dict(stored="float8_e4m3fn", per="head"),
  "float8 of tokens": dict(stored="float8_e4m3fn", per="token", dtype="float16"),
  "int8, four queries": dict(stored="int8", per="head", T=4),
  "int8, uneven": dict(stored="int8", per="head", H=192, V=192),
  "no peaks, and operands": dict(K=2, T=2, operands=True),
}
ALONE = ("four queries", "sixteen queries", "int8, four queries", "int8, uneven")


def ahead_case(
  B=1, N=8, K=1, T=1, S=4096, H=128, V=128, dtype="bfloat16", stored="", page=0, per="",
  side=True, splits=None, operands=False,
):  # fmt: skip
  """A call of `decode`, as `pallas_kernels.aot` wants it."""
  block = 128 if H == 64 else 64
  array = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
  lead = (B * S // page, page) if page else (B, S)
  k, v = (array((*lead, K, width), stored or dtype) for width in (H, V))
  more = dict(lengths=array((B,)), kinds=array((1, S // block)))
  more |= dict(pages=array((B, S // page))) if page else {}
  scale = array((K,) if per == "head" else (B, K, S), "float32")
  more |= dict(k_scale=scale, v_scale=scale) if per else {}
  algebra = softmax(H**-0.5, visible=meet)
  layout = ()
  if operands:
    layout = (Operand(pairs=True), Operand(), Operand(), Operand(pairs=True))
    kinds = ("float32", "float32", "float32", "int8")
    shapes = ((1, N, T, S), (B, N, 1, 1), (1, 1, 1, 1), (1, 1, T, S))
    more |= dict(operands=list(map(array, shapes, kinds)))
    algebra = Algebra(
      lambda x, facts: x * facts.operands[1] + facts.operands[0] * facts.operands[2],
      lambda facts: meet(facts) & (facts.operands[3].astype(jnp.int32) > 0),
      lambda scores, visible, _: jnp.where(visible, jax.nn.relu(scores), 0.0),  # a custom_jvp
      edit=lambda weights, facts: weights * (1 + facts.head).astype(jnp.float32), signed=False,
    )  # fmt: skip
  run = lambda q, k, v, q_side, k_side, more: decode(
    q, k, v, q_side, k_side if side else None, algebra=algebra, layout=layout, splits=splits,
    block_k=block, **more,
  )  # fmt: skip
  return run, [array((B, N, T, H), dtype), k, v, array((B, 3, T)), array((1, 3, S)), more]


@pytest.fixture(scope="module")
def compiled():
  return ahead.for_h100(__file__)


@pytest.mark.cuda
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_an_h100(compiled, name):
  kernel = compiled[name].kernel()
  assert kernel.stored == kernel.loaded == 0
  assert kernel.registers <= (255 if name in ALONE else 128)  # two blocks share a processor


if __name__ == "__main__":
  ahead.compile_for_h100(__file__, "ahead_case", COMPILED)
