"""Attention in fused TPU kernels, for every spec whose parts work tile by tile."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
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
from pallas_kernels import blocks as tuned
from pallas_kernels.algebra import Algebra
from pallas_kernels.blocks import Chosen, choose
from pallas_kernels.decoding import finished
from pallas_kernels.tpu import backward, decode, streaming
from pallas_kernels.tpu.decode_call import block_of, heads_of
from pallas_kernels.tpu.walk import SUBLANES
from pallas_kernels.visits import Operand

LIST = 60_000  # tiles of a plan that the scalar memory of a chip holds, 1 MiB
START = 0.15 * 2**20  # pairs of a tile that take as long as what is around its pieces
TEXT = 4096  # tokens of a text, where nobody knows before the call which tokens meet


def partial(
  q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens,
  *, blocks: Chosen | None = None, interpret: Any = False,
) -> Partial:  # fmt: skip
  """`reference.partial` without the scores ever leaving fast memory, and its gradient.

  Products of bfloat16 inputs are added up in float32, weights are rounded to bfloat16 before they
  read values, and softmax takes its exponentials to base 2. Float32 inputs are multiplied in full
  precision. Where weights rescale, the output is divided by their sum and rounded to the dtype of
  the inputs, as a library kernel returns it, unless there are few queries. Reverse-mode derivatives
  of first order.

  Args:
    q, k, v, spec, q_tokens, k_tokens: as for `attend`; shapes have been checked.
    blocks: how the work is cut; by `pallas_kernels.blocks` if None.
    interpret: emulate on CPU, for tests: True, or `pltpu.InterpretParams`.
  """
  q, k, spec = by_tile.widened(spec, q, k, q_tokens, k_tokens)
  T, H, S = q.shape[1], q.shape[3], k.shape[1]
  handed = hand_over(spec, q, q_tokens, k_tokens)
  blocks = cut(spec, q, v, q_tokens, k_tokens, handed) if blocks is None else blocks
  sizes = blocks.forward.q, blocks.forward.k
  rows, columns = (-(-n // size) * size for n, size in zip((T, S), sizes, strict=True))
  kinds = plans.rows(
    spec.mask, plans.pad(q_tokens, rows), plans.pad(k_tokens, columns), *sizes
  ).kinds()
  exist = rows == T and columns == S and all(map(all_exist, (q_tokens, k_tokens)))
  run = _Run(by_tile.algebra(spec, handed, H, q.dtype, exist), handed, blocks, interpret, kinds, T)
  heads = lambda x, length: jnp.swapaxes(
    jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))), 1, 2
  )
  traced = None if isinstance(kinds, np.ndarray) else kinds
  by_token = lambda x: jnp.swapaxes(x, 1, 2)[:, :T]
  return of_kernel(run.algebra, *map(by_token, run.fold(
    heads(q, rows), heads(k, columns), heads(v, columns),
    [padded(operand, rows, columns) for operand in handed.operands],
    (sides(q_tokens, rows), sides(k_tokens, columns)), traced,
  )))  # fmt: skip


def cut(spec: AttentionSpec, q, v, q_tokens, k_tokens, handed: Handed) -> Chosen:
  """How the kernels cut a call: as the table of the chip says, and smaller where

  a mask leaves less to visit in smaller tiles, down to 512, and what it leaves is worth more than
  the start of a tile (TEXT stands for masks and tokens that are traced); or tables are looked up
  in, whose rows are wide: as many queries as have rows within 1 MiB, and pieces of 128 x 256. A few
  queries read all heads of a tile at once.
  """
  (T, H), (S, V) = q.shape[1::2], v.shape[1::2]
  dense = sum(x.shape[2:] != (1, 1) for x, pairs in handed.operands if pairs)
  blocks = choose(T, S, H, V, q.dtype, pairs=dense)
  q_size, k_size = blocks.forward.q, blocks.forward.k
  traced = lambda x: isinstance(x, jax.core.Tracer)
  left: Any = lambda size: plans.outcome(spec.mask, q_tokens, k_tokens, *size).pairs
  if any(map(traced, jax.tree.leaves((spec.mask, q_tokens, k_tokens)))):
    left = lambda size: TEXT + sum(size)  # keys that a line of queries visits
  sizes = itertools.product(_halves(q_size), _halves(k_size))
  q_size, k_size = min(sizes, key=lambda size: left(size) * (1 + START / math.prod(size)))
  if T <= FEW:
    k_size = min(k_size, block_of(q, v, S, heads=heads_of(v.shape[2])))
  tables = [x for x, pairs in handed.operands if not pairs and x.shape[3] > 1]
  width = sum(x.shape[3] for x in tables if x.shape[2] > 1)
  q_size = min(q_size, max(128, 2**20 // (4 * max(width, 1)) // 128 * 128))
  most = dict(rows=128, columns=256) if tables else {}
  pieces = lambda b: {name: min(x, most.get(name, x)) for name, x in dataclasses.asdict(b).items()}
  return Chosen(*(tuned.cut(q_size, k_size, pieces(b)) for b in blocks))


def _halves(size: int) -> list[int]:
  """A size, and its halves that are whole registers of at least 512."""
  return [size] + (_halves(size // 2) if size >= 1024 and size % 256 == 0 else [])


def summary(spec: AttentionSpec, q, k, v, q_tokens: Tokens, k_tokens: Tokens) -> plans.Summary:
  """The plan that the forward kernel follows for a call; arrays may be shapes only."""
  q, k, spec = by_tile.widened(spec, q, k)
  handed, _ = outlined(spec, q, q_tokens, k_tokens)
  blocks = cut(spec, q, v, q_tokens, k_tokens, handed).forward
  outcome = plans.outcome(spec.mask, q_tokens, k_tokens, blocks.q, blocks.k)
  lying = ", sums lying" if blocks.lying else ""
  pieces = f"{blocks.rows} x {blocks.columns}, {blocks.ahead} ahead{lying}"
  return dataclasses.replace(outcome, pieces=pieces)


class _Run:
  """The forward and the backward kernels of one call, as a function with a gradient.

  It returns out (B, N, T, V), and (B, N, T) twice: where the algebra has peaks, out is divided by
  the mass, and the logarithm of it, in the unit of peaks, comes first, else the mass; then the
  count. A few queries, as in decoding, have a kernel of their own, unless a gradient is asked for.
  """

  def __init__(self, algebra: Algebra, handed: Handed, blocks: Chosen, interpret, kinds, T: int):
    self.algebra = algebra
    self.T = T
    self.kinds = kinds if isinstance(kinds, np.ndarray) else None
    layout = tuple(Operand(operand.pairs) for operand in handed.operands)
    self.how = dict(algebra=algebra, layout=layout, interpret=interpret)
    self.blocks = blocks
    self.fold = jax.custom_vjp(self._few if T <= FEW else lambda *args: self._forward(*args)[0])
    self.fold.defvjp(self._forward, self._backward)

  def _plan(self, kinds: jax.Array | None) -> Any:
    """What was known before anything ran, which no argument of a traced function may be."""
    return self.kinds if kinds is None else kinds

  def _few(self, q, k, v, operands, sides, kinds):
    rows = [x if x.shape[2] == 1 else x[:, :, : self.T] for x in operands]
    parts = decode.decode(
      q[:, :, : self.T], k, v, sides[0][..., : self.T], sides[1], rows,
      jnp.asarray(self._plan(kinds)[:, 0]), block_k=self.blocks.forward.k, **self.how,
    )  # fmt: skip
    more = (0, q.shape[2] - self.T)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), more] + [(0, 0)] * (x.ndim - 3))
    return tuple(map(pad, finished(parts, self.algebra)))

  def _forward(self, q, k, v, operands, sides, kinds):
    args = (q, k, v, *sides, operands, self._plan(kinds))
    out, stats = streaming.forward(*args, blocks=self.blocks.forward, **self.how)
    size, count = (stats[:, :, row] for row in (streaming.SIZE, streaming.COUNT))
    saved = (q, k, v, operands, sides, kinds, out, size)
    return (out.astype(jnp.float32) if self.T <= FEW else out, size, count), saved

  def _backward(self, saved, grads):
    q, k, v, operands, sides, kinds, out, size = saved
    dout, slope, _ = grads
    pulled = lambda: (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    told = jnp.stack(self.algebra.told(size, slope, pulled), axis=2)  # ORIGIN, SLOPE
    told = jnp.pad(told, ((0, 0), (0, 0), (0, SUBLANES - told.shape[2]), (0, 0)))
    args = (q, k, v, *sides, operands, self._plan(kinds), told, dout.astype(q.dtype))
    dq, dk, dv = backward.gradients(*args, blocks=self.blocks.backward, **self.how)
    beside = lambda of, **which: of(*args, blocks=self.blocks.backward, **self.how, **which)
    layout = self.how["layout"]
    moves = backward.by_row(operands, layout)
    by_row = beside(backward.gradient_of_tables) if moves else []
    of_pairs = functools.partial(beside, backward.gradient_of_pairs)
    moved = cotangents(operands, [o.pairs for o in layout], by_row, of_pairs)
    return dq.astype(q.dtype), dk, dv, moved, None, None


def refusal(q, k, v, spec: AttentionSpec, *tokens: Tokens) -> str | None:
  """Why a call cannot run in the kernels here; None if it can."""
  if jax.default_backend() != "tpu":
    return f"runs on TPU, not on {jax.default_backend()}"
  return split() or unfit(q, k, v, spec)


def unfit(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> str | None:
  """Why a call fits no kernel on any TPU; None if it does. Nothing is computed."""
  q, k, spec = by_tile.widened(spec, q, k)
  wrong = by_tile.unalike(q, k, v, ("bfloat16", "float32")) or by_tile.besides(spec)
  if wrong is not None:
    return wrong
  (T, H), (S, V) = q.shape[1::2], v.shape[1::2]
  block = choose(T, S, H, V, q.dtype).forward
  many = by_tile.unlisted(q, k, (block.q, block.k), LIST)
  return many or by_tile.untraceable(spec, q, k)
