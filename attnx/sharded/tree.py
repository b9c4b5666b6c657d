"""Tree attention: keys sharded over devices, queries whole (arXiv:2408.04093)."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp

from attnx.attention import AttentionSpec, attend_partial
from attnx.attention.partial import Partial, merge, merge_across
from attnx.core.tokens import Tokens


def tree_attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec,
  *,
  q_tokens: Tokens,
  k_tokens: Tokens,
  axis_names: str | Sequence[str],
  implementation: str = "auto",
  reduction: str = "all_reduce",
) -> jax.Array:
  """finish(merge over devices of attention over the keys of each): `attend` in `jax.shard_map`.

  What is sent does not depend on the number of keys, see `merge_tree`. This is what decoding wants,
  where T is small. Keys may lie in any order, and shards may be unlike: slots at negative positions
  hold nothing, and a shard may be empty.

  Args:
    query: (B, T, N, H), the same on every device of the axes.
    key: (B, S / P, K, H), a shard of the keys.
    value: (B, S / P, K, V).
    spec: what to compute.
    q_tokens: where the queries sit.
    k_tokens: where the keys of the shard sit: positions, and places (`index`), of the whole.
    axis_names: the mesh axes that keys are sharded over. Of several, those that come first are
      merged first: ("device", "node") merges inside of each node, then across nodes.
    implementation: as for `attend`.
    reduction: "all_reduce" or "butterfly", see `merge_tree`. The results of a butterfly are the
      same on every device, to the last bit, but `jax.shard_map` cannot know: it wants
      `check_vma=False` where `out_specs` say so.

  Returns:
    (B, T, N, V) in the dtype of `value`, the same on every device of the axes.

  Raises:
    NotImplementedError: the spec wants whole rows of keys, which no device has.
    ValueError: there is no such reduction.
  """
  spec.must_merge()
  mine = attend_partial(
    query, key, value, spec, q_tokens=q_tokens, k_tokens=k_tokens, implementation=implementation
  )
  return spec.finish(merge_tree(mine, axis_names, reduction)).astype(value.dtype)


def merge_tree(
  p: Partial, axis_names: str | Sequence[str], reduction: str = "all_reduce"
) -> Partial:
  """`merge` over the devices of mesh axes, one axis after the other.

  Args:
    p: what a device has seen, (B, T, N, V).
    axis_names: of several, those that come first are merged first.
    reduction: "all_reduce" takes two for each axis, of B T N and of B T N (V + 2) numbers, in the
      form that XLA chooses. "butterfly" sends one buffer of B T N (V + 3) numbers in each of log2 P
      rounds for each axis, so that a round costs one message's delay; where P is no power of two,
      in each of floor(log2 P) + 2.

  Returns:
    The same on every device of the axes.

  Raises:
    ValueError: there is no such reduction.
  """
  if reduction not in REDUCTIONS:
    raise ValueError(f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
  p = dataclasses.replace(p, whole=None)
  for axis_name in (axis_names,) if isinstance(axis_names, str) else axis_names:
    p = REDUCTIONS[reduction](p, axis_name)
  return p


def butterfly(p: Partial, axis_name: str) -> Partial:
  """`merge` over the P devices of a mesh axis; in round r device d meets device d xor 2^r.

  Devices beyond the largest power of two hand what they have to the first devices, and are told
  the result at the end.
  """
  size, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  core = 1 << size.bit_length() - 1
  rest = [(core + i, i) for i in range(size - core)]
  if rest:
    p = choose(rank < len(rest), merge(p, send(p, axis_name, rest)), p)
  for bit in (1 << r for r in range(core.bit_length() - 1)):
    other = send(p, axis_name, [(i, i ^ bit) for i in range(core)])
    high = (rank & bit) > 0  # the lower device's comes first on both: equal to the last bit
    p = merge(choose(high, other, p), choose(high, p, other))
  if rest:
    p = choose(rank < core, p, send(p, axis_name, [(i, j) for j, i in rest]))
  return p


def send(p: Partial, axis_name: str, pairs: Sequence[tuple[int, int]]) -> Partial:
  """What the device that sends to this one has, in one message; zeros where none does."""
  return unpack(jax.lax.ppermute(pack(p), axis_name, pairs))


def pack(p: Partial) -> jax.Array:
  """One buffer (B, T, N, V + 3) of a partial (B, T, N, V)."""
  small = jnp.stack([p.mass, p.peak, p.count], -1)
  return jnp.concatenate([p.out, small.astype(p.out.dtype)], -1)


def unpack(x: jax.Array) -> Partial:
  """The partial of `pack`."""
  return Partial(out=x[..., :-3], mass=x[..., -3], peak=x[..., -2], count=x[..., -1])


def choose(condition: jax.Array, a: Partial, b: Partial) -> Partial:
  """`a` where the condition holds, otherwise `b`."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


REDUCTIONS = {"all_reduce": merge_across, "butterfly": butterfly}
