"""Linear attention with decay, in one form that is the recurrent, chunkwise and parallel form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core.instead import replaceable
from attnx.recurrence import chunks, kernels

SUB = 16  # rows of a chunk that share a reference row where the decay varies along H


@replaceable
def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  bonus: jax.Array | None = None,
  state: jax.Array | None = None,
  segment: jax.Array | None = None,
  chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
  """o_t = q_t S_t with S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T.

  With a bonus, o_t = q_t (S_{t-1} + diag(bonus) k_t v_t^T): read before write (arXiv:2404.05892).

  Covers linear attention (no decay, arXiv:2006.16236), retention (a constant per head,
  arXiv:2307.08621), Mamba-2 (a scalar per step and head, arXiv:2405.21060) and gated linear
  attention (a vector per step and head, arXiv:2312.06635). `chunk = 1` is the recurrent form and
  `chunk = T` the parallel form. No exponent is ever positive, so any decay from 1 to 0 is safe.

  Args:
    q: (B, T, N, H). Not scaled here.
    k: (B, T, K, H); K divides N, and N / K heads share a key head. So may the heads of q and v,
      where N is the larger number of theirs.
    v: (B, T, N, V).
    log_decay: at most 0, -inf forgets all; broadcasts to (B, T, N, H). A last axis of 1 is faster.
    bonus: (N, H).
    state: S_0, (B, N, H, V); zero if None. It belongs to the segment of the first token.
    segment: (#B, T) integers; where the id changes, the state starts at zero again.
    chunk: tokens handled at once. Scores are B N chunk^2; where the decay varies along H, there is
      B N chunk^2 H / 16 besides. On a TPU a kernel runs, which keeps them in fast memory, unless
      `pallas_tpu.refusal` says why not; 128 suits it, or 64 where the decay varies along H. Kernels
      for Hopper GPUs want 64: see `kernels.asking`.

  Returns:
    o (B, T, N, V) in the dtype of `v`, and S_T (B, N, H, V) in float32 (float64 if an input is).

  Raises:
    TypeError: an array is not floating.
    ValueError: shapes do not fit each other.
  """
  N = chunks.check(q, k, v, chunk)
  (B, T, _, H), V = q.shape, v.shape[3]
  chunks.check_state(state, (B, N, H, V))
  if bonus is not None and bonus.shape != (N, H):
    raise ValueError(f"bonus has shape {bonus.shape}; expected ({N}, {H})")
  dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
  xs = {"q": q, "k": k, "v": v}
  if log_decay is not None:
    xs["log_decay"] = along(log_decay, (B, T, N, H))
  state = jnp.zeros((B, N, H, V), dtype) if state is None else state.astype(dtype)
  bonus = None if bonus is None else bonus.astype(dtype)
  if (fused := kernels.chosen(xs, chunk)) is not None:
    return fused.run(xs, bonus, state, segment, chunk)
  chunk = min(chunk, T)
  cuts = {name: chunks.cut(x, chunk) for name, x in xs.items()}
  runs = chunks.runs(segment, B, T, chunk)
  every = -(-H // (2 * chunk))  # so that the states kept are at most twice the size of v
  state, out = chunks.scan(_step, state, (cuts, runs), consts=(bonus,), every=every)
  return chunks.join(out, T), state


def along(log_decay: jax.Array, shape: tuple[int, int, int, int]) -> jax.Array:
  """A log decay that broadcasts to (B, T, N, H), as (#B, T, #N, #H).

  Raises:
    ValueError: it does not broadcast.
  """
  log_decay = jnp.asarray(log_decay)
  given = (1,) * (4 - log_decay.ndim) + log_decay.shape
  if len(given) > 4 or any(n not in (1, size) for n, size in zip(given, shape, strict=True)):
    raise ValueError(f"log_decay has shape {log_decay.shape}; expected what broadcasts to {shape}")
  return jnp.broadcast_to(log_decay.reshape(given), (given[0], shape[1], *given[2:]))


def _step(state, xs, bonus):
  """One chunk: the state before it to the state after it and its outputs (B, C, N, V)."""
  cuts, runs = xs
  N, dtype = state.shape[1], state.dtype
  q, k, v = (chunks.heads_first(cuts[name], N, dtype) for name in "qkv")
  last, meet = 0 if bonus is None else -1, None if runs is None else runs.meet()[:, None]
  into, onto, read, sums, decay = q, k, None, None, None
  if "log_decay" in cuts:
    sums = chunks.log_sums(chunks.heads_first(cuts["log_decay"], N, dtype))
    read = sums if bonus is None else chunks.through_previous(sums)
    into = q * jnp.exp(read[0] + read[1])
    onto = k * jnp.exp(chunks.between(sums[..., -1:, :], sums))
    decay = jnp.exp(sums[0] + sums[1])[..., -1:, :].mT
  scores = decayed_scores(q, k, read, sums, last, meet)
  before = into @ state
  kept = state if decay is None else decay * state
  if runs is not None:
    before = jnp.where(runs.enters()[:, None, :, None], before, 0.0)
    onto = jnp.where(runs.leaves()[:, None, :, None], onto, 0.0)
    kept = jnp.where(runs.passes()[:, None, :, None], kept, 0.0)
  out = before + scores @ v
  if bonus is not None:
    out += jnp.sum(q * bonus[:, None] * k, axis=-1, keepdims=True) * v
  return kept + onto.mT @ v, jnp.swapaxes(out, 1, 2).astype(cuts["v"].dtype)


def decayed_scores(q, k, read=None, sums=None, last=0, meet=None):
  """sum_h q_th k_sh exp(read_th - sums_sh) for s <= t + last, else 0: (B, N, C, C).

  Args:
    q, k: (B, N, C, H).
    read, sums: `chunks.log_sums` up to where a query reads and a key is written, (2, B, N, C, X)
      with X = H, or 1 where all of a head decays alike; None is no decay.
    last: 0 to read after the write, -1 to read before it.
    meet: which pairs are of one document, broadcasts to (B, N, C, C); None is all.
  """
  visible = np.tri(q.shape[-2], k=last, dtype=bool)
  visible = visible if meet is None else visible & meet
  if sums is None:
    return jnp.where(visible, q @ k.mT, 0.0)
  if sums.shape[-1] == 1:
    return (q @ k.mT) * jnp.exp(jnp.where(visible, chunks.between(read, sums.mT), -jnp.inf))
  return jnp.where(visible, _vector_scores(q, k, read, sums, last), 0.0)


def _vector_scores(q, k, read, sums, last):
  """`decayed_scores` for sums (2, B, N, C, H); what is not visible is any finite number.

  Rows come in blocks of `SUB`. Seen from the start of its block, a query has decayed since and an
  earlier key has decayed until, so their product is a matrix product without a positive exponent
  (arXiv:2312.06635). Pairs within a block are taken one by one.
  """
  C = q.shape[-2]
  pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -C % SUB), (0, 0)], mode="edge")
  q, k, read, sums = (pad(x) for x in (q, k, read, sums))  # edges, so that no sum ever rises
  blocks = lambda x: x.reshape(*x.shape[:-2], -1, SUB, x.shape[-1])
  P = q.shape[-2] // SUB
  start = blocks(chunks.through_previous(sums))[..., :1, :]  # (2, B, N, P, 1, H)
  earlier = np.arange(P * SUB) < SUB * np.arange(P)[:, None]  # (P, S)
  until = chunks.between(start, sums[..., None, :, :])  # (B, N, P, S, H)
  keys = k[..., None, :, :] * jnp.exp(jnp.where(earlier[..., None], until, -jnp.inf))
  queries = blocks(q) * jnp.exp(chunks.between(blocks(read), start))
  far = queries @ keys.mT  # (B, N, P, SUB, S)
  pairs = chunks.between(blocks(read)[..., :, None, :], blocks(sums)[..., None, :, :])
  inside = np.tri(SUB, k=last, dtype=bool)[..., None]
  pairs = jnp.exp(jnp.where(inside, pairs, -jnp.inf))  # (B, N, P, SUB, SUB, H)
  near = jnp.sum(blocks(q)[..., :, None, :] * blocks(k)[..., None, :, :] * pairs, axis=-1)
  near = near[..., None, :] * np.eye(P)[:, None, :, None].astype(near.dtype)
  found = far + near.reshape(far.shape)  # with the heads of the decay, if q and k have one
  return found.reshape(*found.shape[:-3], P * SUB, P * SUB)[..., :C, :C]
