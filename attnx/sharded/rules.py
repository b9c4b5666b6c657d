"""Where arrays live: paths of parameters to shardings. The only place that names mesh axes.

Data parallelism and FSDP are one rule: a batch is split over every axis, parameters and optimiser
states over "fsdp", and XLA inserts the collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("data", "fsdp")
SMALLEST = 2**12  # elements; splitting less costs more in messages than it saves in memory


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
  """A mesh of every device of every process.

  Args:
    data: copies of the parameters; -1 for as many as the devices allow.
    fsdp: devices that share one copy.

  Raises:
    ValueError: the product is not the number of devices.
  """
  count = jax.device_count()
  if data == -1 and fsdp > 0:
    data = count // fsdp
  if data < 1 or fsdp < 1 or data * fsdp != count:
    raise ValueError(f"mesh data={data} times fsdp={fsdp} must be the {count} devices there are")
  return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def name(path: Sequence[Any]) -> str:
  """ "params.blocks.0.mixer.query.kernel" of a path of a pytree of nnx states."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator=".").removesuffix(".value")


def shardings(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, Sequence[str | None]]] = ()) -> Any:
  """A NamedSharding for every leaf: of the first rule that its path matches, else the default.

  The default splits the longest axis that "fsdp" divides, the last of several, if the array has
  at least 4096 elements.

  Args:
    tree: arrays or ShapeDtypeStructs.
    mesh: from `make_mesh`.
    rules: pairs of a regular expression, searched in the dotted path, and the mesh axis (or None)
      of each array axis, e.g. ("embed.embedding", (None, "fsdp")); () replicates.

  Raises:
    ValueError: a rule that is none, or does not fit an array it matches.
  """
  compiled = [parsed(rule) for rule in rules]

  def sharding(path, x) -> NamedSharding:
    for pattern, axes in compiled:
      if pattern.search(name(path)):
        return NamedSharding(mesh, fitting(name(path), x.shape, axes, mesh))
    return NamedSharding(mesh, default(x.shape, mesh.shape["fsdp"]))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def parsed(rule: Any) -> tuple[re.Pattern[str], tuple[Any, ...]]:
  """The pattern and the axes of a rule, refused where it is none."""
  match rule:
    case [str(pattern), [*axes]]:
      try:
        return re.compile(pattern), tuple(axes)
      except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
  raise ValueError(f"a sharding rule is a pair (pattern, axes), such as ('bias', ()); got {rule!r}")


def default(shape: tuple[int, ...], parts: int) -> PartitionSpec:
  """Splits the longest axis that can be split, or nothing."""
  axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
  if parts == 1 or not axes or np.prod(shape) < SMALLEST:
    return PartitionSpec()
  longest = max(axes, key=lambda axis: (shape[axis], axis))
  return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(longest + 1)))


def fitting(
  path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh
) -> PartitionSpec:
  """The spec of a rule, refused where it does not fit."""
  if len(axes) > len(shape):
    raise ValueError(f"a sharding rule gives {axes} to {path}, whose shape is {shape}")
  for axis, size in zip(axes, shape, strict=False):
    if axis is not None and (axis not in AXES or axes.count(axis) > 1):
      raise ValueError(
        f"a sharding rule gives {path} the axes {axes}; expected None or, once each, {AXES}"
      )
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(f"{axis}={mesh.shape[axis]} does not divide the shape {shape} of {path}")
  return PartitionSpec(*axes)


def replicated(mesh: Mesh) -> NamedSharding:
  """Everything everywhere."""
  return NamedSharding(mesh, PartitionSpec())


def place(batch: Any, mesh: Mesh) -> Any:
  """Arrays of this process' rows to global arrays whose rows are spread over all devices."""
  sharding = NamedSharding(mesh, PartitionSpec(AXES))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
