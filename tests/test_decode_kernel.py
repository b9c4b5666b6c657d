"""The decoding kernel against float64, on emulated TPUs that tell of races and unwritten memory."""

import dataclasses
import itertools
import sys

import ahead
from cache_case import CacheCase, meet, paged
import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.algebra import Algebra
from pallas_kernels.tpu import decode as kernel
from pallas_kernels.decoding import Partials, combined
from pallas_kernels.tpu.decode import decode
from pallas_kernels.tpu.decode_call import visits
from pallas_kernels.visits import EMPTY, FULL, PARTIAL, Operand

EMULATED = pltpu.InterpretParams()  # what was never written reads as NaN
BLOCK = 128


def exp2(scores, visible, peak):
  weights = jnp.exp2(scores - peak)
  return weights if visible is True else jnp.where(visible, weights, 0.0)


SOFTMAX = Algebra(
  score=lambda products, facts: products * 0.3,
  visible=meet,
  weigh=exp2,
  edit=lambda weights, facts: weights,
  height=lambda scores: scores,
  exp=jnp.exp2,
  signed=False,
)


@dataclasses.dataclass
class Case(CacheCase):
  """Arrays of a call, (B, K, S, X) for keys and values; the oracle of SOFTMAX."""

  slots = 2
  B: int = 3
  N: int = 4
  K: int = 2
  T: int = 3
  S: int = 300
  H: int = 16
  V: int = 24
  lengths: tuple[int, ...] = (300, 0, 130)
  dtype: str = "float32"

  def __post_init__(self):
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.asarray(jnp.asarray(rng.normal(size=shape), self.dtype), np.float64)
    self.q = draw(self.B, self.N, self.T, self.H)
    self.k, self.v = draw(self.B, self.K, self.S, self.H), draw(self.B, self.K, self.S, self.V)
    self.place(self.S // 2 + 7 * np.arange(self.T))

  @property
  def stored(self) -> str:
    return self.dtype

  def softmax(self, visible=None) -> Partials:
    visible = self.visible() if visible is None else visible
    return self.exponential(self.products() * 0.3, visible)

  def decode(self, *more, algebra=SOFTMAX, arguments=None, **how):
    arguments = self.arguments() if arguments is None else arguments
    run = lambda lengths, *x: decode(
      *x, *more, lengths=lengths,
      **dict(dict(algebra=algebra, block_k=BLOCK, interpret=EMULATED), **how),
    )  # fmt: skip
    return jax.jit(run)(jnp.asarray(self.lengths), *arguments)


def close(parts: Partials, want: Partials, algebra=SOFTMAX, rtol=1e-5, atol=1e-5):
  got = combined(parts, algebra)
  for field in dataclasses.fields(Partials):
    of = lambda parts: getattr(parts, field.name)
    np.testing.assert_allclose(of(got), of(want), rtol, atol, err_msg=field.name)


def races_found() -> bool:
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  return interpret_pallas_call.races.races_found


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_splits_merge_to_attention_over_all_keys(splits):
  case = Case()
  parts = case.decode(splits=splits)
  assert parts.out.shape == (splits, case.B, case.N, case.T, case.V)
  close(parts, case.softmax())
  nothing = jax.tree.map(lambda x: np.asarray(x[:, 1]), parts)  # a row of length 0
  assert not nothing.out.any() and not nothing.mass.any() and not nothing.count.any()
  assert np.isneginf(nothing.peak).all()


def test_one_query_of_bfloat16_without_groups_head_by_head():
  case = Case(B=2, N=2, K=2, T=1, lengths=(300, 256), dtype="bfloat16")
  close(case.decode(block_heads=1), case.softmax(), rtol=2e-2, atol=5e-2)


def test_windows_visit_the_tiles_of_their_plan_only():
  case = Case(B=2, S=512, lengths=(512, 200))
  case.q_side[:, :2] = [400, 401, 402]
  recent = dataclasses.replace(
    SOFTMAX, visible=lambda f: meet(f) & (f.k.position > f.q.position - 230)
  )
  at = np.arange(512)
  visible = case.visible() & (at > case.q_side[:, 1, None, :, None] - 230)
  want = case.softmax(visible)
  kinds = np.array([[EMPTY, PARTIAL, FULL, PARTIAL]])  # of 171 .. 402
  q, k, v, *sides = case.arguments()
  # What must not be read is NaN, what must not be masked sits beyond the query.
  k, v = k.at[:, :, :128].set(jnp.nan), v.at[:, :, :128].set(jnp.nan)
  sides[1] = sides[1].at[:, 1, 256:384].set(1000)
  close(case.decode((), jnp.asarray(kinds), algebra=recent, arguments=(q, k, v, *sides)), want)


def test_packed_text_meets_its_own_segment_with_traced_sides():
  case = Case(B=2, lengths=(300, 300))
  case.k_side[0, 2], case.k_side[1, 2] = np.arange(300) // 100, np.arange(300) // 60
  case.q_side[0, 2], case.q_side[1, 2] = 1, 2
  case.q_side[:, 1, 0] = 0  # sees nothing of its segment
  parts = case.decode(splits=2)
  close(parts, case.softmax())
  assert np.isneginf(combined(parts, SOFTMAX).peak[:, :, 0]).all()


def test_weights_without_peaks_with_signs_edits_and_operands():
  case = Case(B=2, lengths=(300, 77))
  rng = np.random.default_rng(2)
  bias, slope = rng.normal(size=(1, case.N, case.T, case.S)), rng.normal(size=(2, case.N, 1, 1))
  table = rng.normal(size=(1, 1, 1, case.S))

  def score(products, facts):
    bias, slope, table = facts.operands
    return products + bias + slope * facts.k.position.astype(jnp.float32) / 300 + table

  def weigh(scores, visible, peak):
    return jnp.where(visible, jnp.tanh(scores) * jnp.abs(scores), 0.0) + peak * 0

  algebra = Algebra(
    score, meet, weigh, edit=lambda w, f: w * (1 + f.head + 10 * f.batch).astype(jnp.float32)
  )
  operands = tuple(jnp.asarray(x, jnp.float32) for x in (bias, slope, table))
  layout = (Operand(pairs=True), Operand(), Operand(pairs=True))
  parts = case.decode(operands, algebra=algebra, layout=layout, block_heads=1)
  scores = case.products() + bias + slope * np.arange(case.S) / 300 + table
  weights = np.where(case.visible(), np.tanh(scores) * np.abs(scores), 0.0)
  number = 1 + np.arange(case.N)[:, None, None] + 10 * np.arange(2)[:, None, None, None]
  want = case.partial(weights, np.zeros(weights.shape[:-1]), case.visible(), weights * number)
  close(parts, want, algebra, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype, per", [
  ("int8", "head"), ("int8", "row and head"), ("int8", "token"), ("float8_e4m3fn", "head"),
])  # fmt: skip
def test_stored_in_eight_bits(dtype, per):
  case = Case(B=2, T=1, lengths=(300, 130), dtype=dtype)
  case.q = np.random.default_rng(3).normal(size=case.q.shape)
  if dtype == "int8":
    case.k, case.v = (np.round(x * 25).clip(-127, 127) for x in (case.k, case.v))
  shape = {"head": (2,), "row and head": (2, 2), "token": (2, 2, 300)}[per]
  scales = [np.random.default_rng(seed).uniform(0.01, 0.03, shape) for seed in (4, 5)]
  arguments = (jnp.asarray(case.q, jnp.float32), *case.arguments()[1:])
  k_scale, v_scale = (jnp.asarray(x, jnp.float32) for x in scales)
  if per == "token":  # what lies in slots without tokens is NaN
    v_scale = v_scale.at[1, :, 130:].set(jnp.nan)
  heads = 1 if per == "row and head" else None
  parts = case.decode(arguments=arguments, k_scale=k_scale, v_scale=v_scale, block_heads=heads)
  by = (..., None, None) if per != "token" else (..., None)
  case.k, case.v = case.k * scales[0][by], case.v * scales[1][by]
  close(parts, case.softmax())


@pytest.mark.parametrize("page, splits", [(16, 2), (256, 1)])
def test_pages_arrive_before_they_are_read(page, splits):
  case = Case(lengths=(300, 0, 145))
  q, k, v, q_side, _ = case.arguments()
  table, pools, side = paged(case, page, k, v)
  detect = pltpu.InterpretParams(detect_races=True)
  parts = case.decode(
    arguments=(q, *pools, q_side, side), pages=table, splits=splits, block_heads=1,
    block_k=max(page, BLOCK), interpret=detect,
  )  # fmt: skip
  close(parts, case.softmax())
  assert not races_found()


def test_the_detector_sees_pages_that_are_not_waited_for(monkeypatch):
  monkeypatch.setattr(kernel, "_wait", lambda *_: None)
  case = Case(B=1, T=1, lengths=(300,))
  q, k, v, q_side, _ = case.arguments()
  table, pools, side = paged(case, 16, k, v)
  hasty = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
  parts = case.decode(arguments=(q, *pools, q_side, side), pages=table, interpret=hasty)
  jax.block_until_ready(parts)
  assert races_found()


def test_pages_of_int8_with_a_plan_and_scales_of_tokens():
  case = Case(B=2, T=1, lengths=(290, 40))
  case.k, case.v = (np.round(x * 25).clip(-127, 127) for x in (case.k, case.v))
  table, pools, side = paged(case, 32, case.k.astype(np.int8), case.v.astype(np.int8))
  scale = np.random.default_rng(4).uniform(0.01, 0.03, (2, 2, side.shape[2]))
  q, _, _, q_side, _ = case.arguments()
  parts = case.decode(
    (), jnp.asarray([[FULL, PARTIAL, EMPTY]]), arguments=(q, *pools, q_side, side), pages=table,
    k_scale=jnp.asarray(scale, jnp.float32), v_scale=jnp.asarray(scale, jnp.float32),
  )  # fmt: skip
  case.k, case.v = (x * scale[:, :, :300, None] for x in (case.k, case.v))
  close(parts, case.softmax())


def test_visits_share_out_every_tile_once_and_fetch_nothing_for_empty_ones():
  holes = np.random.default_rng(0).integers(0, 3, (5, 7))
  holes[2], holes[3] = EMPTY, FULL
  filled = np.where(np.arange(7) < np.array([[7], [0], [3], [1], [6]]), PARTIAL, EMPTY)
  for splits, prefix in itertools.product((1, 3), (False, True)):
    kinds = filled if prefix else holes
    lists, steps = visits(jnp.asarray(kinds), splits, prefix=prefix)
    row, source, tile, kind = (np.asarray(x).reshape(splits, -1)[:, :steps] for x in lists)
    real = kind > EMPTY
    assert sorted(zip(row[real], tile[real])) == sorted(zip(*np.nonzero(kinds)))
    assert (kind[real] == kinds[row[real], tile[real]]).all()
    assert (source[real] == row[real]).all()
    assert all(set(part) == set(range(5)) for part in row)  # the sums of every row are written
    assert (np.diff(row) >= 0).all()
    idle = ~real[:, 1:]
    for x in (source, tile):
      assert (x[:, 1:] == x[:, :-1])[idle].all()
    loads = np.array([[(real & (row == b))[s].sum() for b in range(5)] for s in range(splits)])
    assert (loads.max(0) - loads.min(0) <= 1).all()


@pytest.mark.parametrize("how, error, says", [
  (dict(splits=0), ValueError, "splits=0"),
  (dict(block_heads=3), ValueError, "block_heads=3"),
  (dict(block_k=100), ValueError, "block_k=100 must be a multiple of 128"),
  (dict(k_scale=np.ones((3, 4))), ValueError, "a scale has the shape"),
  (dict(kinds=np.ones((1, 2), int)), ValueError, "kinds has the shape"),
  (dict(lengths=np.ones((2,), int)), ValueError, "lengths has the shape"),
  (dict(k_scale=np.ones((3, 2, 300)), block_heads=1), ValueError, "block_heads=1"),
  (dict(layout=(Operand(),)), ValueError, "0 operands"),
  (dict(operands=[np.ones((1, 4, 1, 9))], layout=[Operand(pairs=True)]), ValueError, "an operand"),
])  # fmt: skip
def test_wrong_arguments(how, error, says):
  case = Case()
  with pytest.raises(error, match=says):
    decode(*case.arguments(), **dict(dict(algebra=SOFTMAX, block_k=BLOCK), **how))


def test_wrong_arrays():
  q, k, v, q_side, k_side = Case().arguments()
  run = lambda *x, **how: decode(*x, algebra=SOFTMAX, block_k=BLOCK, **how)
  with pytest.raises(ValueError, match="cannot share"):
    run(q[:, :3], k, v, q_side, k_side)
  with pytest.raises(ValueError, match="v has the shape"):
    run(q, k, v[:, :, :5], q_side, k_side)
  with pytest.raises(ValueError, match="k_side has the shape"):
    run(q, k, v, q_side, k_side[..., :5])
  with pytest.raises(ValueError, match="q is float16"):
    run(q.astype(jnp.float16), k, v, q_side, k_side)
  with pytest.raises(ValueError, match="k is float32"):
    run(q.astype(jnp.bfloat16), k, v, q_side, k_side)
  with pytest.raises(ValueError, match="four axes"):
    run(q[0], k, v, q_side, k_side)
  pages = jnp.zeros((3, 1), jnp.int32)
  with pytest.raises(ValueError, match="pages need lengths"):
    run(q, k[:, :, :128], v[:, :, :128], q_side, k_side[..., :128], pages=pages)
  with pytest.raises(ValueError, match="exceed"):
    table = jnp.zeros((3, 2**18), jnp.int32)
    run(q, k[:, :, :128], v[:, :, :128], q_side, k_side, pages=table)
  with pytest.raises(NotImplementedError, match="pages of 300 slots"):
    run(q, k, v, q_side, k_side, pages=pages, lengths=jnp.ones(3, jnp.int32))


def compile_ahead(page: int, dtype: str) -> None:
  """Compiles the kernel for TPU v5e; runs where libtpu is, without a TPU."""
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  place = jax.sharding.SingleDeviceSharding(devices[0])
  array = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
  B, N, K, S, H = 2, 16, 4, 1024, 128
  kept = array((B * S // page, K, page, H) if page else (B, K, S, H), jnp.dtype(dtype))
  more = dict(lengths=array((B,)), kinds=array((1, S // 256)))
  more |= dict(pages=array((B, S // page))) if page else {}
  run = lambda *x, **more: decode(*x, algebra=SOFTMAX, block_k=256, **more)
  q = array((B, N, 1, H), jnp.bfloat16)
  compiled = jax.jit(run).lower(q, kept, kept, array((1, 3, 1)), array((B, 3, S)), **more).compile()
  assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.libtpu
@pytest.mark.parametrize("page, dtype", [
  (0, "bfloat16"), (0, "float8_e4m3fn"), (16, "bfloat16"), (32, "int8"),
])  # fmt: skip
def test_compiles_for_tpu(page, dtype):
  ahead.run(__file__, str(page), dtype)


if __name__ == "__main__":
  compile_ahead(int(sys.argv[1]), sys.argv[2])
