"""Loops inside `jax.shard_map` must start with values that vary over the mesh as their steps do.

What does not vary sums its gradient over devices wherever it meets what does. In a loop that would
be once a step, and where devices take different numbers of steps they would wait forever.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def varying(tree: Any, *sources: Any) -> Any:
  """`tree`, which a loop over `sources` starts from, varying over the mesh axes that those vary on.

  Outside `jax.shard_map` nothing varies, and `tree` comes back as it is.
  """
  vary = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*map(vary, jax.tree.leaves(sources)))
  if not axes:
    return tree
  return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - vary(x)), to="varying"), tree)


def together(tree: Any) -> Any:
  """`tree`, all its floating arrays varying over the axes that some of it varies on.

  Gradients of those that did not are then summed once, outside of what is done with them.
  """
  leaves, structure = jax.tree.flatten(tree)  # type: tuple[list, Any]
  moving = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
  for i, x in zip(moving, varying([jnp.asarray(leaves[i]) for i in moving], leaves), strict=True):
    leaves[i] = x
  return structure.unflatten(leaves)


def alone() -> bool:
  """Whether arrays are what one device has, so that XLA need not split what is done with them."""
  return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)
