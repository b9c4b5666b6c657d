"""Loops inside `jax.shard_map` must start with values that vary over the mesh as their steps do."""

from __future__ import annotations

from typing import Any

import jax


def varying(tree: Any, *sources: Any) -> Any:
  """`tree`, which a loop over `sources` starts from, varying over the mesh axes that those vary on.

  Outside `jax.shard_map` nothing varies, and `tree` comes back as it is.
  """
  vary = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*map(vary, jax.tree.leaves(sources)))
  if not axes:
    return tree
  return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - vary(x)), to="varying"), tree)
