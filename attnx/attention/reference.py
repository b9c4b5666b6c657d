"""The definition of attention, which everything is tested against. Materialises (T, S)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.attention.partial import Partial
from attnx.attention.spec import AttentionSpec
from attnx.core.tokens import Tokens


def partial(
  q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens
) -> Partial:
  """Attention over the keys given, not yet finished; float64 where q is. Shapes as in `attend`."""
  (B, T, N, _), (K, V) = q.shape, v.shape[2:]
  weights, peak, visible = unnormalised(q, k, spec, q_tokens, k_tokens)
  mass, count = jnp.abs(weights).sum(-1), counted(spec, visible, weights.dtype)
  rows, columns = q_tokens.rows(B, N), k_tokens.columns()
  weights = spec.edit(weights, rows, columns)
  grouped = weights.reshape(B, K, N // K, T, -1)
  out = jnp.einsum("bkgts,bskv->btkgv", grouped, v.astype(weights.dtype)).reshape(B, T, N, V)
  for readout in spec.readouts:
    out = out + jnp.swapaxes(readout(weights, rows, columns), 1, 2)
  mass, peak, count = (jnp.swapaxes(x, 1, 2) for x in (mass, peak, count))  # to (B, T, N)
  return Partial(out=out, mass=mass, peak=peak, count=count)


def unnormalised(
  q: jax.Array, k: jax.Array, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weights before edits (B, N, T, S), their peak (B, N, T), and what is visible (B, N, T, S)."""
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q, k = q.astype(dtype), k.astype(dtype)
  products = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k)
  products = products.reshape(B, N, T, S) * spec.factor(H)
  rows, columns = q_tokens.rows(B, N), k_tokens.columns()
  scores = spec.score(products, rows, columns, spec.tables(q))
  visible = jnp.broadcast_to(spec.visible(rows, columns), scores.shape)
  peak = jax.lax.stop_gradient(spec.normaliser.peak(scores, visible))
  origin = jnp.where(jnp.isneginf(peak), 0.0, peak)[..., None]
  return spec.normaliser.weigh(scores, visible, origin), peak, visible


def counted(spec: AttentionSpec, visible: jax.Array, dtype) -> jax.Array:
  """`Partial.count` of pairs (B, N, T, S), without its last axis."""
  return (visible & spec.normaliser.counts).sum(-1, dtype=dtype)


def weights(
  q: jax.Array, k: jax.Array, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens
) -> jax.Array:
  """The finished weights (B, N, T, S): what `attend` multiplies values by. For analysis.

  Every row is finished with its own mass, so this is exact for every normaliser. Edits are applied.
  """
  B, _, N, _ = q.shape
  w, peak, visible = unnormalised(q, k, spec, q_tokens, k_tokens)
  mass, count = jnp.abs(w).sum(-1), counted(spec, visible, w.dtype)
  w = spec.edit(w, q_tokens.rows(B, N), k_tokens.columns())
  row = Partial(out=w, mass=mass, peak=peak, count=count)
  row = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), row)  # values are rows of the identity
  return jnp.swapaxes(spec.finish(row), 1, 2)
