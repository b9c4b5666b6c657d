"""Recurrences in kernels for Hopper GPUs: states from chunk to chunk, and products within chunks.

A kernel carries the states and makes scores and outputs as it goes, and so in reverse; others
solve the systems of the delta rule, make scores whose decay varies along the width, and gradients
within chunks, of all chunks at once. XLA does what is small: decays of tokens that are alike along
a head, as weights of scores (bfloat16) and numbers of tokens, masks of documents; and a bonus. A
gradient keeps the states that enter chunks, in bfloat16, and the corrections of the delta rule; the
rest it computes again. `jax.jvp` and second derivatives do not go through.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core.varying import split, together
from attnx.recurrence import chunks
from pallas_kernels.gpu import chunk_scan, delta_rule, linear_recurrence
from pallas_kernels.gpu.chunk_scan import C, Plan, Tokens
from pallas_kernels.gpu.linear_recurrence import Decayed, Kind

WIDTHS = (64, 128, 256)


def refusal(xs: dict[str, jax.Array], chunk: int) -> str | None:
  """Why the kernels cannot run a call, or None when they can.

  Args:
    xs: q, k, v and perhaps others, (B, T, heads, width) each.
    chunk: tokens handled at once.
  """
  (_, T, _, H), V = xs["q"].shape, xs["v"].shape[3]
  if jax.default_backend() != "gpu":
    return f"runs on Hopper GPUs, not on {jax.default_backend()}"
  if (found := getattr(jax.devices()[0], "compute_capability", "none")) != "9.0":
    return f"runs on Hopper GPUs, of compute capability 9.0, not on {found}"
  if (reason := split()) is not None:
    return reason
  if wrong := {str(xs[name].dtype) for name in "qkv"} - {"bfloat16"}:
    # a state sums over all tokens, and float16 ends at 65504
    return f"wants q, k and v in bfloat16, got {', '.join(sorted(wrong))}; cast them"
  if H not in WIDTHS or V not in WIDTHS:
    return f"wants widths of 64, 128 or 256, got H={H} and V={V}"
  if chunk != C or T < chunk:
    return f"wants a chunk of {C} tokens and T no shorter, got {chunk} and T={T}"
  return None


def run(
  xs: dict[str, jax.Array],
  bonus: jax.Array | None,
  state: jax.Array,
  segment: jax.Array | None,
  chunk: int,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """`linear_attention`, or `delta_rule` where there is a beta, of arguments that are checked.

  Args:
    xs: q, k, v and perhaps log_decay and beta, (#B, T, heads, width) each.
    bonus, state, segment, chunk: as those of `linear_attention`; the state is float32.
    interpret: parameters of the interpreter of GPU kernels, to run on the CPU.
  """
  (B, T), N = xs["q"].shape[:2], state.shape[1]
  xs, bonus, state = together((xs, bonus, state))
  xs = {name: jnp.pad(x, [(0, 0), (0, -T % C), (0, 0), (0, 0)]) for name, x in xs.items()}
  found = xs, bonus, state, chunks.runs(segment, B, T, C)
  compute = functools.partial(_compute, Kind(bonus is not None, "beta" in xs), Plan(N, interpret))
  if interpret:  # has effects, which cannot be computed again
    out, state = compute(*found)
  else:
    walked = jax.checkpoint_policies.save_only_these_names(chunk_scan.WALKED)
    out, state = jax.checkpoint(compute, policy=walked)(*found)
  return out[:, :T], state


def _compute(
  kind: Kind,
  plan: Plan,
  xs: dict[str, jax.Array],
  bonus: jax.Array | None,
  state: jax.Array,
  runs: chunks.Runs | None,
) -> tuple[jax.Array, jax.Array]:
  """`run` of whole chunks."""
  vector = "log_decay" in xs and xs["log_decay"].shape[3] > 1
  plan = plan._replace(weighs=not vector)
  tokens, found = _vector(xs, kind, plan) if vector else (_scalar(xs, kind, plan), None)
  if runs is not None:
    tokens, found = _documents(tokens, found, runs, state.shape)
  values = _correction(xs, tokens, found, plan) if kind.delta else xs["v"]
  out, state = chunk_scan.scan(*together((tokens, values, state)), plan)
  if bonus is None:
    return out, state
  q, k, v = (_repeated(xs[name].astype(jnp.float32), plan.heads) for name in "qkv")
  return (out + jnp.sum(q * bonus * k, -1, keepdims=True) * v).astype(out.dtype), state


def _vector(xs: dict[str, jax.Array], kind: Kind, plan: Plan) -> tuple[Tokens, Decayed]:
  """What chunks are where the decay varies along the width."""
  log_decay = xs["log_decay"].astype(jnp.float32)
  found = linear_recurrence.decayed(xs["q"], xs["k"], log_decay, kind, plan)
  return Tokens(found.into, found.onto, found.inside, found.total), found


def _scalar(xs: dict[str, jax.Array], kind: Kind, plan: Plan) -> Tokens:
  """What chunks are where it does not, or there is none."""
  visible = np.tri(C, k=-kind.before, dtype=bool)
  q, k, dtype = xs["q"], xs["k"], jnp.bfloat16
  if "log_decay" not in xs:
    return Tokens(q, k, jnp.asarray(visible, dtype)[None, None, None])
  sums = chunks.log_sums(_cut(xs["log_decay"].astype(jnp.float32)))  # (2, #B, chunks, #N, C, 1)
  until = chunks.through_previous(sums) if kind.before else sums
  weights = jnp.exp(jnp.where(visible, chunks.between(until, sums.mT), -jnp.inf))
  total = jnp.exp(sums[0] + sums[1])[..., -1, :]
  total = jnp.broadcast_to(total, (*total.shape[:2], plan.heads, q.shape[3]))
  read = jnp.exp(until[0] + until[1])[..., 0]
  write = jnp.exp(chunks.between(sums[..., -1:, :], sums))[..., 0]
  return Tokens(q, k, weights.astype(dtype), total, read, write)


def _documents(
  tokens: Tokens, found: Decayed | None, runs: chunks.Runs, shape: tuple[int, ...]
) -> tuple[Tokens, Decayed | None]:
  """The same where tokens meet those of their document only; `shape` is that of the state."""
  count, rows = runs.own.shape[:2]
  flat = chunks.Runs(runs.own.reshape(-1, C), runs.before.reshape(-1, 1))
  first = lambda x: jnp.swapaxes(x.reshape(count, rows, *x.shape[1:]), 0, 1)[:, :, None]
  meet, enters, leaves = first(flat.meet()), first(flat.enters()), first(flat.leaves())
  total = jnp.ones((1, count, *shape[1:3]), jnp.float32) if tokens.total is None else tokens.total
  tokens = tokens._replace(
    inside=jnp.where(meet, tokens.inside, 0), total=jnp.where(first(flat.passes()), total, 0.0)
  )
  if found is None:
    one = jnp.ones((), jnp.float32)
    read, write = (one if x is None else x for x in (tokens.read, tokens.write))
    read, write = jnp.where(enters, read, 0.0), jnp.where(leaves, write, 0.0)
    return tokens._replace(read=read, write=write), None
  enters, leaves = (x.reshape(rows, -1, 1, 1) for x in (enters, leaves))
  q, k = jnp.where(enters, tokens.queries, 0), jnp.where(leaves, tokens.keys, 0)
  if found.asks is not None and found.overlap is not None:
    overlap = jnp.where(meet, found.overlap, 0)
    found = found._replace(asks=jnp.where(enters, found.asks, 0), overlap=overlap)
  return tokens._replace(queries=q, keys=k), found


def _correction(
  xs: dict[str, jax.Array], tokens: Tokens, found: Decayed | None, plan: Plan
) -> chunk_scan.Correction:
  """What makes the corrections of a chunk of the state that enters it."""
  beta = _cut(xs["beta"].astype(jnp.float32))[..., 0]  # (B, chunks, N, C)
  if found is not None:
    assert found.asks is not None and found.overlap is not None
    return delta_rule.corrections(found.asks, xs["v"], beta, beta, found.overlap, plan)
  gamma = -beta if tokens.read is None else -beta * tokens.read
  return delta_rule.corrections(xs["k"], xs["v"], beta, gamma, tokens.inside, plan)


def _cut(x: jax.Array) -> jax.Array:
  """Tokens (B, T, N, X) by chunks, (B, chunks, N, C, X)."""
  return jnp.swapaxes(x.reshape(x.shape[0], -1, C, *x.shape[2:]), 2, 3)


def _repeated(x: jax.Array, heads: int) -> jax.Array:
  """Tokens with as many heads, or one."""
  return x if x.shape[2] in (1, heads) else jnp.repeat(x, heads // x.shape[2], axis=2)
