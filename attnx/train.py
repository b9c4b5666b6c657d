"""Trains what a config file describes.

python -m attnx.train --config FILE[:variant] --workdir DIR [--config.key=value ...]

The same command goes on where the last one stopped. Every key of the config can be given on the
command line, e.g. --config.steps=100 --config.mesh.fsdp=4 --config.mesh.seq=2.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
import signal
import sys
from typing import Any

from absl import flags

from attnx.core import registry
from attnx.training import config as configs


def command_line() -> flags.FlagValues:
  """The flags beside --config.key=value; not absl's own, so that --help is what matters here."""
  values = flags.FlagValues()
  kinds: Any = (
    (flags.DEFINE_string, "config", None, "FILE or FILE:variant; what to train."),
    (flags.DEFINE_string, "workdir", None, "Where all results go; nothing is kept without it."),
    (flags.DEFINE_bool, "profile", False, "Trace ten steps, after the first, to WORKDIR/profile."),
    (flags.DEFINE_string, "coordinator", None, "host:port of process 0, for several processes."),
    (flags.DEFINE_integer, "num_processes", None, "How many processes there are."),
    (flags.DEFINE_integer, "process_id", None, "Which of them this is, from 0."),
    (
      flags.DEFINE_float,
      "patience",
      45.0,
      "Seconds of silence after which another process counts as gone, and all end.",
    ),
    (flags.DEFINE_bool, "traceback", False, "Show where a mistake was found."),
    (flags.DEFINE_bool, "help", False, "Show this."),
  )
  for define, name, default, text in kinds:
    define(name, default, text, flag_values=values)
  return values


def usage() -> str:
  """What --help prints."""
  values = command_line()
  lines = [f"  --{name:14} {values[name].help}" for name in values]
  return "\n".join([__doc__.strip(), "", *lines])


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
  """The flags, and the overrides of the config that are left over."""
  dashed = [a if a.startswith("--config") else undashed(a) for a in argv]
  values = command_line()
  try:
    rest = values(dashed, known_only=True)[1:]
  except flags.Error as error:
    raise configs.Mistake(configs.sentence(error)) from error
  for argument in rest:
    if argument.startswith("-") and not configs.OVERRIDE.match(argument):
      name = argument.lstrip("-").split("=")[0]
      raise configs.Mistake(f"there is no flag --{name}; {registry.suggestion(name, values)}")
  return values, rest


def undashed(argument: str) -> str:
  """--process-id=1 as --process_id=1."""
  name, *value = argument.split("=", 1)
  return "=".join([name[:2] + name[2:].replace("-", "_"), *value]) if name[:2] == "--" else argument


class Signals:
  """SIGTERM and SIGINT ask the loop to save and stop; a second SIGINT stops at once."""

  def __init__(self):
    self.received: signal.Signals | None = None
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self.handle)

  def handle(self, number, frame):
    self.received = signal.Signals(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def __call__(self) -> str | None:
    return None if self.received is None else self.received.name


def remains(workdir: pathlib.Path | None) -> str:
  """What a run goes on from that ends here and now."""
  if workdir is None:
    return "without a workdir nothing is kept"
  where = workdir / "checkpoints"
  names = [p.name for p in where.iterdir()] if where.is_dir() else []
  steps = sorted(int(name) for name in names if name.isdecimal())
  if not steps:
    return f"no checkpoint is in {where} yet; started again, the run begins anew"
  return (
    f"whole checkpoints in {where}: {', '.join(map(str, steps))}; started again, with these "
    f"processes or with those that are left, the run goes on from step {steps[-1]}"
  )


def main(argv: Sequence[str]) -> int:
  try:
    values, rest = parse(argv)
    if values.help or len(argv) == 1:
      print(usage())
      return 0
    if values.config is None:
      raise configs.Mistake("say what to train: --config FILE")
    interrupted = Signals()
    config = configs.override(configs.load(values.config), rest)
    from attnx.training import checkpoint, loop, processes  # here, so that --help is instant

    workdir = pathlib.Path(values.workdir) if values.workdir else None
    with processes.guarded(
      values.coordinator,
      values.num_processes,
      values.process_id,
      program="attnx.train",
      lost=lambda: remains(workdir),
      patience=values.patience,
    ), checkpoint.writing(workdir):
      loop.train(config, workdir, interrupted=interrupted, profile=values.profile)
    return 0
  except configs.Mistake as mistake:
    if "--traceback" in argv:
      raise
    print(f"attnx.train: {mistake}", file=sys.stderr)
    return 2
  except configs.Stopped as stopped:
    print(f"attnx.train: {stopped}", file=sys.stderr)
    return stopped.code
  except KeyboardInterrupt:
    print("attnx.train: interrupted twice; what is not in a checkpoint is lost", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main(sys.argv))
