"""Models: `attnx/models/<name>.py` holds one class `Model`, found by the name of its file."""

from __future__ import annotations

from collections.abc import Mapping
import importlib
import pkgutil
from typing import Any

from flax import nnx

from attnx.core import registry


def names() -> list[str]:
  """Every model, without importing any."""
  modules = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in modules if name != "sampling")


def build(config: Mapping[str, Any], *, rngs: nnx.Rngs) -> nnx.Module:
  """The model of a mapping with a `name` and its arguments.

  Raises:
    KeyError: there is no model of that name.
    TypeError: an argument is unknown or missing.
  """
  chosen = dict(config)
  name = chosen.pop("name", None)
  if name not in (known := names()):
    raise KeyError(f"there is no model {name!r}; {registry.suggestion(str(name), known)}")
  make = importlib.import_module(f"attnx.models.{name}").Model
  wanted = registry.arguments(make)
  for key in chosen:
    if key not in wanted:
      raise TypeError(f"the model {name} takes no {key!r}; {registry.suggestion(key, wanted)}")
  missing = [
    key for key, p in wanted.items() if p.default is p.empty and key not in {*chosen, "rngs"}
  ]
  if missing:
    raise TypeError(f"the model {name} needs {' and '.join(map(repr, missing))}")
  return registry.construct(f"the model {name}", make, {**chosen, "rngs": rngs})
