"""Attention in fused kernels for Hopper GPUs, for every spec whose parts work number by number."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np

from attnx.attention import by_tile
from attnx.attention import plan as plans
from attnx.attention.by_tile import FEW
from attnx.attention.handed import (
  Handed, all_exist, cotangents, hand_over, of_kernel, outlined, padded, sides,
)  # fmt: skip
from attnx.attention.partial import Partial
from attnx.attention.spec import AttentionSpec
from attnx.core.tokens import Tokens
from attnx.core.varying import split
from pallas_kernels.algebra import Algebra, Facts, Side
from pallas_kernels.decoding import finished
from pallas_kernels.gpu import backward, decode, decode_call, streaming
from pallas_kernels.gpu.tiles import Chosen, choose
from pallas_kernels.visits import Operand

LIST = 2**24  # tiles of a plan, of which a kernel reads one number each: 64 MiB
WIDTHS = range(32, 257, 32)  # of heads


def partial(
  q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens,
  *, blocks: Chosen | None = None, interpret: Any = False,
) -> Partial:  # fmt: skip
  """`reference.partial` without the scores ever leaving registers, and its gradient.

  Products are added up in float32, weights are rounded to the dtype of the inputs before they read
  values, and softmax takes its exponentials to base 2. Where weights rescale, the output is divided
  by their sum and rounded to the dtype of the inputs, as a library kernel returns it, unless there
  are few queries. Reverse-mode derivatives of first order.

  Args:
    q, k, v, spec, q_tokens, k_tokens: as for `attend`; shapes have been checked.
    blocks: how the work is cut; by `pallas_kernels.gpu.tiles` if None.
    interpret: emulate on CPU, for tests: `InterpretGPUParams`.
  """
  q, k, spec = by_tile.widened(spec, q, k, q_tokens, k_tokens)
  T, H, S = q.shape[1], q.shape[3], k.shape[1]
  handed = hand_over(spec, q, q_tokens, k_tokens)
  blocks = choose(H, v.shape[3], q.dtype) if blocks is None else blocks
  cuts = _cuts(blocks, H, v.shape[3])
  rows, columns = (
    -(-length // math.lcm(*sizes)) * math.lcm(*sizes)
    for length, sizes in zip((T, S), zip(*cuts), strict=True)
  )
  tokens = plans.pad(q_tokens, rows), plans.pad(k_tokens, columns)
  kinds = tuple(plans.rows(spec.mask, *tokens, *cut).kinds() for cut in cuts)
  block = 0
  if T <= FEW and S % 8 == H % 64 == v.shape[3] % 64 == 0:
    block = decode_call.block_of(k, v, S)
    few = plans.rows(spec.mask, q_tokens, plans.pad(k_tokens, -(-S // block) * block), T, block)
    kinds += (few.kinds()[:, 0],)
  exist = rows == T and columns == S and all(map(all_exist, tokens))
  algebra = by_tile.algebra(spec, handed, H, q.dtype, exist, late=True)
  algebra = dataclasses.replace(algebra, turns=True)
  run = _Run(algebra, handed, blocks, interpret, kinds, (T, S, block))
  traced = None if isinstance(kinds[0], np.ndarray) else kinds
  out, *stats = run.fold(
    q, k, v, [padded(operand, rows, columns) for operand in handed.operands],
    (sides(q_tokens, rows), sides(k_tokens, columns)), traced,
  )  # fmt: skip
  return of_kernel(algebra, out, *(jnp.swapaxes(x, 1, 2) for x in stats))


def _cuts(blocks: Chosen, H: int, V: int) -> list[tuple[int, int]]:
  """Queries and keys of a tile of each kernel's plan."""
  keys = blocks.keys.k, backward.keys_of_line(blocks.keys, H, V)
  return [*((cut.line, cut.k) for cut in (blocks.forward, blocks.queries)), keys]


def summary(spec, q, k, v, q_tokens: Tokens, k_tokens: Tokens) -> plans.Summary | None:
  """The plan of the forward kernel for a call that fits it; arrays may be shapes only."""
  if unfit(q, k, v, spec) is not None:
    return None
  q, _, spec = by_tile.widened(spec, q, k)
  blocks = choose(q.shape[3], v.shape[3], q.dtype).forward
  outcome = plans.outcome(spec.mask, q_tokens, k_tokens, blocks.line, blocks.k)
  return dataclasses.replace(outcome, pieces=f"{blocks.q} x {blocks.k}")


class _Run:
  """The forward and the backward kernels of one call, as a function with a gradient.

  It returns out (B, T, N, V), and (B, N, T) twice: where the algebra has peaks, out is divided by
  the mass, and the logarithm of it, in the unit of peaks, comes first, else the mass; then the
  count.

  `kinds` are those of the plans of the three kernels, which share sides and operands. A few
  queries, as in decoding, have a kernel of their own, unless a gradient is asked for: `sizes` are
  T, S and the keys of its tiles, 0 if it is not to be used, and its plan is the fourth.
  """

  def __init__(self, algebra: Algebra, handed: Handed, blocks: Chosen, interpret, kinds, sizes):
    self.sizes = sizes
    self.algebra = algebra
    self.kinds = kinds if isinstance(kinds[0], np.ndarray) else None
    self.blocks = blocks
    layout = tuple(Operand(operand.pairs) for operand in handed.operands)
    self.how = dict(algebra=algebra, layout=layout, interpret=interpret)
    self.fold = jax.custom_vjp(self._few if sizes[2] else lambda *args: self._forward(*args)[0])
    self.fold.defvjp(self._forward, self._backward)

  def _few(self, q, k, v, operands, sides, kinds):
    T, S, block = self.sizes
    parts = decode.decode(
      jnp.swapaxes(q, 1, 2), k, v, sides[0][..., :T], sides[1][..., :S],
      [x[:, :, :T, :S] for x in operands], (self.kinds or kinds)[3], block_k=block,
      **self.how,
    )  # fmt: skip
    out, size, count = finished(parts, self.algebra)
    return jnp.swapaxes(out, 1, 2), size, count

  def _forward(self, q, k, v, operands, sides, kinds):
    args = (q, k, v, *sides, operands, (self.kinds or kinds)[0])
    out, stats = streaming.forward(*args, blocks=self.blocks.forward, **self.how)
    size, count = (stats[:, :, row] for row in (streaming.SIZE, streaming.COUNT))
    saved = (q, k, v, operands, sides, kinds, out, size)
    return (out.astype(jnp.float32) if self.sizes[2] else out, size, count), saved

  def _backward(self, saved, grads):
    q, k, v, operands, sides, kinds, out, size = saved
    dout, slope, _ = grads

    def pulled():
      sums = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
      return jnp.swapaxes(jax.lax.optimization_barrier(sums), 1, 2)  # alone they run along memory

    told = jnp.stack(self.algebra.told(size, slope, pulled), axis=2)  # ORIGIN, SLOPE
    read = dout.astype(q.dtype)
    args = lambda number: (
      q, k, v, *sides, operands, (self.kinds or kinds)[number], told, read
    )  # fmt: skip
    dq, by_row = backward.gradient_of_queries(*args(1), blocks=self.blocks.queries, **self.how)
    dk, dv = backward.gradient_of_keys(*args(2), blocks=self.blocks.keys, **self.how)
    pairs = functools.partial(
      backward.gradient_of_pairs, *args(1), blocks=self.blocks.queries, **self.how
    )
    moved = cotangents(operands, [o.pairs for o in self.how["layout"]], by_row, pairs)
    return dq, dk, dv, moved, None, None


def refusal(q, k, v, spec: AttentionSpec, *tokens: Tokens) -> str | None:
  """Why a call cannot run in the kernels here; None if it can."""
  if (backend := jax.default_backend()) != "gpu":
    return f"runs on Hopper GPUs (H100, H200), not on {backend}"
  if (capability := str(getattr(jax.devices()[0], "compute_capability", "none"))) != "9.0":
    return f"is compiled for Hopper GPUs (compute capability 9.0), not for {capability}"
  return split() or unfit(q, k, v, spec)


def unfit(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> str | None:
  """Why a call fits no kernel on any Hopper GPU; None if it does. Nothing is computed."""
  q, k, spec = by_tile.widened(spec, q, k)
  wrong = by_tile.unalike(q, k, v, ("bfloat16", "float16")) or by_tile.besides(spec)
  if wrong is not None:
    return wrong
  H, V = q.shape[3], v.shape[3]
  if not {H, V} <= set(WIDTHS):
    return f"wants heads of a multiple of 32 up to 256, got H={H} and V={V}: pad them with zeros"
  block = choose(H, V, q.dtype).forward
  many = by_tile.unlisted(q, k, (block.line, block.k), LIST)
  return many or by_tile.untraceable(spec, q, k) or _unknown(spec, q, k)


KNOWN = {  # what a warpgroup can do to the registers of a tile
  "abs", "add", "and", "broadcast_in_dim", "clamp", "convert_element_type", "cos",
  "custom_jvp_call", "div", "eq", "erf", "exp", "exp2", "ge", "gt", "integer_pow", "jit", "le",
  "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "rem", "round",
  "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign",
  "sin", "square", "sub", "tanh", "xor",
}  # fmt: skip


def _unknown(spec: AttentionSpec, q: jax.Array, k: jax.Array) -> str | None:
  """Why a spec cannot be read in registers, where each thread has some numbers of a tile."""
  shape = (64, 64)
  tokens = Tokens.of_length(q.shape[1]), Tokens.of_length(k.shape[1])
  handed, operands = outlined(spec, q, *tokens)
  if any(not o.pairs and x.shape[3] > 1 for x, o in zip(operands, handed.operands)):
    return "looks nothing up in tables, which its parts have: choose another implementation"
  how = by_tile.algebra(spec, handed, q.shape[3], q.dtype)

  def tile(products, side, number, *tiles):
    sides, one = Side(side, side, side), jnp.full((1, 1), number)
    facts = Facts(sides, sides, number, number, tiles, origin=one)
    scores, visible, told = how.masked(products, facts, True)
    height = scores if how.height is None else how.height(scores)
    weights = how.weigh(scores, told, jnp.zeros_like(scores))
    return visible, height, how.edited(weights, facts)

  one = lambda x: (1, 1) if x.shape[2:] == (1, 1) else shape
  struct = functools.partial(jax.ShapeDtypeStruct, shape)
  jaxpr = jax.make_jaxpr(tile)(
    struct(jnp.float32), struct(jnp.int32), jax.ShapeDtypeStruct((), jnp.int32),
    *(jax.ShapeDtypeStruct(one(x), x.dtype) for x in operands),
  )  # fmt: skip
  if found := sorted(_primitives(jaxpr.jaxpr) - KNOWN):
    return f"cannot {', '.join(found)} in registers: choose another implementation"
  return None


def _primitives(jaxpr) -> set[str]:
  """Names of what a program does to more than one number."""
  names: set[str] = set()
  for eqn in jaxpr.eqns:
    if any(np.size(x.aval) > 1 for x in eqn.invars):
      names.add(eqn.primitive.name)
    for inner in jaxprs_in_params(eqn.params):
      names |= _primitives(inner)
  return names
