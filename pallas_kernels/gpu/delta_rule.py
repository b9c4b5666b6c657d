"""The systems of the delta rule within chunks of 64 tokens, solved on Hopper GPUs.

The corrections of a chunk are (I + L) Y = beta (V - asks S) with a strictly lower triangular L.
M = (I + L)^-1 does not depend on the state S, so that it is found for all chunks at once; with it
Y = U + P S, as `chunk_scan` wants it, U = M beta V and P = -M beta asks being products.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gpu.chunk_scan import C, DTYPE, Pair, Plan, launch, multiply, products, tile_at
from pallas_kernels.gpu.linear_recurrence import diagonal, halves
from pallas_kernels.gpu.tiles import Warpgroup, smem

STEPS = C.bit_length() - 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def inverses(lower: jax.Array, plan: Plan) -> jax.Array:
  """(I + L)^-1 of strictly lower triangular L.

  Inverses of diagonal blocks of m rows become those of 2 m rows: the inverse of [[X, 0], [L, Y]]
  is [[X^-1, 0], [-Y^-1 L X^-1, Y^-1]], and if M holds all X^-1 and Y^-1, then M L M holds all
  Y^-1 L X^-1. This is forward substitution by blocks, and as stable, in 10 products of (64, 64).
  Each is made of three of bfloat16, and good to 2^-16.

  Args:
    lower: (B, chunks, N, 64, 64) float32; on and above the diagonal anything finite.
    plan: what is static.

  Returns:
    The inverses, (B, chunks, N, 64, 64) bfloat16.
  """
  B, chunks, N = lower.shape[:3]
  wg = Warpgroup(plan.interpret)

  def kernel(lower_ref, out_ref, *, held, parts, out, barrier):
    b, n, c = (lax.axis_index(name) for name in "bnc")
    plgpu.copy_gmem_to_smem(tile_at(lower_ref, plan, b, n, c), held, barrier)
    plgpu.barrier_wait(barrier)
    blocks = lambda m: jnp.where(halves(m, wg), held[...], 0.0)

    def times(x, y):
      (high, low), (right, rest) = _parts(x), _parts(y)
      parts.at[0][...], parts.at[1][...] = right, rest
      plgpu.commit_smem()
      pairs = [(high, 0), (high, 1), (low, 0)]
      return multiply([Pair(left, parts.at[i], "nn") for left, i in pairs], plan)

    def double(i, found):
      m = lax.shift_left(jnp.int32(2), i)
      return found - times(times(found, blocks(m)), found)

    found = jnp.where(diagonal(wg), 1.0, 0.0) - blocks(1)
    out[...] = lax.fori_loop(0, STEPS, double, found).astype(DTYPE)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, tile_at(out_ref, plan, b, n, c))
    plgpu.wait_smem_to_gmem(0)

  (found,) = launch(
    kernel, [lower], [jax.ShapeDtypeStruct(lower.shape, DTYPE)], plan,
    name="inverses", grid=dict(b=B, n=N, c=chunks),
    scratch=dict(
      held=smem(C, C, dtype=jnp.float32),
      parts=smem(2, C, C, dtype=DTYPE),
      out=smem(C, C, dtype=DTYPE),
      barrier=plgpu.Barrier(),
    ),
  )  # fmt: skip
  return found


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x in float32 as a sum of bfloat16."""
  high = x.astype(DTYPE)
  return high, (x - high.astype(jnp.float32)).astype(DTYPE)


def _inverses_fwd(lower, plan):
  found = inverses(lower, plan)
  return found, found


def _inverses_bwd(plan, found, g):
  """dL = -M^T dM M^T below the diagonal."""
  left = products([Pair(found, g.astype(DTYPE), "tn")], plan, matrix=True)
  moved = products([Pair(left, found, "nt")], plan, matrix=True, dtype=jnp.float32)
  return (-jnp.tril(moved, -1),)


inverses.defvjp(_inverses_fwd, _inverses_bwd)
