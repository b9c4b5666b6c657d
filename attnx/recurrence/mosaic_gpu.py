"""Recurrences in kernels for Hopper GPUs: states from chunk to chunk, and products within chunks.

Kernels make the scores of all chunks, solve the systems of the delta rule, carry the states, and
make outputs, and so in reverse. XLA does what is elementwise: decays of tokens that are alike
along a head, masks, documents, a bonus. A gradient keeps the states that enter chunks, in
bfloat16, and the corrections of the delta rule; the rest it computes again. `jax.jvp` and second
derivatives do not go through. Nothing here was measured yet.
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
from pallas_kernels.gpu.chunk_scan import C, Plan
from pallas_kernels.gpu.linear_recurrence import Decayed, Kind
from pallas_kernels.tpu.linear_recurrence import FLOOR

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
  found, total = _decayed(xs, kind, plan)
  if bonus is not None:
    q, k = (x.astype(jnp.float32) for x in (xs["q"], xs["k"]))
    own = jnp.sum(_repeated(q, plan.heads) * bonus * _repeated(k, plan.heads), -1, keepdims=True)
    found = found._replace(inside=jnp.where(np.eye(C, dtype=bool), _cut(own), found.inside))
  if runs is not None:
    found, total = _documents(found, total, runs, state.shape)
  values = xs["v"] if found.overlap is None else _correction(xs, found, plan)
  tokens = chunk_scan.Tokens(found.into, found.onto, found.inside.astype(jnp.bfloat16), total)
  return chunk_scan.scan(*together((tokens, values, state)), plan)


def _decayed(
  xs: dict[str, jax.Array], kind: Kind, plan: Plan
) -> tuple[Decayed, jax.Array | None]:
  """Queries, keys and scores with their decay, and what a chunk leaves (#B, chunks, N, H) of it."""
  q, k, H = xs["q"], xs["k"], xs["q"].shape[3]
  whole = lambda x: jnp.broadcast_to(x, (*x.shape[:2], plan.heads, H))
  if "log_decay" in xs and xs["log_decay"].shape[3] > 1:
    log_decay = jnp.maximum(xs["log_decay"].astype(jnp.float32), FLOOR)
    total = jnp.exp(jnp.sum(log_decay.reshape(log_decay.shape[0], -1, C, *log_decay.shape[2:]), 2))
    return linear_recurrence.decayed(q, k, log_decay, kind, plan), whole(total)
  score = lambda a: chunk_scan.product(a, k, "nt", plan, True, jnp.float32)
  visible = np.tri(C, k=-kind.before, dtype=bool)
  if "log_decay" not in xs:
    found = Decayed(q, k, jnp.where(visible, score(q), 0.0))
    return found._replace(asks=-k, overlap=score(k)) if kind.delta else found, None
  sums = chunks.log_sums(_cut(xs["log_decay"].astype(jnp.float32)))  # (2, #B, chunks, #N, C, 1)
  read = chunks.through_previous(sums) if kind.before else sums
  pairs = jnp.exp(jnp.where(visible, chunks.between(read, sums.mT), -jnp.inf))
  into = _joined(jnp.exp(read[0] + read[1]))
  onto = _joined(jnp.exp(chunks.between(sums[..., -1:, :], sums)))
  found = Decayed(_scaled(q, into), _scaled(k, onto), score(q) * pairs)
  if kind.delta:
    found = found._replace(asks=_scaled(k, -into), overlap=score(k) * pairs)
  return found, whole(jnp.exp(sums[0] + sums[1])[..., -1, :])


def _documents(
  found: Decayed, total: jax.Array | None, runs: chunks.Runs, shape: tuple[int, ...]
) -> tuple[Decayed, jax.Array]:
  """The same where tokens meet those of their document only; `shape` is that of the state."""
  count, rows = runs.own.shape[:2]
  flat = chunks.Runs(runs.own.reshape(-1, C), runs.before.reshape(-1, 1))
  first = lambda x: jnp.swapaxes(x.reshape(count, rows, *x.shape[1:]), 0, 1)
  meet, passes = first(flat.meet())[:, :, None], first(flat.passes())[:, :, None]
  enters, leaves = (first(x).reshape(rows, -1, 1, 1) for x in (flat.enters(), flat.leaves()))
  masks = dict(into=enters, onto=leaves, inside=meet, asks=enters, overlap=meet)
  there = {name: x for name, x in found._asdict().items() if x is not None}
  masked = Decayed(**{name: jnp.where(masks[name], x, 0) for name, x in there.items()})
  total = jnp.ones((1, count, *shape[1:3]), jnp.float32) if total is None else total
  return masked, jnp.where(passes, total, 0.0)


def _correction(xs: dict[str, jax.Array], found: Decayed, plan: Plan) -> chunk_scan.Correction:
  """What makes the corrections of a chunk of the state that enters it."""
  beta, overlap = _cut(xs["beta"].astype(jnp.float32)), found.overlap  # (B, chunks, N, C, 1)
  assert overlap is not None
  inverse = (delta_rule.inverses(beta * overlap, plan) * beta.mT).astype(jnp.bfloat16)
  apply = lambda x: chunk_scan.product(inverse, x, "nn", plan)
  return chunk_scan.Correction(apply(xs["v"]), apply(found.asks))


def _cut(x: jax.Array) -> jax.Array:
  """Tokens (B, T, N, X) by chunks, (B, chunks, N, C, X)."""
  return jnp.swapaxes(x.reshape(x.shape[0], -1, C, *x.shape[2:]), 2, 3)


def _joined(x: jax.Array) -> jax.Array:
  """The inverse of `_cut`."""
  x = jnp.swapaxes(x, 2, 3)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _repeated(x: jax.Array, heads: int) -> jax.Array:
  """Tokens with as many heads, or one."""
  return x if x.shape[2] in (1, heads) else jnp.repeat(x, heads // x.shape[2], axis=2)


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
  """Tokens times numbers of tokens, (#B, T, #N, 1)."""
  heads = factor.shape[2] if factor.shape[2] > 1 else x.shape[2]
  return (_repeated(x.astype(jnp.float32), heads) * factor).astype(x.dtype)
