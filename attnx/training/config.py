"""What the user asked for: a config file, overrides on the command line, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import pathlib
import re
import reprlib
import runpy
import traceback
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from attnx.core import registry

OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
KINDS: dict[str, Any] = {
  "int": int, "float": (int, float), "bool": bool, "str": str, "dict": Mapping,
  "Sequence[Any]": (list, tuple),
}  # fmt: skip


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
    mesh: arguments of `attnx.sharded.rules.make_mesh`: data, fsdp, tensor, seq.
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
    raise Mistake(f"{what}={shown(given)} must be a mapping")
  wanted = {k: p for k, p in registry.arguments(make).items() if k not in offered}
  for key, value in given.items():
    if key not in wanted:
      raise Mistake(f"{what} takes no {key!r}; {registry.suggestion(key, wanted)}")
    kinds = str(wanted[key].annotation).split(" | ")
    right = (value is None and "None" in kinds) or any(
      isinstance(value, KINDS.get(kind, object))
      and not (isinstance(value, bool) and kind in ("int", "float"))
      for kind in kinds
      if kind != "None"
    )
    if not right:
      raise Mistake(f"{what}.{key}={shown(value)} must be {wanted[key].annotation}")
  missing = [k for k, p in wanted.items() if p.default is p.empty and k not in given]
  if missing:
    raise Mistake(f"{what} needs {' and '.join(map(repr, missing))}")


def load(where: str) -> ml_collections.ConfigDict:
  """The config of "FILE" or "FILE:variant".

  Raises:
    Mistake: the file is not there, its code fails, or it gives no config.
  """
  file, *variant = where.split(":", 1)
  if not pathlib.Path(file).is_file():
    raise Mistake(f"there is no config file {file}")
  try:
    get_config = runpy.run_path(file).get("get_config")
  except (Exception, SystemExit) as error:
    raise Mistake(failure(file, error)) from error
  if not callable(get_config):
    raise Mistake(f"{file} defines no function get_config")
  try:
    given = get_config(*variant)
  except (KeyError, TypeError, ValueError) as error:
    what = f"{file} has no variant {variant[0]!r}: {sentence(error)}" if variant else None
    raise Mistake(what or failure(file, error)) from error
  except (Exception, SystemExit) as error:
    raise Mistake(failure(file, error)) from error
  if not isinstance(given, Mapping | ml_collections.ConfigDict):
    raise Mistake(f"get_config of {file} gives {shown(given)}; expected a ConfigDict")
  config = ml_collections.ConfigDict(given)  # a copy, for what is given may be frozen
  for section in ("eval", "checkpoint", "mesh", "log"):
    if section not in config:
      config[section] = ml_collections.ConfigDict()
  return config


def failure(file: str, error: BaseException) -> str:
  """What went wrong in the code of a config file, and in which line."""
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
  line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
  where = file if line is None else f"{file}, line {line}"
  message = error.msg if isinstance(error, SyntaxError) else sentence(error)
  return f"{where}: {type(error).__name__}: {message}"


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
  resolved = config.to_dict()
  check_plain("config", resolved)
  return resolved


def check_plain(path: str, value: Any) -> None:
  """Refuses what config.json could not keep."""
  if isinstance(value, Mapping):
    for key, inner in value.items():
      check_plain(f"{path}.{key}", inner)
  elif isinstance(value, list | tuple):
    for i, inner in enumerate(value):
      check_plain(f"{path}.{i}", inner)
  elif not isinstance(value, str | int | float | None):
    raise Mistake(f"{path}={shown(value)} must be a number, a string, a list or a mapping")


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
      raise Mistake(f"{where}={shown(here)} has nothing inside that {path!r} could name")
  if last in here and here[last] is None:
    del here[last]
  elif isinstance(here.get(last), list):
    raise Mistake(f"config.{path} is a list, which only the config file can change")


def shown(value: Any) -> str:
  """A value in one short line."""
  return " ".join(reprlib.repr(value).split())


def sentence(error: BaseException) -> str:
  """The message of an exception in one line."""
  message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
  return " ".join(str(message).split()) or type(error).__name__
