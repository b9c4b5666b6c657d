"""One decoded token over keys that are sharded over devices: trees, and the rings beside them."""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
from jax.sharding import PartitionSpec as P

from attnx.attention import AttentionSpec, attend_partial
from attnx.attention.partial import Partial, merge
from attnx.core.tokens import Tokens
from attnx.sharded.ring import meanwhile, onward
from attnx.sharded.tree import pack, tree_attend, unpack

SPEC = AttentionSpec()  # a decoded token sees all that is cached
AXES = ("node", "device")

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ring_of_keys(query, key, value, *, attended: int | None, implementation: str) -> jax.Array:
  """The shards of keys go round in P - 1 hops, and every device attends to each (the baseline).

  Args:
    query: (B, 1, N, H), the same on every device.
    key: (B, t, K, H), a shard.
    value: (B, t, K, V).
    attended: how many keys of a shard are attended to; all t are sent.
    implementation: as for `attend`.

  Returns:
    (B, 1, N, V), the same on every device but for rounding.
  """
  size = jax.lax.axis_size(AXES)
  see = lambda keys: shard_partial(query, *keys, attended, implementation)

  def hop(_, carry):
    seen, keys = carry
    after, mine = meanwhile(onward(keys, AXES), see(keys))
    return merge(seen, mine), after

  keys = (key, value)
  if size == 1:
    return SPEC.finish(see(keys)).astype(value.dtype)
  after, seen = meanwhile(onward(keys, AXES), see(keys))
  seen, keys = jax.lax.fori_loop(0, size - 2, hop, (seen, after))
  return SPEC.finish(merge(seen, see(keys))).astype(value.dtype)


def ring_of_partials(query, key, value, *, attended: int | None, implementation: str) -> jax.Array:
  """What each device has seen goes round in P - 1 hops; as `ring_of_keys`."""
  mine = shard_partial(query, key, value, attended, implementation)

  def hop(_, carry):
    seen, passing = carry
    passing = onward(passing, AXES)
    return merge(seen, unpack(passing)), passing

  seen, _ = jax.lax.fori_loop(0, jax.lax.axis_size(AXES) - 1, hop, (mine, pack(mine)))
  return SPEC.finish(seen).astype(value.dtype)


def tree(
  query, key, value, *, attended: int | None, implementation: str, reduction: str, levels: int
) -> jax.Array:
  """`tree_attend` over both axes at once, or inside of nodes first; as `ring_of_keys`."""
  t = attended or key.shape[1]
  return tree_attend(
    query, key[:, :t], value[:, :t], SPEC,
    q_tokens=Tokens.of_length(1), k_tokens=Tokens.of_length(t),
    axis_names=(AXES,) if levels == 1 else AXES[::-1],
    implementation=implementation, reduction=reduction,
  )  # fmt: skip


def shard_partial(query, key, value, attended: int | None, implementation: str) -> Partial:
  keys, values = key[:, :attended], value[:, :attended]
  return attend_partial(query, keys, values, SPEC, implementation=implementation)


STRATEGIES: dict[str, Callable[..., jax.Array]] = {
  "tree, butterfly": functools.partial(tree, reduction="butterfly", levels=1),
  "tree, all-reduce": functools.partial(tree, reduction="all_reduce", levels=1),
  "two levels, butterfly": functools.partial(tree, reduction="butterfly", levels=2),
  "two levels, all-reduce": functools.partial(tree, reduction="all_reduce", levels=2),
  "ring of partials": ring_of_partials,
  "ring of keys": ring_of_keys,
}


def decode(
  name: str,
  mesh: jax.sharding.Mesh,
  *,
  attended: int | None = None,
  implementation: str = "reference",
) -> Attend:
  """The strategy as a function of q (B, 1, N, H), k and v (B, t P, K, H) of P devices."""
  keys = P(None, AXES)
  return jax.shard_map(
    functools.partial(STRATEGIES[name], attended=attended, implementation=implementation),
    mesh=mesh, in_specs=(P(), keys, keys), out_specs=P(), check_vma=False,
  )  # fmt: skip


def mesh_of(devices, per_node: int) -> jax.sharding.Mesh:
  """Devices in order, `per_node` to a node."""
  shape = (len(devices) // per_node, per_node)
  return jax.make_mesh(shape, AXES, (jax.sharding.AxisType.Auto,) * 2, devices=devices)
