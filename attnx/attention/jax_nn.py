"""`dot_product_attention` with the signature of `jax.nn`: a door for code written against it."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

from attnx.attention import api, masks, transforms
from attnx.attention.spec import AttentionSpec
from attnx.core.tokens import Tokens


def dot_product_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  query_seq_lengths: jax.Array | None = None,
  key_value_seq_lengths: jax.Array | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  implementation: str | None = None,
  return_residual: bool = False,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  broadcast_dropout: bool = False,
  deterministic: bool = False,
  dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.PrecisionLike = None,
  module: object = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """softmax(scale * q k^T + bias) v, as `jax.nn.dot_product_attention` and in linear memory.

  The arguments up to `return_residual` are those of `jax.nn`; the rest are what flax's
  `MultiHeadAttention` (nnx and linen) passes to its `attention_fn`. Three things differ from
  `jax.nn`: rows that see no key are zero (not the mean of the values), the residual has a gradient,
  and it stays in float32.

  Args:
    query: (..., T, N, H), any leading axes.
    key: (..., S, K, H); K divides N.
    value: (..., S, K, V).
    bias: broadcasts to (..., N, T, S); has a gradient.
    mask: bool, broadcasts to (..., N, T, S); True where the pair may meet.
    scale: factor on q k^T; None means 1 / sqrt(H).
    is_causal: query t sees keys 0 .. t.
    query_seq_lengths: (B,); later queries are padding, and zero.
    key_value_seq_lengths: (B,); later keys are padding.
    local_window_size: (left, right), or one number for both.
    implementation: a name of `attnx.attention.api.IMPLEMENTATIONS`; None is "auto" and "xla" is
      "chunked".
    return_residual: also return the log-sum-exp of the scores, (..., T, N), -inf for empty rows.
    dropout_rng, dropout_rate: dropout of the weights, unless `deterministic`.
    broadcast_dropout: True drops the same pairs in every row of the batch and every head.
    deterministic: no dropout.
    dtype: what the inputs are cast to first.
    precision, module: only None.

  Returns:
    (..., T, N, V) in the dtype of `value`, and the residual where asked for.

  Raises:
    NotImplementedError: `precision` or `module` (sowing of weights) is given.
    TypeError, ValueError: an argument is of the wrong kind, or shapes do not fit each other.
  """
  if precision is not None or module is not None:
    raise NotImplementedError(
      "dot_product_attention takes no precision and no module (sow_weights): leave them out, and "
      "use jax.default_matmul_precision or attnx.attention.reference.weights"
    )
  if not isinstance(scale, int | float | None) and getattr(scale, "shape", None) != ():
    raise TypeError(f"scale={scale!r} must be a number")
  leading, pairs = _check(query, key, value)
  if dtype is not None:
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
  spec = AttentionSpec(
    mask=_mask(_flatten("mask", mask, leading, pairs), is_causal, local_window_size),
    transforms=_bias(_flatten("bias", bias, leading, pairs)),
    edits=_dropout(dropout_rng, 0.0 if deterministic else dropout_rate, broadcast_dropout),
    scale=scale,
  )
  query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
  where = dict(
    q_tokens=_tokens(query, query_seq_lengths, "query_seq_lengths"),
    k_tokens=_tokens(key, key_value_seq_lengths, "key_value_seq_lengths"),
  )
  name = {None: "auto", "xla": "chunked"}.get(implementation) or str(implementation)
  p = api.attend_partial(query, key, value, spec, **where, implementation=name)
  out = spec.finish(p).astype(value.dtype)
  out = out.reshape(*leading, *out.shape[1:])
  if not return_residual:
    return out
  lse = jnp.where(p.mass > 0, p.peak + jnp.log(jnp.where(p.mass > 0, p.mass, 1.0)), -jnp.inf)
  return out, lse.reshape(*leading, *lse.shape[1:])


def _check(query, key, value) -> tuple[tuple[int, ...], tuple[int, int, int]]:
  """The leading axes and (N, T, S), of arrays that have such; `api.check` looks at the rest."""
  given = dict(query=query, key=key, value=value)
  for name, x in given.items():
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
      raise TypeError(f"{name} is a {type(x).__name__}; expected an array (..., T, N, H)")
    if len(x.shape) < 3 or 0 in x.shape:
      raise ValueError(f"{name} has shape {x.shape}; expected (..., T, N, H), none of them 0")
    if x.shape[:-3] != query.shape[:-3]:
      raise ValueError(f"{name} has shape {x.shape}; expected {query.shape[:-3]} before its last 3")
  return query.shape[:-3], (query.shape[-2], query.shape[-3], key.shape[-3])


def _flatten(
  name: str, array: jax.Array | None, leading: tuple[int, ...], pairs: tuple[int, int, int]
) -> jax.Array | None:
  """A bias or mask that broadcasts to (..., N, T, S) as (#B, #N, #T, #S)."""
  if array is None:
    return None
  if not hasattr(array, "shape") or not hasattr(array, "dtype"):
    raise TypeError(f"{name} is a {type(array).__name__}; expected an array (..., N, T, S)")
  leading = leading or (1,)
  whole = (*leading, *pairs)
  right = array.shape[::-1], whole[::-1]  # from the last axis on; a gather would not complain
  if len(array.shape) > len(whole) or any(n not in (1, size) for n, size in zip(*right)):
    raise ValueError(f"{name} has shape {array.shape}, which does not broadcast to {whole}")
  array = jnp.asarray(array)
  array = array.reshape((1,) * (len(leading) + 3 - array.ndim) + array.shape)
  if any(size > 1 for size in array.shape[:-3]):
    array = jnp.broadcast_to(array, (*leading, *array.shape[-3:]))
  return array.reshape(-1, *array.shape[-3:])


def _mask(
  dense: jax.Array | None, is_causal: bool, window: int | tuple[int, int] | None
) -> masks.Mask:
  """The masks that are asked for, and-ed."""
  parts: list[masks.Mask] = []
  if dense is not None:
    if dense.dtype != bool:
      raise TypeError(f"mask has dtype {dense.dtype}; expected bool: an additive mask is a bias")
    parts.append(masks.Dense(dense))
  if is_causal:
    parts.append(masks.Causal())
  if window is not None:
    both = (window, window) if isinstance(window, int) else window
    if not (isinstance(both, tuple | list) and [type(n) for n in both] == [int, int]):
      raise TypeError(f"local_window_size={window!r} must be an integer or (left, right)")
    parts.append(masks.Window(*both))
  return functools.reduce(operator.and_, parts) if parts else masks.Everything()


def _bias(dense: jax.Array | None) -> tuple[transforms.Transform, ...]:
  if dense is not None and not jnp.issubdtype(dense.dtype, jnp.floating):
    raise TypeError(f"bias has dtype {dense.dtype}; expected a floating one")
  return () if dense is None else (transforms.Add(dense),)


def _dropout(
  key: jax.Array | None, rate: float, broadcast: bool
) -> tuple[transforms.Transform, ...]:
  if not isinstance(rate, int | float):
    raise TypeError(f"dropout_rate={rate!r} must be a number")
  if rate == 0.0:
    return ()
  if key is None:
    raise ValueError(f"dropout_rate={rate} needs dropout_rng, or deterministic=True")
  return (transforms.Dropout(key, rate, broadcast),)


def _tokens(x: jax.Array, lengths: jax.Array | None, name: str) -> Tokens:
  if lengths is None:
    return Tokens.of_length(x.shape[1])
  if not hasattr(lengths, "dtype") or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise TypeError(f"{name} must be an array of integers; got {lengths!r}")
  if lengths.shape != x.shape[:1]:
    raise ValueError(f"{name} has shape {lengths.shape}; expected {x.shape[:1]}")
  return Tokens.of_lengths(lengths, x.shape[1])
