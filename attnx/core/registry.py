"""One file is one entry: `attnx/mechanisms/<interface>/<name>.py` ends with `ENTRY = Entry(...)`.

There is no list to edit: `names` reads the folder, and `get` imports the one file it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from typing import Any

PATTERNS = ("causal_self", "noncausal_self", "causal_cross", "noncausal_cross")
FOLDER = "attnx.mechanisms"  # a name, not an import: this file lies below the mechanisms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A mechanism and what it declares about itself; the contract tests check every fact.

  Attributes:
    make: builds the object from keyword arguments.
    paper: where it comes from, e.g. "arXiv:2309.08586".
    facts: what it promises, e.g. {"causal", "streaming"}; each interface lists its words.
    tiny: keyword arguments that make a small instance, for tests.
    patterns: for mixers, the attention patterns that it holds exactly (`noncausal_self`,
      `causal_self`, `noncausal_cross`, `causal_cross`), each with the keyword arguments that, on
      top of `tiny`, make an instance of it.
  """

  make: Callable[..., Any]
  paper: str
  facts: AbstractSet[str] = frozenset()
  tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  patterns: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not isinstance(self.facts, AbstractSet):
      raise TypeError(f"facts={self.facts!r} must be a set of words, e.g. {{'causal'}}")
    if not isinstance(self.patterns, Mapping) or not set(self.patterns) <= set(PATTERNS):
      expected = f"a mapping of {', '.join(PATTERNS)} to arguments, e.g. {{'causal_self': {{}}}}"
      raise TypeError(f"patterns={self.patterns!r} must be {expected}")


def names(interface: str) -> list[str]:
  """Every entry of an interface, without importing any."""
  folder = importlib.import_module(f"{FOLDER}.{interface}")
  return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def get(interface: str, name: str) -> Entry:
  """The entry of one file."""
  if name not in (known := names(interface)):
    raise KeyError(f"{FOLDER}.{interface} has no {name!r}; {suggestion(name, known)}")
  module = importlib.import_module(f"{FOLDER}.{interface}.{name}")
  if not isinstance(entry := getattr(module, "ENTRY", None), Entry):
    raise TypeError(f"{module.__name__} must end with ENTRY = Entry(make=..., paper=...)")
  return entry


def build(interface: str, config: Any, **context: Any) -> Any:
  """Builds an entry from its name, or from a mapping with a `name`; passes built objects through.

  The mapping holds what the user decides, and must fit the entry. `context` holds what the
  surroundings offer (dim, num_heads, rngs), of which the entry takes what its signature names.
  """
  if isinstance(config, str):
    config = {"name": config}
  if not isinstance(config, Mapping):
    return config
  chosen = dict(config)
  if not isinstance(name := chosen.pop("name", None), str):
    raise ValueError(f"{interface} wants a mapping with a name, got {dict(config)}")
  make = get(interface, name).make
  wanted = arguments(make)
  for key in chosen:
    if key not in wanted:
      raise TypeError(f"{interface}.{name} takes no {key!r}; {suggestion(key, wanted)}")
  given = {key: value for key, value in context.items() if key in wanted} | chosen
  missing = [k for k, p in wanted.items() if p.default is p.empty and k not in given]
  if missing:
    raise TypeError(f"{interface}.{name} needs {' and '.join(map(repr, missing))}")
  return construct(f"{interface}.{name}", make, given)


def construct(what: str, make: Callable[..., Any], given: Mapping[str, Any]) -> Any:
  """Calls `make`; values that it did not foresee are a ValueError of one line too."""
  try:
    return make(**given)
  except Exception as error:
    stated = isinstance(error, KeyError | TypeError | ValueError | NotImplementedError | OSError)
    if isinstance(error, ImportError) or (stated and "\n" not in str(error)):
      raise
    first = (str(error).splitlines() or [""])[0]
    raise ValueError(
      f"{what} cannot be made of these arguments: {type(error).__name__}: {first}"
    ) from error


def arguments(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
  """The parameters of a function or of the constructor of a class, by name."""
  signature = inspect.signature(make.__init__ if inspect.isclass(make) else make)
  return {name: p for name, p in signature.parameters.items() if name != "self"}


def suggestion(name: str, known: Iterable[str]) -> str:
  """"did you mean ...?" where something known is near, else everything that is known."""
  if near := difflib.get_close_matches(str(name), known := sorted(known)):
    return f"did you mean {' or '.join(map(repr, near))}?"
  return f"known: {', '.join(known) or 'nothing'}"
