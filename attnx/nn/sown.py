"""What modules sowed, by what it is: the paths are those of `attnx.analysis.observe`."""

from __future__ import annotations

from collections.abc import Mapping

import jax


def sown(seen: Mapping[str, jax.Array], name: str, ndim: int) -> dict[str, jax.Array]:
  """The arrays of that name, by path of the module that sowed them, in the order of the layers.

  Layer 10 comes after layer 2 here, also where `seen` was an argument of a compiled function,
  which sorts the keys of a dictionary as text.

  Args:
    seen: path to array.
    name: the last part of the paths that are wanted: "weights", "heads", ...
    ndim: how many axes each has.

  Raises:
    ValueError: nothing of that name was sown, or by a module that ran more than once.
  """
  paths = {path.rpartition("/")[0]: path for path in seen if path.rpartition("/")[2] == name}
  if not paths:
    raise ValueError(f"nothing sowed {name!r} among {', '.join(sorted(seen)) or 'nothing'}")
  for path in paths.values():
    if seen[path].ndim != ndim:
      raise ValueError(f"{path} has shape {seen[path].shape}; expected {ndim} axes: one call")
  return {module: seen[paths[module]] for module in sorted(paths, key=in_order)}


def in_order(path: str) -> list[tuple[bool, int, str]]:
  """What paths are sorted by: numbers as numbers."""
  parts = path.split("/")
  return [(part.isdigit(), int(part), "") if part.isdigit() else (False, 0, part) for part in parts]
