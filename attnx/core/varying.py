"""Loops inside `jax.shard_map` must start with values that vary over the mesh as their steps do.

What does not vary sums its gradient over devices wherever it meets what does. In a loop that would
be once a step, and where devices take different numbers of steps they would wait forever.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.varying import varying


def together(tree: Any) -> Any:
  """`tree`, all its floating arrays varying over the axes that some of it varies on.

  Gradients of those that did not are then summed once, outside of what is done with them.
  """
  leaves, structure = jax.tree.flatten(tree)  # type: tuple[list, Any]
  moving = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
  for i, x in zip(moving, varying([jnp.asarray(leaves[i]) for i in moving], leaves), strict=True):
    leaves[i] = x
  return structure.unflatten(leaves)


def split() -> str | None:
  """Why kernels cannot run here, if XLA would have to split what is done with arrays; else None."""
  if jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes:
    return None
  return f"runs inside jax.shard_map where there are {jax.device_count()} devices"
