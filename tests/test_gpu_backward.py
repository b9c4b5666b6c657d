"""Backward kernels of Hopper GPUs: numbers in interpret mode, and compilation ahead of time."""

import dataclasses
import functools

import ahead
import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.algebra import Algebra, Facts, Side, softmax
from pallas_kernels.gpu import backward
from pallas_kernels.gpu.tiles import Blocks, choose
from pallas_kernels.visits import EMPTY, FULL, PARTIAL, Operand

pytestmark = pytest.mark.usefixtures("compiled_once")
INTERPRET = InterpretGPUParams()
BLOCKS = Blocks(q=64, k=64, warpgroups=2, stages=2)


@dataclasses.dataclass(frozen=True)
class Case:
  """What is attended to, and how.

  Attributes:
    visible: facts -> bool.
    sizes: B, T, S, N, K, H, V.
    operands: shapes of float32 operands (#B, #N, #T, #S).
    score: (scaled products, facts) -> scores; softmax where `algebra` is None.
    algebra: scale -> Algebra.
    edit: (weights, facts) -> weights.
  """

  visible: object = lambda facts: facts.k.index < 10**9
  sizes: tuple = (1, 128, 128, 2, 1, 64, 64)
  operands: tuple = ()
  score: object = None
  algebra: object = None
  edit: object = lambda weights, facts: weights
  pairs: bool = False

  def of(self) -> Algebra:
    exists = lambda f: self.visible(f) & (f.q.position >= 0) & (f.k.position >= 0)
    scale = self.sizes[5] ** -0.5
    if self.algebra is not None:
      return self.algebra(scale, exists)
    return softmax(scale, score=self.score, visible=exists, edit=self.edit)


def causal(f):
  return f.k.position <= f.q.position


def packed(f):
  return causal(f) & (f.k.segment == f.q.segment)


def alibi(scores, f):
  """Capped scores, a learned slope for each head, and a learned number for all."""
  slope, factor = f.operands
  capped = 2.0 * jnp.tanh(scores / 2.0)
  far = (f.q.position - f.k.position).astype(jnp.float32)
  return capped - slope * jnp.abs(far) + factor * capped * capped


def sigmoid(scale, visible):
  weigh = lambda s, seen, peak: jnp.where(seen, jax.nn.sigmoid(s), 0.0)
  return Algebra(
    lambda products, f: products * scale - 2.0, visible, weigh, lambda w, f: w, signed=False
  )


def signed(scale, visible):
  """Weights of either sign, half of which do not read."""
  weigh = lambda s, seen, peak: jnp.where(seen, jnp.tanh(s) * jnp.exp(s - peak), 0.0)
  even = lambda w, f: jnp.where((f.q.index + f.k.index) % 2 == 0, 2 * w, 0.0)
  return Algebra(
    lambda products, f: products * scale, visible, weigh, even, height=lambda s: s
  )


CASES = {
  "full": Case(),
  "packed": Case(packed, (2, 128, 128, 1, 1, 64, 64)),
  "group": Case(causal, (1, 100, 150, 2, 1, 64, 64)),
  "wide": Case(causal, (1, 100, 150, 1, 1, 192, 128)),
  "widths": Case(causal, (1, 64, 64, 1, 1, 96, 32)),
  "learned": Case(causal, operands=((1, 2, 1, 1), (1, 1, 1, 1)), score=alibi),
  "bias": Case(
    causal, (2, 150, 128, 2, 1, 64, 64), ((1, 2, 150, 128),), lambda s, f: s + f.operands[0],
    pairs=True,
  ),
  "sigmoid": Case(causal, (1, 128, 128, 1, 1, 64, 64), algebra=sigmoid),
  "signed": Case(packed, (1, 128, 128, 1, 1, 64, 64), algebra=signed),
}  # fmt: skip


def tokens(length: int, B: int = 1) -> np.ndarray:
  """(B, 3, length): index, position and segment of packed rows."""
  index = np.arange(length)
  first = np.array([[0, 70, 111], [0, 64, 128]])[:B]
  segment = (index[None] >= first[:, 1:2]).astype(int) + (index[None] >= first[:, 2:])
  return np.stack([np.broadcast_to(index, (B, length)), np.broadcast_to(index, (B, length)),
                   segment], 1).astype(np.int32)  # fmt: skip


def padded(side: np.ndarray, length: int) -> np.ndarray:
  return np.pad(side, ((0, 0), (0, 0), (0, length - side.shape[2])), constant_values=-1)


def facts_of(q_side, k_side, b, n, operands=()):
  at = lambda side: side[b if side.shape[0] > 1 else 0]
  q = Side(*(jnp.asarray(x)[:, None] for x in at(q_side)))
  k = Side(*(jnp.asarray(x)[None] for x in at(k_side)))
  pick = lambda x: x[b if x.shape[0] > 1 else 0, n if x.shape[1] > 1 else 0]
  return Facts(q, k, b, n, tuple(map(pick, operands)))


def kinds_of(visible, q_side, k_side, rows: int, columns: int) -> np.ndarray:
  """Of tiles of so many rows and columns; tokens at position -1 do not exist."""
  B = max(q_side.shape[0], k_side.shape[0])
  lines, length = (-(-x.shape[2] // size) for x, size in ((q_side, rows), (k_side, columns)))
  q_side, k_side = padded(q_side, lines * rows), padded(k_side, length * columns)
  exists = lambda side: (side[:, 1] >= 0)[: B if side.shape[0] > 1 else 1]
  seen = np.stack([
    np.broadcast_to(visible(facts_of(q_side, k_side, b, 0)), (lines * rows, length * columns))
    for b in range(B)
  ])  # fmt: skip
  seen = seen & exists(q_side)[:, :, None] & exists(k_side)[:, None]
  tiles = seen.reshape(B, lines, rows, length, columns)
  every, some = tiles.all((2, 4)), tiles.any((2, 4))
  return np.where(every, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.int32)


class Problem:
  """Arrays of a case, what its kernels give, and what float64 gives."""

  def __init__(self, case: Case, dtype):
    rng = np.random.default_rng(5)
    self.case, self.algebra, self.interpret = case, case.of(), INTERPRET
    B, T, S, N, K, H, V = case.sizes
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V)
    self.q, self.k, self.v, self.grad = (jnp.asarray(normal(*s), dtype) for s in shapes)
    self.operands = [jnp.asarray(0.1 * normal(*shape)) for shape in case.operands]
    self.layout = [Operand(case.pairs)] * len(case.operands)
    self.sides = tokens(T, B if case.visible is packed else 1), tokens(S)
    if case.visible is packed:
      self.sides = tokens(T, B), tokens(S, B)
    self.slope = normal(B, N, T)

  def weights(self, q, k, operands, b, n, peak):
    """Weights and edited weights (T, S) of a head, and their scores."""
    facts = facts_of(*self.sides, b, n, operands)
    group = q.shape[2] // k.shape[2]
    scores, visible, told = self.algebra.masked(q[b, :, n] @ k[b, :, n // group].T, facts, True)
    if peak is None:
      if self.algebra.height is None:
        return jnp.zeros((q.shape[1],))
      return jax.lax.stop_gradient(jnp.maximum(self.algebra.peak(scores, visible, 1)[:, 0], -1e30))
    w = self.algebra.weigh(scores, told, peak[:, None])
    return jnp.abs(w), self.algebra.edit(w, facts)

  def expected(self):
    """Peaks, and the gradients of q, k, v and operands, in float64."""
    with jax.enable_x64(True):
      wide = lambda x: jnp.asarray(np.asarray(x, np.float64))
      slope, grad = wide(self.slope), wide(self.grad)
      B, T, _, N, K, _, _ = self.case.sizes

      def loss(q, k, v, operands):
        total, peaks = 0.0, []
        for b in range(B):
          for n in range(N):
            peak = self.weights(q, k, operands, b, n, None)
            mass, edited = self.weights(q, k, operands, b, n, peak)
            out = edited @ v[b, :, n // (N // K)]
            total += (out * grad[b, :, n]).sum() + (mass.sum(1) * slope[b, n]).sum()
            peaks.append(peak)
        return total, jnp.stack(peaks).reshape(B, N, T)

      args = (*map(wide, (self.q, self.k, self.v)), list(map(wide, self.operands)))
      gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
      (_, peaks), grads = gradient(*args)
      return np.asarray(peaks), jax.tree.map(np.asarray, grads)

  def told(self, peaks, rows: int, columns: int, traced: bool = False):
    """Arguments of a kernel whose tiles have so many queries and keys."""
    kinds = kinds_of(self.algebra.visible, *self.sides, rows, columns)
    length = lambda axis, size: kinds.shape[axis] * size
    sides = [padded(self.sides[0], length(1, rows)), padded(self.sides[1], length(2, columns))]
    fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), *(
      (0, whole - n if n > 1 else 0)
      for n, whole in zip(x.shape[2:], (length(1, rows), length(2, columns)))
    )))  # fmt: skip
    stats = jnp.stack([jnp.asarray(peaks, jnp.float32), jnp.asarray(self.slope)], 2)
    kinds = jnp.asarray(kinds) if traced else kinds
    return (self.q, self.k, self.v, *sides, [fill(x) for x in self.operands], kinds, stats,
            self.grad)  # fmt: skip

  def how(self, blocks: Blocks = BLOCKS):
    return dict(algebra=self.algebra, layout=self.layout, blocks=blocks, interpret=self.interpret)


def near(actual, expected, tolerance: float):
  """Within a tolerance of the largest entry."""
  actual = np.asarray(actual, np.float64)
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@functools.cache
def solved(name: str, dtype=jnp.float16):
  problem = Problem(CASES[name], dtype)
  return problem, *problem.expected()


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_queries_and_numbers_are_those_of_float64(name):
  problem, peaks, (dq, _, _, moved) = solved(name)
  told = problem.told(peaks, BLOCKS.line, BLOCKS.k)
  actual, tables = backward.gradient_of_queries(*told, **problem.how())
  assert actual.dtype == problem.q.dtype
  near(actual, dq, 2e-3)
  assert len(tables) == (0 if problem.case.pairs else len(moved))
  for table, expected in zip(tables, moved):
    axes = [axis for axis, n in enumerate(expected.shape) if n == 1]
    near(table.sum(axes, keepdims=True), expected, 2e-3)


def keys(problem: Problem, peaks, blocks: Blocks = BLOCKS, **more):
  H, V = problem.case.sizes[5:]
  told = problem.told(peaks, blocks.k, backward.keys_of_line(blocks, H, V), **more)
  return backward.gradient_of_keys(*told, **problem.how(blocks))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_keys_and_values_are_those_of_float64(name):
  problem, peaks, (_, dk, dv, _) = solved(name)
  for x, expected in zip(keys(problem, peaks), (dk, dv), strict=True):
    assert x.dtype == problem.k.dtype
    near(x, expected, 2e-3)


SHAPES = [(1, 2, 150, 128), (2, 1, 1, 128), (1, 2, 150, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_arrays_of_pairs_are_those_of_float64(shape):
  problem = Problem(dataclasses.replace(CASES["bias"], operands=(shape,)), jnp.float16)
  peaks, (*_, (expected,)) = problem.expected()
  told = problem.told(peaks, BLOCKS.line, BLOCKS.k)
  actual = backward.gradient_of_pairs(*told, number=0, **problem.how())
  assert actual.dtype == jnp.float32
  near(actual, expected, 1e-5)  # no number on the way is rounded to 16 bits


def test_bfloat16_blocks_and_plans_that_are_known_at_run_time():
  problem, peaks, (_, dk, dv, _) = solved("group", jnp.bfloat16)
  for blocks in (Blocks(64, 128, 1, 2), Blocks(64, 64, 3, 3)):
    for x, expected in zip(keys(problem, peaks, blocks, traced=True), (dk, dv), strict=True):
      assert x.dtype == jnp.bfloat16
      near(x, expected, 2e-2)


@pytest.mark.parametrize("name", ["group", "wide"])
def test_no_two_threads_touch_the_same_memory_at_once(name):
  problem, peaks, _ = solved(name)
  gpu_callbacks.reset_gpu_interpret_mode_state()
  problem.interpret = InterpretGPUParams(detect_races=True)
  try:
    backward.gradient_of_queries(*problem.told(peaks, BLOCKS.line, BLOCKS.k), **problem.how())
    assert not gpu_callbacks.get_races().races_found
    keys(problem, peaks)
    assert not gpu_callbacks.get_races().races_found
  finally:
    problem.interpret = INTERPRET


@pytest.mark.parametrize("name", ["group", "wide"])
def test_lines_that_see_nothing_are_zero(name):
  problem, peaks, _ = solved(name)

  def told(rows, columns):
    found = list(problem.told(peaks, rows, columns))
    found[3], found[6] = found[3].copy(), np.full_like(found[6], EMPTY)
    found[3][:, 1] = -1  # before the first key
    return found

  last = problem.case.sizes[5:]
  of_keys = told(BLOCKS.k, backward.keys_of_line(BLOCKS, *last))
  assert all(not np.any(x) for x in backward.gradient_of_keys(*of_keys, **problem.how()))
  of_queries = told(BLOCKS.line, BLOCKS.k)
  assert not np.any(backward.gradient_of_queries(*of_queries, **problem.how())[0])


def test_what_the_kernels_do_not_take_is_refused():
  problem, peaks, _ = solved("wide")
  with pytest.raises(NotImplementedError, match="two warpgroups"):
    keys(problem, peaks, Blocks(64, 64, 1, 2))
  with pytest.raises(ValueError, match="multiple of 64"):
    Blocks(64, 80, 2, 2)
  problem.algebra = dataclasses.replace(problem.algebra, turns=False)
  with pytest.raises(NotImplementedError, match="turns=True"):
    keys(problem, peaks)
  problem.algebra = problem.case.of()


T, HEADS = 512, 2
WIDTHS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
MASKS = {"full": lambda f: True, "causal": causal, "packed": packed}
COMPILED = {
  f"{kernel}-{H}-{V}-{mask}-{dtype}": dict(kernel=kernel, H=H, V=V, mask=mask, dtype=dtype)
  for kernel in ("queries", "keys")
  for H, V in WIDTHS
  for mask in MASKS
  for dtype in (("bfloat16", "float16") if mask == "causal" else ("bfloat16",))
} | {
  f"{kernel}-{score}": dict(kernel=kernel, score=score)
  for kernel in ("queries", "keys", "pairs")
  for score in ("capped", "learned", "bias")
  if kernel != "pairs" or score == "bias"
}  # fmt: skip


def ahead_case(kernel: str, H=128, V=128, mask="causal", dtype="bfloat16", score=None):
  """A kernel at a size where all kinds of its tiles occur, and its shapes."""
  chosen = choose(H, V, dtype)
  blocks = chosen.keys if kernel == "keys" else chosen.queries
  if score in ("learned", "bias") and kernel != "keys":
    blocks = dataclasses.replace(blocks, k=64)
  shapes = {"learned": [(1, HEADS, 1, 1), (1, 1, 1, 1)], "bias": [(1, HEADS, T, T)]}
  scores = {
    "capped": lambda s, f: 30.0 * jnp.tanh(s / 30.0),
    "learned": alibi,
    "bias": lambda s, f: s + f.operands[0],
  }
  visible = MASKS[mask]
  algebra = softmax(H**-0.5, visible=visible, score=scores.get(score))
  side = tokens(T)
  cut = (blocks.line, blocks.k)
  if kernel == "keys":
    cut = (blocks.k, backward.keys_of_line(blocks, H, V))
  if mask == "full":
    kinds = np.full((1, T // cut[0], T // cut[1]), FULL, np.int32)
  else:
    kinds = kinds_of(visible, side, side, *cut)
  layout = [Operand(score == "bias")] * len(shapes.get(score, ()))
  how = dict(algebra=algebra, layout=layout, blocks=blocks)
  if kernel == "pairs":
    how["number"] = 0
  run = lambda q, k, v, side, operands, rows, grad: getattr(backward, f"gradient_of_{kernel}")(
    q, k, v, side, side, operands, kinds, rows, grad, **how
  )
  array = lambda *shape, dtype=jnp.dtype(dtype): jax.ShapeDtypeStruct(shape, dtype)
  qkv = [array(1, T, HEADS, H), array(1, T, 1, H), array(1, T, 1, V)]
  return run, [
    *qkv, array(1, 3, T, dtype=jnp.int32),
    [array(*shape, dtype=jnp.float32) for shape in shapes.get(score, ())],
    array(1, HEADS, 2, T, dtype=jnp.float32), array(1, T, HEADS, V),
  ]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
  return ahead.for_h100(__file__)


@pytest.mark.cuda
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_an_h100_with_sums_in_registers(compiled, name):
  """Where tiles are masked, or scores edited, some numbers for each tile may lie in memory."""
  kernel = compiled[name].kernel()
  masks = dict(full=32, causal=112, packed=240)
  most = next((most for mask, most in masks.items() if f"-{mask}-" in name), 600)
  assert kernel.stored + kernel.loaded <= most


if __name__ == "__main__":
  ahead.compile_for_h100(__file__, "ahead_case", COMPILED)
