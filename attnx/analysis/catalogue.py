"""The table of mechanisms, from their entries: `python -m attnx.analysis.catalogue [--check]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import inspect
import pathlib
import re
import sys
import typing

import attnx
from attnx.core import registry
from attnx.core.registry import Entry

README = pathlib.Path(attnx.__file__).parent.parent / "README.md"
BEGIN, END = "<!-- catalogue -->\n", "<!-- /catalogue -->"
INTERFACES = {
  "mixers": "move information between positions",
  "masks": "which pairs may meet",
  "transforms": "elementwise changes of scores",
  "normalisers": "how scores become weights",
  "edits": "elementwise changes of weights",
  "positions": "changes of queries, keys or embeddings by position",
  "features": "feature maps of linear attention",
  "combiners": "how heads are put together",
  "caches": "which keys a decoder remembers",
  "analyses": "numbers and maps read off a model",
}


def table() -> str:
  """All entries of all interfaces as Markdown."""
  return "\n".join(section(interface, about) for interface, about in INTERFACES.items())


def section(interface: str, about: str) -> str:
  """The entries of an interface."""
  names = registry.names(interface)
  rows = [row(interface, name, registry.get(interface, name)) for name in names]
  head = ["| name | what it is | paper | holds |", "| --- | --- | --- | --- |"]
  return "\n".join([f"### {interface} ({len(names)}): {about}", "", *head, *rows, ""])


def row(interface: str, name: str, entry: Entry) -> str:
  """One entry: its file, formula, paper, and what the contract of its interface certifies."""
  file = f"[`{name}`](attnx/mechanisms/{interface}/{name}.py)"
  holds = ", ".join([*entry.patterns, *sorted(entry.facts)])
  cells = (file, escaped(formula(entry)), linked(entry.paper), escaped(holds))
  return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def formula(entry: Entry) -> str:
  """The first line of the docstring of what an entry makes, without the paper.

  A function that makes an object of a class beside it stands for that class.
  """
  made = entry.make
  if inspect.isfunction(made):
    returned = typing.get_type_hints(made).get("return")
    if inspect.isclass(returned) and returned.__module__ == made.__module__:
      made = returned
  first = (made.__doc__ or "").strip().partition("\n")[0]
  return re.sub(r" \(arXiv:[^)]*\)", "", first)


def linked(paper: str) -> str:
  """Markdown in which each arXiv id is a link."""
  link = r"[\1](https://arxiv.org/abs/\1)"
  return re.sub(r"arXiv:(\d{4}\.\d{4,5})", link, paper.replace("|", r"\|"))


def escaped(text: str) -> str:
  """Text that Markdown shows as it stands, also in a cell; what is between backticks is code."""
  parts = re.split(r"(`[^`]*`)", text)
  plain = lambda part: re.sub(r"([\\*_<>~$\[\]|])", r"\\\1", part)
  return "".join(x.replace("|", r"\|") if x[:1] == "`" else plain(x) for x in parts)


def updated(text: str) -> str:
  """The text of a README with the table of now between its markers.

  Raises:
    ValueError: it does not hold each marker once, in order.
  """
  match text.split(BEGIN):
    case [before, rest] if rest.count(END) == 1:
      return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"
  raise ValueError(f"expected {BEGIN.strip()!r} on a line of its own and then {END!r}, once each")


def changes(before: str, after: str) -> list[str]:
  """`+ file`, `- file` and `~ file` for entries that came, went, or say something else."""
  pattern = re.compile(r"^\| \[`\w+`\]\(attnx/mechanisms/(\w+/\w+)\.py\).*$", re.M)
  old, new = ({m[1]: m[0] for m in pattern.finditer(text)} for text in (before, after))
  sign = lambda name: "+" if name not in old else "-" if name not in new else "~"
  return [f"{sign(name)} {name}" for name in sorted(old | new) if old.get(name) != new.get(name)]


def main(argv: Sequence[str] | None = None, readme: pathlib.Path = README) -> int:
  """Writes the table and prints what changed; with --check writes nothing and fails if it would."""
  parser = argparse.ArgumentParser(prog="python -m attnx.analysis.catalogue", description=__doc__)
  parser.add_argument("--check", action="store_true", help="write nothing, fail if not current")
  check, before = parser.parse_args(argv).check, readme.read_text()
  after = updated(before)
  if before == after:
    print(f"{readme.name} is current")
    return 0
  print(*changes(before, after), sep="\n")
  if check:
    print(f"{readme.name} is not current; run `make catalogue`")
    return 1
  readme.write_text(after)
  print(f"{readme.name} is written")
  return 0


if __name__ == "__main__":
  sys.exit(main())
