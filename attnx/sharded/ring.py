"""Ring attention: queries and keys sharded, keys travel (arXiv:2310.01889)."""

from __future__ import annotations

import dataclasses
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

  The keys of a device go round the ring of P devices in P - 1 hops. A hop spans the work on the
  shard that is there already: compilers with asynchronous sends, as that for TPUs, begin it before
  the tiles and await it after them. A device holds two shards of keys, its own queries and their
  sums. The backward pass sends keys while it computes their scores again, and the gradients of
  keys, one hop behind, while it computes what is added to them: two shards of keys, and three of
  float32 gradients. Their last hop, home, hides behind nothing. Tiles that the mask leaves empty
  are skipped; which device has how many is for the layout to say, see `striped` and `zigzag`.

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
  tokens = dict(q_tokens=q_tokens, k_tokens=k_tokens)
  p = ring_partial(query, key, value, spec, **tokens, axis_name=axis_name)
  return spec.finish(p).astype(value.dtype)


def ring_partial(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec,
  *,
  q_tokens: Tokens,
  k_tokens: Tokens,
  axis_name: str,
) -> Partial:
  """`ring_attend` before it is finished."""
  spec.must_merge()
  whole = lambda tokens, x: jax.tree.map(
    lambda y: jnp.broadcast_to(jnp.asarray(y), x.shape[:2]), tokens
  )
  keys = (key, value, whole(k_tokens, key))
  parts = (spec, query, whole(q_tokens, query), keys)
  parts = varying(jax.tree.map(jnp.asarray, parts), parts)  # what is whole gathers its gradient
  leaves, tree = jax.tree.flatten(parts)
  return ring(axis_name, tree, *leaves)


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
    after, mine = meanwhile(onward(keys, axis_name), see(spec, q, q_tokens, keys))
    return merge(seen, mine), after

  after, seen = meanwhile(onward(keys, axis_name), seen)
  seen, keys = jax.lax.fori_loop(1, size - 1, hop, (seen, after))
  return merge(seen, see(spec, q, q_tokens, keys))


def forward(axis_name: str, tree: Any, *leaves: jax.Array):
  p = ring(axis_name, tree, *leaves)
  return p, (leaves, p.peak)


def backward(axis_name: str, tree: Any, kept: Any, slope: Partial):
  """Gradients of keys go round one hop behind the keys: P hops bring them home.

  Measured from the final peak, what each shard adds to `out` and `mass` does not depend on the
  other shards, so that a hop computes its own sums again and pulls the same slopes back. What the
  devices before have added arrives meanwhile.
  """
  leaves, peak = kept
  leaves, slope = jax.lax.optimization_barrier((leaves, slope))  # keys of forward hops are not kept
  size = jax.lax.axis_size(axis_name)
  spec, q, q_tokens, (k, v, k_tokens) = tree.unflatten(leaves)
  here, structure = jax.tree.flatten((spec, q))
  moves = [jnp.issubdtype(x.dtype, jnp.floating) for x in here]

  def sums(moved, k, v, k_tokens):
    rest = iter(moved)
    spec, q = structure.unflatten([next(rest) if m else x for x, m in zip(here, moves)])
    p = rebase(see(spec, q, q_tokens, (k, v, k_tokens)), peak)
    return p.out, p.mass

  def pull(sent, keys):
    """What is sent onwards while the sums are computed again, and their pullback."""
    k, v, k_tokens = keys
    moved = [x for x, m in zip(here, moves) if m]
    _, back = jax.vjp(lambda *x: sums(*x, k_tokens), moved, k, v)
    sent, back = meanwhile(onward(sent, axis_name), back)
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return sent, lambda: jax.tree.map(wide, back((slope.out, slope.mass)))

  def hop(sent, keys, slopes):
    """What is sent onwards, and the slopes with those of this shard."""
    d_here, *d_keys = slopes
    sent, back = pull(sent, keys)
    d_keys, mine = meanwhile(onward(d_keys, axis_name), back())
    return sent, jax.tree.map(jnp.add, (d_here, *d_keys), mine)

  keys = (k, v, k_tokens)
  if size == 1:
    d_here, d_k, d_v = pull((), keys)[1]()
  else:
    after, back = pull(keys, keys)
    step = lambda _, carry: hop(carry[0], *carry)
    keys, slopes = jax.lax.fori_loop(1, size - 1, step, (after, back()))
    _, (d_here, *d_keys) = hop((), keys, slopes)
    d_k, d_v = onward(d_keys, axis_name)
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
  """Attention over the keys of one shard, as sums: `backward` pulls back no `whole`."""
  k, v, k_tokens = keys
  p = attend_partial(q, k, v, spec, q_tokens=q_tokens, k_tokens=k_tokens)
  return dataclasses.replace(p, whole=None)


def onward(tree: Any, axis_name: str) -> Any:
  """What the device before this one had; integers, which are small, come in one message."""
  size = jax.lax.axis_size(axis_name)
  leaves, structure = jax.tree.flatten(tree)
  messages: dict[Any, list[int]] = {}
  for i, x in enumerate(leaves):
    alike = (x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.integer) else i
    messages.setdefault(alike, []).append(i)
  for places in messages.values():
    message = jnp.stack([leaves[i] for i in places])
    message = jax.lax.ppermute(message, axis_name, [(i, (i + 1) % size) for i in range(size)])
    for i, x in zip(places, message, strict=True):
      leaves[i] = x
  return jax.tree.unflatten(structure, leaves)


def meanwhile(sent: Any, done: Any) -> tuple[Any, Any]:
  """Both, of which neither is used before both are there.

  A compiler that hides the latency of a hop looks for work between its start and its end. What is
  done with the results afterwards is work too, and too little of it: behind the barrier it does not
  count, so that the tiles of the shard are what is left.
  """
  return jax.lax.optimization_barrier((sent, done))


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


def to_zigzag(tree: Any, axis_name: str, *, back: bool = False) -> Any:
  """Shards (B, L / P, ...) of tokens in order to shards of `zigzag`, by two sends of halves.

  Of 2 P chunks a device has 2 d and 2 d + 1, and wants d and 2 P - 1 - d. Each device wants one
  even and one odd chunk, so that either kind is one permutation of devices. The even one comes to
  lie first; `back` is the way back.
  """
  size = jax.lax.axis_size(axis_name)
  owner = lambda chunk: min(chunk, 2 * size - 1 - chunk)

  def move(half, first):
    pairs = [(d, owner(2 * d + first)) for d in range(size)]
    return jax.lax.ppermute(half, axis_name, [(b, a) for a, b in pairs] if back else pairs)

  halves = [jax.tree.map(lambda x: jnp.split(x, 2, axis=1)[i], tree) for i in (0, 1)]
  even, odd = (move(half, first) for first, half in enumerate(halves))
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), even, odd)


def divides(name: str, size: int, length: int) -> None:
  """Raises ValueError unless tokens can be dealt out evenly."""
  if size < 1 or length % size:
    raise ValueError(f"length={length} must be a multiple of {name}={size}: pad it")
