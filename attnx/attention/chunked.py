"""Linear memory in plain XLA: a fold over tiles of pairs (arXiv:2112.05682, arXiv:2205.14135)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnx.attention import plan as plans
from attnx.attention.partial import Partial, empty, merge
from attnx.attention.reference import counted
from attnx.attention.spec import AttentionSpec
from attnx.core.tokens import Tokens
from attnx.core.varying import varying


def partial(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  spec: AttentionSpec,
  q_tokens: Tokens,
  k_tokens: Tokens,
  *,
  q_chunk: int | None = None,
  k_chunk: int | None = None,
) -> Partial:
  """`reference.partial` in O(T + S) memory, for values and for gradients of any order.

  A chunk of queries goes over the tiles of keys that its mask does not leave empty: first those
  where every pair may meet, without the mask, then the others. Derivatives compute every tile
  again, measured from the peaks that the forward pass found, and keep no scores.

  Args:
    q, k, v, spec, q_tokens, k_tokens: as for `attend`; shapes have been checked.
    q_chunk, k_chunk: queries and keys of a tile; by `plan.chunks` unless both are given.
  """
  (B, T), S = q.shape[:2], k.shape[1]
  if q_chunk is None or k_chunk is None:
    q_chunk, k_chunk = plans.chunks(spec, q, k, v, q_tokens, k_tokens)
  bq, bk = q_chunk, k_chunk
  q_tokens, k_tokens = plans.pad(q_tokens, -(-T // bq) * bq), plans.pad(k_tokens, -(-S // bk) * bk)
  plan = plans.tiles(spec.mask, q_tokens, k_tokens, bq, bk)
  heads = lambda x: jnp.swapaxes(x, 2, 3)
  q_tiles = heads(split(q, bq)), split(q_tokens, bq)
  k_tiles = heads(split(k, bk)), heads(split(v, bk)), split(k_tokens, bk)
  rows = fold(spec, q_tiles, k_tiles, plan.kinds())
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]
  return jax.tree.map(join, rows)


def split(tree: Any, chunk: int) -> Any:
  """Leaves (B, L, ...), padded with zeros to whole chunks, as (n, B, chunk, ...)."""

  def cut(x):
    x = jnp.asarray(x)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  return jax.tree.map(cut, tree)


@jax.custom_jvp
def fold(spec: AttentionSpec, q_tiles, k_tiles, kinds: jax.Array) -> Partial:
  """Partials of every chunk of queries, leaves (nq, B, bq, ...).

  Args:
    spec: what to compute.
    q_tiles: queries and their tokens, (nq, B, bq, ...).
    k_tiles: keys, values and their tokens, (nk, B, bk, ...).
    kinds: (nq, nk), whether a tile is empty, partial or full: `Plan.kinds`.
  """
  order = jnp.argsort(-kinds, axis=-1, stable=True)  # full tiles first, empty ones last
  full, visited = ((kinds >= least).sum(-1) for least in (plans.FULL, plans.PARTIAL))
  zero = empty(shape(q_tiles, k_tiles), accumulator(q_tiles))
  zero = varying(zero, spec, q_tiles, k_tiles, kinds)

  def row(of):
    q_tile, order, full, visited = of
    visit = lambda i, p, masked: merge(
      p, tile(spec, q_tile, jax.tree.map(lambda x: x[order[i]], k_tiles), masked=masked)
    )
    p = jax.lax.fori_loop(0, full, functools.partial(visit, masked=False), zero)
    return jax.lax.fori_loop(full, visited, functools.partial(visit, masked=True), p)

  return jax.lax.map(row, (q_tiles, order, full, visited))


@functools.partial(fold.defjvp, symbolic_zeros=True)
def fold_jvp(primals, tangents):
  """d out and d mass at constant peaks, by a sum over tiles that JAX differentiates further."""
  p = fold(*primals)
  leaves, treedef = jax.tree.flatten(primals)
  moving = [type(t) is not jax.custom_derivatives.SymbolicZero for t in jax.tree.leaves(tangents)]
  directions = [t for t, moves in zip(jax.tree.leaves(tangents), moving, strict=True) if moves]
  peaks = jax.lax.stop_gradient(p.peak)

  def sums(*moved):
    rest = iter(moved)
    return remeasured(
      *treedef.unflatten(next(rest) if m else x for x, m in zip(leaves, moving, strict=True)), peaks
    )

  moved = [x for x, moves in zip(leaves, moving, strict=True) if moves]
  _, (out, mass) = jax.jvp(sums, moved, directions)
  return p, Partial(out, mass, jnp.zeros_like(p.peak), jnp.zeros_like(p.count))


def remeasured(spec: AttentionSpec, q_tiles, k_tiles, kinds: jax.Array, peaks: jax.Array):
  """`out` and `mass` of `fold`, measured from `peaks` (nq, B, bq, N), as a plain scan.

  Nothing of a tile survives it but its place in the loops, whatever derivative is taken.
  """

  @jax.checkpoint
  def visit(q_tile, k_tile, kind, peak):
    like = jax.eval_shape(functools.partial(tile, masked=True), spec, q_tile, k_tile, peak)
    nothing = lambda *_: varying(
      (jnp.zeros_like(like.out), jnp.zeros_like(like.mass)), spec, q_tile, k_tile, peak
    )

    def something(q_tile, k_tile, peak):
      p = tile(spec, q_tile, k_tile, peak, masked=True)
      return p.out, p.mass

    return jax.lax.cond(kind > 0, something, nothing, q_tile, k_tile, peak)

  @jax.checkpoint
  def row(of):
    q_tile, kinds, peak = of

    def add(sums, of):
      return jax.tree.map(jnp.add, sums, visit(q_tile, *of, peak)), None

    zero = empty(shape(q_tiles, k_tiles), accumulator(q_tiles))
    zero = varying((zero.out, zero.mass), spec, q_tiles, k_tiles, kinds, peak)
    return jax.lax.scan(add, zero, (k_tiles, kinds))[0]

  return jax.lax.map(row, (q_tiles, kinds, peaks))


def tile(
  spec: AttentionSpec, q_tile, k_tile, peak: jax.Array | None = None, *, masked: bool
) -> Partial:
  """Attention of a chunk of queries over a chunk of keys.

  Args:
    spec: what to compute.
    q_tile: q (B, bq, N, H) and its tokens.
    k_tile: k (B, bk, K, H), v (B, bk, K, V) and their tokens.
    peak: (B, bq, N) to measure from; None for that of these keys.
    masked: False where every pair is known to meet.
  """
  (q, q_tokens), (k, v, k_tokens) = q_tile, k_tile
  (B, N, T, H), (K, S, V) = q.shape, v.shape[1:]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  grouped = (q * spec.factor(H)).reshape(B, K, N // K * T, H)  # the heads of a group are rows
  products = jnp.einsum("bkth,bksh->bkts", grouped, k).reshape(B, N, T, S)
  rows, columns = q_tokens.rows(B, N), k_tokens.columns()
  scores = spec.score(products, rows, columns, spec.tables(jnp.swapaxes(q, 1, 2)))
  visible = spec.visible(rows, columns) if masked else jnp.ones((), bool)
  visible = jnp.broadcast_to(visible, scores.shape)
  if peak is None:
    peak = jax.lax.stop_gradient(spec.normaliser.peak(scores, visible))
  else:
    peak = jnp.swapaxes(peak, 1, 2)
  origin = jnp.where(jnp.isneginf(peak), 0.0, peak)[..., None]
  weights = spec.normaliser.weigh(scores, visible, origin)
  mass, count = jnp.abs(weights).sum(-1), counted(spec, visible, dtype)
  weights = spec.edit(weights, rows, columns)
  out = jnp.einsum("bkts,bksv->bktv", weights.reshape(B, K, -1, S), v).reshape(B, N, T, V)
  for readout in spec.readouts:
    out = out + readout(weights, rows, columns)
  return Partial(*(jnp.swapaxes(x, 1, 2) for x in (out, mass, peak, count)))


def shape(q_tiles, k_tiles) -> tuple[int, ...]:
  """(B, bq, N, V) of a chunk of queries."""
  _, B, N, bq, _ = q_tiles[0].shape
  return B, bq, N, k_tiles[1].shape[-1]


def accumulator(q_tiles) -> Any:
  """float32, or wider where the queries are."""
  return jnp.promote_types(q_tiles[0].dtype, jnp.float32)
