"""Recurrences in fused TPU kernels, whose state stays in fast memory from chunk to chunk.

They have gradients, which `jax.jvp` and second derivatives do not go through: for these, a chunk
that `refusal` names, such as 48, runs without them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnx.core.varying import split, together
from attnx.recurrence import chunks
from pallas_kernels.tpu import chunk_scan, delta_rule, linear_recurrence


def refusal(xs: dict[str, jax.Array], chunk: int) -> str | None:
  """Why the kernels cannot run a call, or None when they can.

  Args:
    xs: q, k, v and perhaps others, (B, T, heads, width) each.
    chunk: tokens handled at once.
  """
  (_, T, _, H), V = xs["q"].shape, xs["v"].shape[3]
  if jax.default_backend() != "tpu":
    return f"runs on TPU, not on {jax.default_backend()}"
  if (reason := split()) is not None:
    return reason
  if wrong := {str(x.dtype) for x in xs.values()} - {"float32", "bfloat16"}:
    return f"wants float32 or bfloat16, got {', '.join(sorted(wrong))}"
  if H % 64 or V % 64:
    return f"wants widths that are multiples of 64, got H={H} and V={V}"
  if chunk not in (32, 64, 128, 256) or T < chunk:
    return f"wants a chunk of 32, 64, 128 or 256 tokens and T no shorter, got {chunk} and T={T}"
  if 2 * chunk < H:  # a state is kept of every chunk, and would be more than twice the size of v
    return f"wants a chunk of at least half of H, got {chunk} and H={H}"
  return None


def run(
  xs: dict[str, jax.Array],
  bonus: jax.Array | None,
  state: jax.Array,
  segment: jax.Array | None,
  chunk: int,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """`linear_attention`, or `delta_rule` where there is a beta, of arguments that are checked.

  Args:
    xs: q, k, v and perhaps log_decay and beta, (#B, T, heads, width) each.
    bonus, state, segment, chunk: as those of `linear_attention`; the state is float32.
    interpret: emulate on CPU, for tests.
  """
  (B, T), N = xs["q"].shape[:2], state.shape[1]
  tiles = {name: _tiles(x, chunk) for name, x in xs.items()}
  facts, exact = {}, jnp.result_type(*(xs[x] for x in "qkv")) == jnp.float32
  if "log_decay" in xs and xs["log_decay"].shape[3] == 1:
    sums = chunks.log_sums(tiles.pop("log_decay").astype(jnp.float32)).mT
    facts["coarse"], tiles["fine"] = jax.lax.stop_gradient(sums[0]), sums[1]
  if "beta" in xs:
    tiles["beta"] = tiles["beta"].mT
  if bonus is not None:
    tiles["bonus"] = bonus.reshape(1, N, 1, 1, -1)
  if (found := chunks.runs(segment, B, T, chunk)) is not None:
    since = jnp.moveaxis(found.own - found.before, 0, 1)
    facts["since"] = since[:, None, :, None].astype(jnp.float32)
  rule = delta_rule.delta_rule if "beta" in xs else linear_recurrence.linear_attention
  passes = linear_recurrence.EXACT if exact else linear_recurrence.ONE_PASS
  # what a program handles must fit in fast memory, and its code be compiled in seconds
  tokens = (256 if exact else 512) << ("beta" not in xs and "log_decay" not in tiles)
  most = min(8, tokens * 128 // (chunk * max(128, *state.shape[2:])))
  heads = chunk_scan.heads_together(N, [x.shape[1] for x in tiles.values()], most)
  plan = chunk_scan.Plan(functools.partial(rule, passes=passes), heads, xs["v"].dtype, interpret)
  out, state = chunk_scan.scan(plan, *together((state.mT, tiles, facts)))
  return jnp.swapaxes(out.reshape(B, N, -1, out.shape[-1])[:, :, :T], 1, 2), state.mT


def _tiles(x: jax.Array, chunk: int) -> jax.Array:
  """(B, T, K, X) to (B, K, chunks, C, X), padded with zeros."""
  return jnp.transpose(chunks.cut(x, chunk), (1, 3, 0, 2, 4))
