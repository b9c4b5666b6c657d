"""Attention kernels of others, as cases for `python -m pallas_kernels.aot`.

JAX's splash attention comes with JAX; tokamax's wants `pip install tokamax`. All take q, k, v of
(N, T, H) = (8, 4096, 128) in bfloat16. The backward kernels take the blocks, too: their forward
pass then has blocks of 512, and one program holds both.

  python -m pallas_kernels.aot 'experiments.tpu_schedule.cases:splash(block_q=1024, mask="causal")'
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

N, T, H, WINDOW, SOFT_CAP, LEAST = 8, 4096, 128, 1024, 50.0, 512
MASKS = ("full", "causal", "local", "segments", "soft_cap")
BACKWARD = ("backward", "fused_backward")
QKV = [jax.ShapeDtypeStruct((N, T, H), jnp.bfloat16)] * 3


def mask_of(masks, mask: str):
  """The mask object of either library: both name theirs alike."""
  if mask not in MASKS:
    raise ValueError(f"mask={mask!r} is not one of {MASKS}")
  if mask == "local":
    return masks.LocalMask((T, T), window_size=(WINDOW - 1, 0), offset=0)
  return masks.CausalMask((T, T)) if mask == "causal" else masks.FullMask((T, T))


def blocks_of(direction: str, block_q: int, block_kv: int, block_kv_compute: int) -> dict[str, int]:
  """Block sizes by the names that both libraries share."""
  if direction == "forward":
    return dict(block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv_compute)
  if direction not in BACKWARD:
    raise ValueError(f"direction={direction!r} is neither 'forward' nor one of {BACKWARD}")
  backward = dict(
    block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv_compute
  )
  if direction == "backward":
    backward |= dict(block_q_dq=block_q, block_kv_dq=block_kv)
  return dict(block_q=LEAST, block_kv=LEAST, block_kv_compute=LEAST) | backward


def case_of(attention, direction: str, mask: str, segment_ids):
  """(fn, shapes) of a call, or of its vector-Jacobian product."""
  ids = [jax.ShapeDtypeStruct((T,), jnp.int32)] if mask == "segments" else []

  def forward(q, k, v, *ids):
    return attention(q, k, v, segment_ids(*ids, *ids)) if ids else attention(q, k, v)

  def backward(q, k, v, out_grad, *ids):
    return jax.vjp(lambda *qkv: forward(*qkv, *ids), q, k, v)[1](out_grad)

  if direction == "forward":
    return forward, [*QKV, *ids]
  return backward, [*QKV, QKV[0], *ids]


def splash(
  direction="forward", mask="full", block_q=512, block_kv=1024, block_kv_compute=512
):  # fmt: skip
  """JAX's splash attention; its backward pass is a kernel for dq and one for dk and dv, or one."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  sizes = blocks_of(direction, block_q, block_kv, block_kv_compute)
  attention = kernel.make_splash_mha(
    masks.MultiHeadMask([mask_of(masks, mask)] * N),
    block_sizes=kernel.BlockSizes(**sizes, use_fused_bwd_kernel=direction == "fused_backward"),
    attn_logits_soft_cap=SOFT_CAP if mask == "soft_cap" else None,
    head_shards=1,
    q_seq_shards=1,
  )
  return case_of(attention, direction, mask, kernel.SegmentIds)


def tokamax(
  direction="forward", mask="full", block_q=512, block_kv=1024, block_kv_compute=512,
  use_experimental_scheduler=False, max_logit_const=None,
):  # fmt: skip
  """tokamax's splash attention; its backward pass is always one kernel."""
  from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
  from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

  if direction == "backward":
    raise ValueError("direction='backward' (two kernels) is JAX's only; use 'fused_backward'")
  config = kernel.SplashConfig(
    **blocks_of(direction, block_q, block_kv, block_kv_compute),
    attn_logits_soft_cap=SOFT_CAP if mask == "soft_cap" else None,
    use_experimental_scheduler=use_experimental_scheduler,
    max_logit_const=max_logit_const,
  )
  attention = kernel.make_splash_mha(mask_of(masks, mask), config=config, q_seq_shards=1)
  return case_of(attention, direction, mask, kernel.SegmentIds)
