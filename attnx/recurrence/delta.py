"""The delta rule with decay: each step corrects what the state returns for its key."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.core.instead import replaceable
from attnx.recurrence import chunks, kernels
from attnx.recurrence.linear import along, decayed_scores


@replaceable
def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  state: jax.Array | None = None,
  segment: jax.Array | None = None,
  chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
  """o_t = q_t S_t with S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T.

  Here a_t = exp(log_decay_t): first the state decays, then it is corrected towards k_t -> v_t.
  Covers DeltaNet (no decay, arXiv:2406.06484), Gated DeltaNet (a scalar per step and head,
  arXiv:2412.06464) and Kimi Delta Attention (a vector per step and head, arXiv:2510.26692). Inside
  a chunk the corrections solve a unit lower-triangular system. `chunk = 1` is the recurrent form.

  Args:
    q: (B, T, N, H). Not scaled here.
    k: (B, T, K, H); K divides N, and N / K heads share a key head. The state stays bounded where
      beta |k|^2 is between 0 and 2.
    v: (B, T, N, V).
    beta: (B, T, N).
    log_decay: at most 0; (B, T, N), or what broadcasts to (B, T, N, H).
    state: S_0, (B, N, H, V); zero if None. It belongs to the segment of the first token.
    segment: (#B, T) integers; where the id changes, the state starts at zero again.
    chunk: tokens handled at once. On a TPU a kernel runs, unless `pallas_tpu.refusal` says why not;
      64 suits it, and the kernels for Hopper GPUs want 64: see `kernels.asking`.

  Returns:
    o (B, T, N, V) in the dtype of `v`, and S_T (B, N, H, V) in float32 (float64 if an input is).

  Raises:
    TypeError: an array is not floating.
    ValueError: shapes do not fit each other.
  """
  N = chunks.check(q, k, v, chunk)
  (B, T, _, H), V = q.shape, v.shape[3]
  chunks.check_state(state, (B, N, H, V))
  if beta.shape != (B, T, N):
    raise ValueError(f"beta has shape {beta.shape}; expected ({B}, {T}, {N})")
  dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
  xs = {"q": q, "k": k, "v": v, "beta": beta[..., None]}
  if log_decay is not None:
    log_decay = log_decay[..., None] if jnp.ndim(log_decay) == 3 else log_decay
    xs["log_decay"] = along(log_decay, (B, T, N, H))
  state = jnp.zeros((B, N, H, V), dtype) if state is None else state.astype(dtype)
  if (fused := kernels.chosen(xs, chunk)) is not None:
    return fused.run(xs, None, state, segment, chunk)
  chunk = min(chunk, T)
  cuts = {name: chunks.cut(x, chunk) for name, x in xs.items()}
  runs = chunks.runs(segment, B, T, chunk)
  every = -(-H // (2 * chunk))  # so that the states kept are at most twice the size of v
  state, out = chunks.scan(_step, state, (cuts, runs), every=every)
  return chunks.join(out, T), state


@jax.default_matmul_precision("highest")  # the solve amplifies errors
def _step(state, xs):
  """One chunk: the state before it to the state after it and its outputs (B, C, N, V)."""
  cuts, runs = xs
  N, dtype = state.shape[1], state.dtype
  q, k, v, beta = (chunks.heads_first(cuts[x], N, dtype) for x in ("q", "k", "v", "beta"))
  meet = None if runs is None else runs.meet()[:, None]
  kept, into, asks, onto, sums = state, q, k, k, None
  if "log_decay" in cuts:
    sums = chunks.log_sums(chunks.heads_first(cuts["log_decay"], N, dtype))
    decay = jnp.exp(sums[0] + sums[1])
    into, asks, kept = q * decay, k * decay, decay[..., -1:, :].mT * state
    onto = k * jnp.exp(chunks.between(sums[..., -1:, :], sums))
  if runs is not None:
    enters, leaves = (x[:, None, :, None] for x in (runs.enters(), runs.leaves()))
    into, asks = jnp.where(enters, into, 0.0), jnp.where(enters, asks, 0.0)
    onto = jnp.where(leaves, onto, 0.0)
    kept = jnp.where(runs.passes()[:, None, :, None], kept, 0.0)
  overlap = beta * decayed_scores(k, k, sums, sums, -1, meet)
  correction = jax.lax.linalg.triangular_solve(
    overlap, beta * (v - asks @ state), left_side=True, lower=True, unit_diagonal=True
  )
  scores = decayed_scores(q, k, sums, sums, 0, meet)
  out = into @ state + scores @ correction
  return kept + onto.mT @ correction, jnp.swapaxes(out, 1, 2).astype(cuts["v"].dtype)
