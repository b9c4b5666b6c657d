"""Arrays inside of `jax.shard_map` that must vary over the mesh as others do."""

from __future__ import annotations

from typing import Any

import jax


def varying(tree: Any, *sources: Any) -> Any:
  """`tree` varying over the mesh axes that any array of `sources` varies on.

  Outside `jax.shard_map` nothing varies, and `tree` comes back as it is.
  """
  vary = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*map(vary, jax.tree.leaves(sources)))
  if not axes:
    return tree
  return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - vary(x)), to="varying"), tree)
