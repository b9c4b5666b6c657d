"""cuDNN's fused softmax attention, for as much of a spec as it honours (arXiv:2307.08691).

out_i = sum_j P_ij v_j and lse_i = log sum_j exp(s_ij), where P_ij = exp(s_ij - lse_i) and
s = scale * q k^T + bias, over all keys that exist, those at 0 .. i, or the last of these.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import numpy as np

from attnx.attention.by_tile import FEW
from attnx.attention.cudnn_spec import Asked, read
from attnx.attention.masks import Everything, pick
from attnx.attention.partial import Partial, from_lse
from attnx.attention.spec import AttentionSpec
from attnx.core.tokens import Tokens
from attnx.core.varying import split, varying

OLDEST = 91002  # cuDNN 9.10.2: the two before it compute wrongly, older ones lack biased windows
UNEQUAL = 91300  # values may be as wide as one likes, where keys may be


class Saved(NamedTuple):
  """What the backward pass reads; `stats` are lse, (B, N, T)."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  bias: jax.Array | None
  out: jax.Array
  stats: jax.Array


def partial(
  q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens
) -> Partial:
  """`reference.partial` by cuDNN, and its gradient, through out and the log-sum-exp alike.

  Products are added up in float32, and weights rounded to the dtype of q before they read values.
  A gradient through the log-sum-exp, which merging asks for, costs a second backward call. The
  gradient of q is added up in any order, unless XLA has --xla_gpu_deterministic_ops.

  Args:
    q, k, v, spec, q_tokens, k_tokens: as for `attend`; shapes have been checked.

  Raises:
    NotImplementedError: cuDNN cannot honour the spec or the tokens.
  """
  asked = read(q, k, v, spec, q_tokens, k_tokens)
  if isinstance(asked, str):
    raise NotImplementedError(f"implementation='cudnn' {asked}")
  out, lse = attention(asked)(q, k, v, dense_bias(q, k, spec, q_tokens, k_tokens))
  return from_lse(out, lse, jnp.zeros_like(lse))  # softmax does not count


def attention(asked: Asked) -> Any:
  """(q, k, v, bias or None) -> out (B, T, N, V) and lse (B, T, N), with gradients of all four.

  Where dP = dout v^T, scores have the gradient P (dP - delta + dlse). cuDNN's backward pass takes
  no dlse and computes delta = sum(out * dout) of what it is given as out. Since it is linear in
  dout, a call with v = 0, out = -1 and a dout that sums to dlse yields the rest, P dlse.
  """

  def only(x: jax.Array, ends: np.ndarray, empty: float = 0.0) -> jax.Array:
    exists: Any = np.arange(x.shape[1]) < ends[:, None]
    exists = exists.reshape(*exists.shape, *[1] * (x.ndim - 2))
    return x if exists.all() else jnp.where(exists, x, jnp.asarray(empty, x.dtype))

  def forward(q, k, v, bias):
    out, stats = fused(q, k, v, bias, asked)
    lse = only(jnp.swapaxes(stats, 1, 2), asked.q_ends, -jnp.inf)
    out = only(out, asked.q_ends)
    return (out, lse), Saved(q, k, v, bias, out, stats)

  def backward(saved: Saved, grads):
    dout, dlse = (None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in grads)
    found = []
    if dout is not None:
      found.append(fused_gradient(saved, only(dout, asked.q_ends), asked))
    if dlse is not None:
      nothing, one = (varying(jnp.zeros(x.shape, x.dtype), x) for x in (saved.v, saved.out))
      given = saved._replace(v=nothing, out=one - 1)
      dq, dk, _, dbias = fused_gradient(given, spread(only(dlse, asked.q_ends), saved.out), asked)
      found.append((dq, dk, nothing, dbias))
    dq, dk, dv, dbias = jax.tree.map(lambda *terms: functools.reduce(jnp.add, terms), *found)
    if dbias is not None and asked.padded:  # cuDNN leaves open what is there
      T, S = dbias.shape[2:]
      pairs: Any = (np.arange(T)[:, None] < asked.q_ends[:, None, None, None]) & (
        np.arange(S) < asked.k_ends[:, None, None, None]
      )
      pairs = pairs.any(0, keepdims=True) if dbias.shape[0] == 1 else pairs
      dbias = jnp.where(pairs, dbias, jnp.zeros_like(dbias))
    return only(dq, asked.q_ends), only(dk, asked.k_ends), only(dv, asked.k_ends), dbias

  function = jax.custom_vjp(lambda *args: forward(*args)[0])
  function.defvjp(
    lambda *args: forward(*jax.tree.map(lambda x: x.value, args)), backward, symbolic_zeros=True
  )
  return function


def spread(rows: jax.Array, like: jax.Array) -> jax.Array:
  """Numbers in the dtype of `like` (B, T, N, V) that add up along V to `rows` (B, T, N)."""
  pieces: list[jax.Array] = []
  for _ in range(3):
    pieces.append(rows.astype(like.dtype))
    rows = rows - pieces[-1]
  return jnp.pad(jnp.stack(pieces, -1), [(0, 0)] * 3 + [(0, like.shape[3] - len(pieces))])


def masking(asked: Asked, B: int) -> tuple[list[jax.Array | None], cudnn.MaskType]:
  """The lengths of the rows, where some are shorter, and cuDNN's name of the mask."""
  name = "_".join(["PADDING"] * asked.padded + ["CAUSAL"] * asked.causal) or "NO_MASK"
  ends = (asked.q_ends, asked.k_ends)
  given = [jnp.broadcast_to(jnp.asarray(n, jnp.int32), (B,)) if asked.padded else None
           for n in ends]  # fmt: skip
  return given, cudnn.MaskType[name]


def fused(q, k, v, bias, asked: Asked) -> tuple[jax.Array, jax.Array]:
  """cuDNN's forward pass: out (B, T, N, V), and lse (B, N, T) in float32."""
  (q_ends, k_ends), mask = masking(asked, q.shape[0])
  return cudnn.dot_product_attention(
    q, k, v, bias, q_seqlen=q_ends, kv_seqlen=k_ends, scale=asked.scale, mask_type=mask,
    sliding_window_length=asked.window, return_residual=True,
  )  # fmt: skip


def fused_gradient(saved: Saved, dout: jax.Array, asked: Asked) -> tuple[Any, ...]:
  """cuDNN's backward pass: gradients of q, k, v and the bias, with delta = sum(out * dout)."""
  q, k, v, bias, out, stats = saved
  ends, mask = masking(asked, q.shape[0])
  nothing, biased = jnp.zeros(0, q.dtype), bias is not None
  given = [nothing if x is None else x for x in (bias, *ends, *[None] * 4)]
  grads = cudnn._dot_product_attention_bwd_rule(
    asked.scale, 42, 0.0, (biased, biased), mask, cudnn.AttentionLayout.BTNH.value, asked.window,
    cudnn.check_cudnn_version(), False, (q, k, v, *given, stats, out), dout,
  )  # fmt: skip
  return (*grads[:3], grads[3] if biased else None)


def dense_bias(q, k, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens) -> jax.Array | None:
  """The array of the spec's `Add` at these tokens, (1 or B, 1 or N, T, S); None without one."""
  if not spec.transforms:
    return None
  array: Any = jnp.asarray(spec.transforms[0].bias)  # type: ignore[attr-defined]
  for size, at in zip(array.shape[2:], (q_tokens.index, k_tokens.index), strict=True):
    known = isinstance(at, np.ndarray) and at.shape[1] == size and (at == np.arange(size)).all()
    if size != 1 and not known:
      array = pick(array, q_tokens.rows(q.shape[0], q.shape[2]), k_tokens.columns())
      array = array.reshape(*[1] * (4 - array.ndim), *array.shape)
      break
  return jnp.broadcast_to(array, (*array.shape[:2], q.shape[1], k.shape[1]))


def hardware() -> tuple[tuple[int, int], int] | str:
  """Compute capability and cuDNN's version, as 91002 for 9.10.2; or why there are none."""
  if jax.default_backend() != "gpu":
    return f"runs on NVIDIA GPUs, not on {jax.default_backend()}"
  device: Any = jax.local_devices()[0]
  if "cuda" not in device.client.platform_version:
    return f"runs on NVIDIA GPUs, not on {device.client.platform_version}"
  major, minor = map(int, device.compute_capability.split("."))
  try:
    return (major, minor), cudnn.check_cudnn_version()
  except RuntimeError as error:
    return f"wants cuDNN beside JAX's CUDA plugin: {error}"


def refusal(
  q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec,
  q_tokens: Tokens | None = None, k_tokens: Tokens | None = None,
) -> str | None:  # fmt: skip
  """Why a call cannot run in cuDNN here; None if it can. No tokens: those that `attend` takes."""
  found = hardware()
  if isinstance(found, str):
    return found
  if (reason := split()) is not None:
    return reason
  (major, minor), version = found
  if major < 8 or version < OLDEST:
    return (f"wants compute capability 8.0 and cuDNN {OLDEST} or later, "
            f"got {major}.{minor} and {version}")  # fmt: skip
  (H, V), widest = (q.shape[3], v.shape[3]), 256 if major == 9 else 128
  if max(H, V) > widest or (H != V and (major != 9 or version < UNEQUAL)):
    return f"wants keys and values of one width up to {widest} here, got H={H} and V={V}"
  tokens = [Tokens.of_length(x.shape[1]) if at is None else at
            for x, at in ((q, q_tokens), (k, k_tokens))]  # fmt: skip
  asked = read(q, k, v, spec, *tokens)
  if isinstance(asked, str):
    return asked
  add: Any = spec.transforms[0] if spec.transforms else None
  bias = None if add is None else tuple(min(n, 2) for n in jnp.shape(add.bias)[:2])
  heads = tuple(x.shape[2:] for x in (q, k, v))
  return unbuildable(heads, str(q.dtype), bias, asked.causal, asked.window is not None,
                     asked.padded)  # fmt: skip


def slower(q, k, v, spec: AttentionSpec, *tokens: Tokens) -> str | None:
  """"mosaic_gpu" where its kernels beat cuDNN on an H100, forward and backward; else None.

  These are calls with a mask or wide heads. See experiments/gpu_attention.
  """
  few, wide = q.shape[1] <= FEW, max(q.shape[3], v.shape[3]) > 128
  masked = not isinstance(spec.mask, Everything)
  return "mosaic_gpu" if (masked or wide) and not few and not spec.transforms else None


@functools.lru_cache
def unbuildable(heads, dtype: str, bias, causal: bool, windowed: bool, padded: bool) -> str | None:
  """What goes wrong when cuDNN builds a small call of this kind, both ways; None: it does."""
  B, T = 2, 256
  (N, _), *_ = heads
  shapes = [jax.ShapeDtypeStruct((B, T, *x), dtype) for x in heads]
  if bias is not None:
    shape = tuple(1 if n == 1 else full for n, full in zip(bias, (B, N), strict=True))
    shapes.append(jax.ShapeDtypeStruct((*shape, T, T), dtype))
  ends = np.full(B, T // 2 if padded else T)
  asked = Asked(1.0, causal, 8 if windowed else None, ends, ends, padded)

  def both(q, k, v, bias=None):
    (out, lse), pull = jax.vjp(attention(asked), q, k, v, bias)
    return pull((out, lse))

  try:
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
      jax.jit(both).lower(*shapes).compile()
  except Exception as error:  # whatever XLA and cuDNN raise
    return f"is refused by cuDNN: {str(error).splitlines()[0][:200]}"
  return None
