"""What the user asked for: a config file, overrides on the command line, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import pathlib
import re
import runpy
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from attnx.core import registry

OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": Mapping}


class Mistake(Exception):
  """A user's mistake, told in one sentence; exit code 2 and no traceback."""


class Stopped(Exception):
  """Training ended before its last step for a reason that one sentence tells."""

  def __init__(self, reason: str, code: int = 1):
    super().__init__(reason)
    self.code = code


def complete(
  *,
  steps: int,
  data: dict,
  model: dict,
  optimizer: dict,
  seed: int = 0,
  accumulate: int = 1,
  eval: dict | None = None,
  checkpoint: dict | None = None,
  mesh: dict | None = None,
  sharding: Sequence[Any] = (),
  log: dict | None = None,
) -> dict[str, Any]:
  """The sections of a config; those with None may be left out.

  Args:
    steps: updates of the parameters.
    data: name, batch and arguments of a dataset.
    model: name and arguments of a model.
    optimizer: arguments of `attnx.training.optimizer.make`.
    seed: of parameters, shuffles and dropout.
    accumulate: parts that a batch is cut into, one after the other, to save memory.
    eval: arguments of `attnx.training.step.Evaluation`.
    checkpoint: arguments of `attnx.training.checkpoint.Checkpoints`.
    mesh: arguments of `attnx.sharded.rules.make_mesh`.
    sharding: rules of `attnx.sharded.rules.shardings`.
    log: arguments of `attnx.training.console.Console`.
  """
  given = dict(locals())
  return {key: {} if value is None else value for key, value in given.items()}


def fits(what: str, make: Callable[..., Any], given: Any, offered: Sequence[str] = ()) -> None:
  """Refuses a section of a config that is not what the signature of `make` takes.

  Args:
    what: the section, for the message.
    make: function or class.
    given: the section.
    offered: parameters of `make` that are not the user's to give.

  Raises:
    Mistake: unknown or missing keys, or values of a wrong kind.
  """
  if not isinstance(given, Mapping):
    raise Mistake(f"{what}={given!r} must be a mapping")
  wanted = {k: p for k, p in registry.arguments(make).items() if k not in offered}
  for key, value in given.items():
    if key not in wanted:
      raise Mistake(f"{what} takes no {key!r}; {registry.suggestion(key, wanted)}")
    kinds = str(wanted[key].annotation).split(" | ")
    right = (value is None and "None" in kinds) or any(
      isinstance(value, KINDS.get(kind, object)) and isinstance(value, bool) <= (kind != "int")
      for kind in kinds
      if kind != "None"
    )
    if not right:
      raise Mistake(f"{what}.{key}={value!r} must be {wanted[key].annotation}")
  missing = [k for k, p in wanted.items() if p.default is p.empty and k not in given]
  if missing:
    raise Mistake(f"{what} needs {' and '.join(map(repr, missing))}")


def load(where: str) -> ml_collections.ConfigDict:
  """The config of "FILE" or "FILE:variant"."""
  file, *variant = where.split(":", 1)
  if not pathlib.Path(file).is_file():
    raise Mistake(f"there is no config file {file}")
  get_config = runpy.run_path(file).get("get_config")
  if get_config is None:
    raise Mistake(f"{file} defines no get_config")
  try:
    config = get_config(*variant)
  except (KeyError, TypeError, ValueError) as error:
    if not variant:
      raise
    raise Mistake(f"{file} has no variant {variant[0]!r}: {sentence(error)}") from error
  for section in registry.arguments(complete):
    if section not in config and section in ("eval", "checkpoint", "mesh", "log"):
      config[section] = ml_collections.ConfigDict()
  return config


def override(config: ml_collections.ConfigDict, arguments: Sequence[str]) -> dict[str, Any]:
  """The config after "--config.key=value ...", as plain values.

  Keys that a file leaves out may be given: what takes the section says whether it knows them.
  """
  for argument in arguments:
    if match := OVERRIDE.match(argument):
      prepare(config, match[1])
  values = flags.FlagValues()
  argv = ["train", *arguments]
  try:
    config_flags.DEFINE_config_dict(
      "config",
      config,
      flag_values=values,
      lock_config=False,
      accept_new_attributes=True,
      sys_argv=argv,
    )
    rest = values(argv)[1:]
  except (flags.Error, KeyError, TypeError, ValueError) as error:
    raise Mistake(sentence(error)) from error
  if rest:
    raise Mistake(f"what is {rest[0]!r}? an override is --config.key=value")
  return config.to_dict()


def prepare(config: ml_collections.ConfigDict, path: str) -> None:
  """Refuses a dotted path whose parents the config does not have, and frees one that is None.

  None has no type that the value on the command line could be read as.
  """
  here: Any = config
  *parents, last = path.split(".")
  for i, key in enumerate(parents):
    if key not in here:
      where = ".".join(["config", *parents[:i]])
      raise Mistake(f"{where} has no {key!r}; {registry.suggestion(key, here)}")
    here = here[key]
    if not isinstance(here, ml_collections.ConfigDict):
      where = ".".join(["config", *parents[: i + 1]])
      raise Mistake(f"{where}={here!r} has nothing inside that {path!r} could name")
  if last in here and here[last] is None:
    del here[last]


def sentence(error: BaseException) -> str:
  """The message of an exception in one line."""
  message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
  return " ".join(str(message).split()) or type(error).__name__
