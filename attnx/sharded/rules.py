"""Where arrays live: a mesh of devices, and paths of parameters to shardings.

A batch is split by rows over "data" and "fsdp" and by tokens over "seq"; parameters and optimiser
states are split over "tensor", by heads and hidden channels, and over "fsdp", which is only where
they are kept. XLA inserts the collectives; what mixes tokens is told how by `sharded.sequence`.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

ROWS, TENSOR, SEQ = ("data", "fsdp"), "tensor", "seq"
AXES = (*ROWS, TENSOR, SEQ)
SMALLEST = 2**12  # elements; splitting less costs more in messages than it saves in memory
SPLIT = (  # of the models: which axis, counted from the last, has heads or hidden channels
  (r"(mixer|cross)\.(query|key|value|gate)\.kernel$", 2),  # (D, N, H)
  (r"(mixer|cross)\.out\.kernel$", 3),  # (N, V, D)
  (r"mlp\.(gate|up)\.kernel$", 1),  # (D, F)
  (r"mlp\.out\.kernel$", 2),  # (F, D)
  (r"embed\.embedding$", 2),  # (V, D)
  (r"readout\.kernel$", 1),  # (D, V)
)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, seq: int = 1) -> Mesh:
  """A mesh of every device of every process; neighbours share a sequence, then tensors.

  Args:
    data: copies of the parameters; -1 for as many as the devices allow.
    fsdp: devices that share one copy, each with rows of its own.
    tensor: devices that share the heads and hidden channels of the same rows.
    seq: devices that share the tokens of the same rows.

  Raises:
    ValueError: the product is not the number of devices.
  """
  count, others = jax.device_count(), (fsdp, tensor, seq)
  if data == -1 and min(others) > 0:
    data = count // math.prod(others)
  sizes = dict(zip(AXES, (data, *others), strict=True))
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
    told = " times ".join(f"{name}={size}" for name, size in sizes.items())
    raise ValueError(f"mesh {told} must be the {count} devices there are")
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def name(path: Sequence[Any]) -> str:
  """ "params.blocks.0.mixer.query.kernel" of a path of a pytree of nnx states."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator=".").removesuffix(".value")


def shardings(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, Sequence[str | None]]] = ()) -> Any:
  """A NamedSharding for every leaf: of the first rule that its path matches, else the default.

  The default, for arrays of at least 4096 elements, splits heads and hidden channels over "tensor"
  as `SPLIT` says, and over "fsdp" the longest other axis that it divides, the last of several.

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
    return NamedSharding(mesh, default(name(path), x.shape, mesh))

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


def default(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """What `SPLIT` says of the path, and "fsdp" on the longest other axis that can be split."""
  axes: list[str | None] = [None] * len(shape)
  if math.prod(shape) < SMALLEST:
    return PartitionSpec()
  for pattern, last in SPLIT:
    if re.search(pattern, path) and last <= len(shape) and mesh.shape["tensor"] > 1:
      axes[-last] = "tensor" if shape[-last] % mesh.shape["tensor"] == 0 else None
  free = [i for i, n in enumerate(shape) if axes[i] is None and n % mesh.shape["fsdp"] == 0]
  if mesh.shape["fsdp"] > 1 and free:
    axes[max(free, key=lambda i: (shape[i], i))] = "fsdp"
  while axes and axes[-1] is None:
    axes.pop()
  return PartitionSpec(*axes)


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


def rows(mesh: Mesh) -> int:
  """How many devices, or groups of devices, share the rows of a batch."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.lru_cache
def share(mesh: Mesh) -> tuple[int, int]:
  """Which part of the rows of a batch this process loads, and how many parts there are.

  Processes whose devices share the tokens or the heads of the same rows load the same part.

  Raises:
    ValueError: the mesh deals rows out to processes unevenly.
  """
  groups = [{d.process_index for d in group} for group in mesh.devices.reshape(rows(mesh), -1)]
  owned = {p: [i for i, group in enumerate(groups) if p in group] for p in set().union(*groups)}
  count = len(owned[jax.process_index()])
  aligned = lambda here: here == [*range(here[0], here[0] + count)] and here[0] % count == 0
  if len(groups) % count or not all(map(aligned, owned.values())):
    raise ValueError(
      f"{len(groups)} shares of a batch do not fall evenly on {len(owned)} processes; choose"
      " data times fsdp as a multiple or a divisor of the number of processes"
    )
  return owned[jax.process_index()][0] // count, len(groups) // count


def place(batch: Any, mesh: Mesh) -> Any:
  """Arrays of this process' share of the rows to global arrays, spread over the mesh.

  Rows go over "data" and "fsdp"; the tokens of (B, T) arrays over "seq".
  """
  index, count = share(mesh)

  def put(x):
    axes = (ROWS, "seq") if x.ndim == 2 and x.shape[1] % mesh.shape["seq"] == 0 else (ROWS,)
    shape, begin = (len(x) * count, *x.shape[1:]), len(x) * index

    def piece(where):
      first, last, _ = where[0].indices(shape[0])
      return x[(slice(first - begin, last - begin), *where[1:])]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec(*axes)), piece)

  return jax.tree.map(put, jax.tree.map(np.asarray, batch))
