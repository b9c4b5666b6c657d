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

from absl import flags

from attnx.training import config as configs
from attnx.training.command import Command, Flag


FLAGS: Sequence[Flag] = (
  (flags.DEFINE_string, "config", None, "FILE or FILE:variant; what to train."),
  (flags.DEFINE_string, "workdir", None, "Where all results go; nothing is kept without it."),
  (flags.DEFINE_bool, "profile", False, "Trace ten steps, after the first, to WORKDIR/profile."),
)


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
  from attnx.training import checkpoint  # as in `work`

  where = workdir / "checkpoints"
  if not (steps := checkpoint.steps(where)):
    return f"no checkpoint is in {where} yet; started again, the run begins anew"
  return (
    f"whole checkpoints in {where}: {', '.join(map(str, steps))}; started again, with these "
    f"processes or with those that are left, the run goes on from step {steps[-1]}"
  )


def work(values: flags.FlagValues, overrides: list[str]) -> None:
  """Trains what the flags say."""
  if values.config is None:
    raise configs.Mistake("say what to train: --config FILE")
  interrupted = Signals()
  config = configs.override(configs.load(values.config), overrides)
  from attnx.training import checkpoint, loop, processes  # here, so that --help is instant

  workdir = pathlib.Path(values.workdir) if values.workdir else None
  join = processes.guarded(
    values.coordinator, values.num_processes, values.process_id, program="attnx.train",
    lost=lambda: remains(workdir), patience=values.patience,
  )  # fmt: skip
  with join, checkpoint.writing(workdir):
    loop.train(config, workdir, interrupted=interrupted, profile=values.profile)


def main(argv: Sequence[str]) -> int:
  command = Command("attnx.train", __doc__, FLAGS, others=configs.OVERRIDE)
  return command.run(argv, work, "interrupted twice; what is not in a checkpoint is lost")


if __name__ == "__main__":
  sys.exit(main(sys.argv))
