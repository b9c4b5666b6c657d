"""Ring attention: queries and keys sharded, keys travel (arXiv:2310.01889)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, attend_partial
from attnx.attention.partial import Partial, merge, rebase
from attnx.core.tokens import Tokens
from attnx.core.varying import varying

Keys = tuple[jax.Array, jax.Array, Tokens]  # k, v and where they sit


def ring_attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec,
  *,
  q_tokens: Tokens,
  k_tokens: Tokens,
  axis_name: str,
) -> jax.Array:
  """finish(merge over shards of attention over the keys of each): `attend` in `jax.shard_map`.

  The keys of a device go round the ring of P devices in P - 1 hops. A hop does not wait for what is
  attended to meanwhile; whether the two overlap is for the compiler to say. A device holds two
  shards of keys, its own queries and their sums; the backward pass sends the gradients of keys
  round with the keys, so that it holds no more than two shards of either. Tiles that the mask
  leaves empty are skipped; which device has how many is for the layout to say, see `striped` and
  `zigzag`.

  Args:
    query: (B, T / P, N, H), a shard of the queries.
    key: (B, S / P, K, H), a shard of the keys.
    value: (B, S / P, K, V).
    spec: what to compute.
    q_tokens: where the queries of the shard sit: positions, and places (`index`), of the whole.
    k_tokens: where the keys of the shard sit, likewise.
    axis_name: the mesh axis that both are sharded over.

  Returns:
    (B, T / P, N, V) in the dtype of `value`, sharded as the queries are. It has first derivatives,
    in reverse.

  Raises:
    NotImplementedError: the spec wants whole rows of keys, which no device has.
  """
  spec.must_merge()
  whole = lambda tokens, x: jax.tree.map(
    lambda y: jnp.broadcast_to(jnp.asarray(y), x.shape[:2]), tokens
  )
  keys = (key, value, whole(k_tokens, key))
  parts = (spec, query, whole(q_tokens, query), keys)
  parts = varying(jax.tree.map(jnp.asarray, parts), parts)  # what is whole gathers its gradient
  leaves, tree = jax.tree.flatten(parts)
  return spec.finish(ring(axis_name, tree, *leaves)).astype(value.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring(axis_name: str, tree: Any, *leaves: jax.Array) -> Partial:
  """The partial of a device's queries over all keys; `leaves` are of spec, q and keys."""
  spec, q, q_tokens, keys = tree.unflatten(leaves)
  size = jax.lax.axis_size(axis_name)
  seen = see(spec, q, q_tokens, keys)
  if size == 1:
    return seen

  def hop(_, carry):
    seen, keys = carry
    after = onward(keys, axis_name)  # does not wait for what is seen
    return merge(seen, see(spec, q, q_tokens, keys)), after

  seen, keys = jax.lax.fori_loop(1, size - 1, hop, (seen, onward(keys, axis_name)))
  return merge(seen, see(spec, q, q_tokens, keys))


def forward(axis_name: str, tree: Any, *leaves: jax.Array):
  p = ring(axis_name, tree, *leaves)
  return p, (leaves, p.peak)


def backward(axis_name: str, tree: Any, kept: Any, slope: Partial):
  """Gradients of keys go round with the keys: P sends bring them home, P - 1 suffice for keys.

  Measured from the final peak, what each shard adds to `out` and `mass` does not depend on the
  other shards, so that a hop computes its own sums again and pulls the same slopes back.
  """
  leaves, peak = kept
  size = jax.lax.axis_size(axis_name)
  spec, q, q_tokens, (k, v, k_tokens) = tree.unflatten(leaves)
  here, structure = jax.tree.flatten((spec, q))
  moves = [jnp.issubdtype(x.dtype, jnp.floating) for x in here]

  def sums(moved, k, v, k_tokens):
    rest = iter(moved)
    spec, q = structure.unflatten([next(rest) if m else x for x, m in zip(here, moves)])
    p = rebase(see(spec, q, q_tokens, (k, v, k_tokens)), peak)
    return p.out, p.mass

  def pull(slopes, keys):
    """The slopes with those that this shard of keys adds."""
    k, v, k_tokens = keys
    moved = [x for x, m in zip(here, moves) if m]
    _, back = jax.vjp(lambda *x: sums(*x, k_tokens), moved, k, v)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), slopes, back((slope.out, slope.mass)))

  def hop(_, carry):
    (d_here, *d_keys), keys = carry
    after = onward(keys, axis_name)
    d_here, *d_keys = pull((d_here, *d_keys), keys)
    return (d_here, *onward(d_keys, axis_name)), after

  wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
  zero = jax.tree.map(wide, ([x for x, m in zip(here, moves) if m], k, v))
  carry = (varying(zero, leaves), (k, v, k_tokens))
  slopes, keys = jax.lax.fori_loop(0, size - 1, hop, carry)
  d_here, *d_keys = pull(slopes, keys)
  d_k, d_v = onward(d_keys, axis_name) if size > 1 else d_keys
  rest = iter(d_here)
  d_here = [next(rest) if m else None for m in moves]
  tokens = [None] * len(jax.tree.leaves(q_tokens))
  found = [*d_here, *tokens, d_k, d_v, *[None] * len(jax.tree.leaves(k_tokens))]
  return tuple(
    np.zeros(x.shape, jax.dtypes.float0) if d is None else d.astype(x.dtype)
    for d, x in zip(found, leaves, strict=True)
  )


ring.defvjp(forward, backward)


def see(spec: AttentionSpec, q: jax.Array, q_tokens: Tokens, keys: Keys) -> Partial:
  """Attention over the keys of one shard."""
  k, v, k_tokens = keys
  return attend_partial(q, k, v, spec, q_tokens=q_tokens, k_tokens=k_tokens)


def onward(tree: Any, axis_name: str) -> Any:
  """What the device before this one had."""
  size = jax.lax.axis_size(axis_name)
  return jax.lax.ppermute(tree, axis_name, [(i, (i + 1) % size) for i in range(size)])


def striped(length: int, size: int) -> np.ndarray:
  """The order of tokens that gives device d the tokens d, d + P, d + 2 P, .. (arXiv:2311.09431).

  Under a causal mask every device then has as much to do in every hop, but for one diagonal.

  Args:
    length: T, a multiple of P.
    size: P.

  Returns:
    (T,): shard `x[:, order]` along its tokens; `argsort` of it is the way back.
  """
  divides("size", size, length)
  return np.arange(length).reshape(-1, size).T.ravel()


def zigzag(length: int, size: int) -> np.ndarray:
  """The order of tokens that gives device d the chunks d and 2 P - 1 - d of 2 P chunks.

  Under a causal mask every device then has the same to do in every hop. As `striped`.
  """
  divides("2 size", 2 * size, length)
  chunk = np.arange(length).reshape(2 * size, -1)
  return np.concatenate([chunk[[d, -1 - d]].ravel() for d in range(size)])


def divides(name: str, size: int, length: int) -> None:
  """Raises ValueError unless tokens can be dealt out evenly."""
  if size < 1 or length % size:
    raise ValueError(f"length={length} must be a multiple of {name}={size}: pad it")
