"""Attention kernels, attnx's and those of others, as cases for `python -m pallas_kernels.aot`.

JAX's splash attention comes with JAX; tokamax's wants `pip install tokamax`. All take q, k, v of
8 heads, T = 4096 and H = 128 in bfloat16, where `length` sets no other T. The backward kernels of
others take the blocks, too: their forward pass then has blocks of 512, and one program holds both.

  python -m pallas_kernels.aot 'experiments.tpu_schedule.cases:splash(block_q=1024, mask="causal")'
  python -m pallas_kernels.aot 'experiments.tpu_schedule.cases:attnx(mask="alibi")' --chips v6e
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

N, T, H, WINDOW, SOFT_CAP, LEAST = 8, 4096, 128, 1024, 50.0, 512
MASKS = ("full", "causal", "local", "segments", "soft_cap", "alibi")
BACKWARD = ("backward", "fused_backward")


def mask_of(masks, mask: str, length: int):
  """The mask object of either library: both name theirs alike."""
  if mask not in MASKS or mask == "alibi":
    raise ValueError(f"mask={mask!r} is not one that splash attention has: {MASKS[:-1]}")
  shape = (length, length)
  if mask == "local":
    return masks.LocalMask(shape, window_size=(WINDOW - 1, 0), offset=0)
  return masks.CausalMask(shape) if mask == "causal" else masks.FullMask(shape)


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


def case_of(forward, direction: str, mask: str, shape: tuple[int, ...], length: int):
  """(fn, shapes) of a call forward(q, k, v, *segment ids), or of its vector-Jacobian product."""
  qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
  ids = [jax.ShapeDtypeStruct((length,), jnp.int32)] if mask == "segments" else []

  def backward(q, k, v, out_grad, *ids):
    return jax.vjp(lambda *qkv: forward(*qkv, *ids), q, k, v)[1](out_grad)

  if direction == "forward":
    return forward, [*qkv, *ids]
  return backward, [*qkv, qkv[0], *ids]


def splash_case(attention, segment_ids, direction: str, mask: str, length: int):
  """`case_of` for either splash attention."""

  def forward(q, k, v, *ids):
    return attention(q, k, v, segment_ids(*ids, *ids)) if ids else attention(q, k, v)

  return case_of(forward, direction, mask, (N, length, H), length)


def splash(
  direction="forward", mask="full", block_q=512, block_kv=1024, block_kv_compute=512, length=T
):  # fmt: skip
  """JAX's splash attention; its backward pass is a kernel for dq and one for dk and dv, or one."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  sizes = blocks_of(direction, block_q, block_kv, block_kv_compute)
  attention = kernel.make_splash_mha(
    masks.MultiHeadMask([mask_of(masks, mask, length)] * N),
    block_sizes=kernel.BlockSizes(**sizes, use_fused_bwd_kernel=direction == "fused_backward"),
    attn_logits_soft_cap=SOFT_CAP if mask == "soft_cap" else None,
    head_shards=1,
    q_seq_shards=1,
  )
  return splash_case(attention, kernel.SegmentIds, direction, mask, length)


def tokamax(
  direction="forward", mask="full", block_q=512, block_kv=1024, block_kv_compute=512,
  use_experimental_scheduler=False, max_logit_const=None, length=T,
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
  attention = kernel.make_splash_mha(mask_of(masks, mask, length), config=config, q_seq_shards=1)
  return splash_case(attention, kernel.SegmentIds, direction, mask, length)


def spec_of(mask: str):
  """The same as an `AttentionSpec`."""
  from attnx.attention import AttentionSpec, masks, transforms
  from attnx.core import registry

  build = lambda interface, name, **options: registry.build(interface, dict(options, name=name))
  match mask:
    case "full":
      return AttentionSpec()
    case "causal":
      return AttentionSpec(mask=masks.Causal())
    case "local":
      return AttentionSpec(mask=masks.Window(WINDOW - 1))
    case "segments":
      return AttentionSpec(mask=build("masks", "same_segment"))
    case "soft_cap":
      return AttentionSpec(transforms=(transforms.SoftCap(SOFT_CAP),))
    case "alibi":
      return AttentionSpec(transforms=(build("transforms", "alibi", num_heads=N),))
  raise ValueError(f"mask={mask!r} is not one of {MASKS}")


def attnx(
  devices, direction="forward", mask="full", blocks: Sequence[Sequence[int]] | None = None, length=T
):  # fmt: skip
  """attnx's streaming kernels as `attend` calls them; blocks as the table of the chip says.

  Args:
    devices: of the topology.
    direction: "forward", or "backward" for both and the backward kernel.
    mask: one of `MASKS`; "segments" are known at run time only, as to the others.
    blocks: q, k, rows, columns and ahead for each of forward and backward.
    length: T = S.
  """
  from attnx.attention import pallas_tpu
  from attnx.core.tokens import Tokens
  from pallas_kernels import blocks as tables

  if direction not in ("forward", "backward"):
    raise ValueError(f"direction={direction!r} is neither 'forward' nor 'backward'")
  chip = tables.CHIPS[devices[0].device_kind]
  chosen = tables.choose(length, length, H, H, jnp.bfloat16, chip)
  if blocks is not None:
    chosen = tables.Chosen(*(tables.Blocks(*sizes) for sizes in blocks))
  spec, tokens = spec_of(mask), Tokens.of_length(length)

  def forward(q, k, v, *ids):
    placed = Tokens(tokens.index, tokens.position, ids[0][None]) if ids else tokens
    partial = pallas_tpu.partial(q, k, v, spec, placed, placed, blocks=chosen)
    return spec.finish(partial).astype(q.dtype)

  return case_of(forward, direction, mask, (1, length, N, H), length)
