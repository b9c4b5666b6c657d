"""The attention matrix that a mixer is, whether or not it ever forms one."""

from __future__ import annotations

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.tokens import Tokens
from attnx.nn.mixer import Mixer, observed


def implicit_attention(
  mixer: Mixer,
  x: jax.Array,
  *,
  context: jax.Array | None = None,
  tokens: Tokens | None = None,
  context_tokens: Tokens | None = None,
) -> jax.Array:
  """A with mix(x, v)_t = sum_s A_ts v_s, of every mixer that is linear in its values.

  Of softmax attention these are the weights, of a recurrence the products of its decays, of a
  convolution its taps (arXiv:2405.16504, arXiv:2403.01590). Materialises (T, S), a column at a
  time; for analysis and tests.

  Args:
    mixer: declares `linear_in_values`.
    x: (B, T, D).
    context, tokens, context_tokens: as for a call of the mixer.

  Returns:
    (B, N, T, S) in the dtype of the heads; N is D where channels mix apart.

  Raises:
    NotImplementedError: the mixer is not linear in values, or does not take an argument.
  """
  source = x if context is None else context
  shape = jax.eval_shape(mixer.values, source).shape
  where = dict(context=context, tokens=tokens, context_tokens=context_tokens)

  def column(s):
    """What every query reads of key s."""
    there = (jnp.arange(source.shape[1]) == s).astype(source.dtype)
    basis = jnp.broadcast_to(there[:, None, None], (*shape[:3], 1))
    heads = mixer.mix(x, basis, **where)  # (B, T, N, 1)
    if heads.shape[-1] != 1:
      raise NotImplementedError(f"{type(mixer).__name__} reads more than its values here: readouts")
    return heads[..., 0]

  return jnp.transpose(jax.lax.map(column, jnp.arange(source.shape[1])), (1, 3, 2, 0))


def look(mixer: Mixer, x: jax.Array, *, context: jax.Array | None = None, **where: Any) -> None:
  """Sows the matrix that a mixer is as "weights" and what it reads as "heads", if observed."""
  if observed(mixer):
    source, tokens = (x, "tokens") if context is None else (context, "context_tokens")
    values = mixer.values(source, tokens=where.get(tokens))
    where["context"] = context
    mixer.sow(nnx.Intermediate, "weights", implicit_attention(mixer, x, **where))
    mixer.sow(nnx.Intermediate, "heads", mixer.mix(x, values, **where))
