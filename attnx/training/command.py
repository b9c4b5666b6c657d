"""What commands share: flags in plain words, and mistakes told in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import re
import sys
from typing import Any

from absl import flags

from attnx.core import registry
from attnx.training.config import Mistake, Stopped, sentence

Flag = tuple[Callable[..., Any], str, Any, str]  # how absl defines it, name, default, what it is
SHARED: Sequence[Flag] = (
  (flags.DEFINE_string, "coordinator", None, "host:port of process 0, for several processes."),
  (flags.DEFINE_integer, "num_processes", None, "How many processes there are."),
  (flags.DEFINE_integer, "process_id", None, "Which of them this is, from 0."),
  (flags.DEFINE_float, "patience", 45.0, "Seconds of silence after which a process is gone."),
  (flags.DEFINE_bool, "traceback", False, "Show where a mistake was found."),
  (flags.DEFINE_bool, "help", False, "Show this."),
)


class Command:
  """A program with flags of its own, and those of several processes.

  Args:
    name: of the module, for messages.
    about: what --help says first.
    own: its flags; absl's are left out, so that --help is what matters.
    others: arguments that are none of these and allowed all the same.
  """

  def __init__(
    self, name: str, about: str, own: Sequence[Flag], others: re.Pattern[str] | None = None
  ):
    self.name, self.about, self.others = name, about, others
    self.values = flags.FlagValues()
    for define, flag, default, text in (*own, *SHARED):
      define(flag, default, text, flag_values=self.values)

  def usage(self) -> str:
    """What --help prints."""
    told = lambda flag: self.values[flag].help.split(";\n")[0]  # without what absl adds
    lines = [f"  --{flag.replace('_', '-'):16} {told(flag)}" for flag in self.values]
    return "\n".join([self.about.strip(), "", *lines])

  def parse(self, argv: Sequence[str]) -> list[str]:
    """Sets the flags, with - or _ in their names, and returns what others are left over."""
    keep = lambda a: self.others is not None and self.others.match(a)
    try:
      rest = self.values([a if keep(a) else undashed(a) for a in argv], known_only=True)[1:]
    except flags.Error as error:
      raise Mistake(sentence(error)) from error
    for argument in rest:
      if not keep(argument) and (self.others is None or argument.startswith("-")):
        flag = argument.lstrip("-").split("=")[0]
        near = registry.suggestion(flag, self.values)
        raise Mistake(f"there is no flag --{flag}; {near}")
    return rest

  def run(
    self, argv: Sequence[str], work: Callable[[flags.FlagValues, list[str]], None], lost: str
  ) -> int:
    """Does the work, and returns the exit code.

    Args:
      argv: the program's name and its arguments.
      work: of the flags, and of what is left over.
      lost: what an interrupt loses, in words.
    """
    try:
      rest = self.parse(argv)
      if self.values.help or len(argv) == 1:
        print(self.usage())
      else:
        work(self.values, rest)
      return 0
    except Mistake as mistake:
      if "--traceback" in argv:
        raise
      print(f"{self.name}: {mistake}", file=sys.stderr)
      return 2
    except Stopped as stopped:
      print(f"{self.name}: {stopped}", file=sys.stderr)
      return stopped.code
    except KeyboardInterrupt:
      print(f"{self.name}: {lost}", file=sys.stderr)
      return 130


def undashed(argument: str) -> str:
  """--process-id=1 as --process_id=1."""
  name, *value = argument.split("=", 1)
  return "=".join([name[:2] + name[2:].replace("-", "_"), *value]) if name[:2] == "--" else argument
