"""The catalogue says what the entries say, and the README holds it."""

import pathlib
import re

import pytest

from attnx import mechanisms
from attnx.analysis import catalogue
from attnx.core import registry
from attnx.core.registry import Entry

ENTRIES = [(i, name) for i in catalogue.INTERFACES for name in registry.names(i)]
EMPTY = f"# Title\n\n{catalogue.BEGIN}{catalogue.END}\nmore\n"


def test_every_folder_of_mechanisms_is_an_interface_of_the_catalogue():
  folders = pathlib.Path(mechanisms.__path__[0]).glob("*/__init__.py")
  assert {path.parent.name for path in folders} == set(catalogue.INTERFACES)


@pytest.mark.parametrize("interface, name", ENTRIES)
def test_every_entry_has_a_paper_and_a_first_line_that_is_whole_and_fits(interface, name):
  entry = registry.get(interface, name)
  assert re.search(r"arXiv:\d{4}\.\d{4,5}|https?://", entry.paper)
  line = catalogue.formula(entry)
  assert 0 < len(line) <= 96 and line[-1] in ".:", line


def test_the_readme_is_current():
  text = catalogue.README.read_text()
  stale = catalogue.changes(text, catalogue.updated(text))
  assert text == catalogue.updated(text), f"run `make catalogue`: {stale}"


def test_every_entry_has_a_row_and_every_row_four_cells():
  rows = [line for line in catalogue.table().splitlines() if line.startswith("| [`")]
  assert len(rows) == len(ENTRIES)
  for row, (interface, name) in zip(rows, ENTRIES, strict=True):
    assert len(re.split(r"(?<!\\)\|", row)) == 6
    path = f"attnx/mechanisms/{interface}/{name}.py"
    assert f"[`{name}`]({path})" in row and (catalogue.README.parent / path).exists()


def test_a_row_links_the_paper_and_names_patterns_before_facts():
  class Thing:
    """a_t |x| <b> (arXiv:2401.00001).

    More.
    """

  entry = Entry(
    make=Thing, paper="arXiv:2401.00001, a book", facts={"z", "b_c"}, patterns={"causal_self": {}}
  )
  assert catalogue.row("mixers", "thing", entry) == (
    r"| [`thing`](attnx/mechanisms/mixers/thing.py) | a\_t \|x\| \<b\>. "
    r"| [2401.00001](https://arxiv.org/abs/2401.00001), a book | causal\_self, b\_c, z |"
  )


class Made:
  """The formula."""


def make(x: int) -> Made:
  """`Made` of x."""


def other(x: int) -> pathlib.Path:
  """A path of x."""


def test_a_function_stands_for_the_class_beside_it_that_it_makes():
  assert catalogue.formula(Entry(make=make, paper="")) == "The formula."
  assert catalogue.formula(Entry(make=other, paper="")) == "A path of x."
  assert catalogue.formula(Entry(make=Made, paper="")) == "The formula."


def test_code_in_a_line_stays_code():
  assert catalogue.escaped("`a_b | c` of d_e * f") == r"`a_b \| c` of d\_e \* f"


def test_writing_twice_changes_nothing_and_what_is_around_it_stays(tmp_path, capsys):
  readme = tmp_path / "README.md"
  readme.write_text(EMPTY)
  assert catalogue.main(["--check"], readme) == 1 and readme.read_text() == EMPTY
  assert "+ masks/causal\n" in capsys.readouterr().out
  assert catalogue.main([], readme) == 0
  text = readme.read_text()
  assert text.startswith("# Title\n") and text.endswith(f"{catalogue.END}\nmore\n")
  capsys.readouterr()
  assert catalogue.main([], readme) == catalogue.main(["--check"], readme) == 0
  assert readme.read_text() == text and capsys.readouterr().out == "README.md is current\n" * 2


def test_what_came_went_and_changed_is_named(tmp_path, capsys):
  readme = tmp_path / "README.md"
  text = catalogue.updated(EMPTY).replace("exp(s\\_j) / sum", "exp(s\\_j) + sum")
  row = next(line for line in text.splitlines() if "/masks/causal.py" in line)
  readme.write_text(text.replace(row, row.replace("causal", "casual")))
  assert catalogue.main([], readme) == 0
  *said, last = capsys.readouterr().out.splitlines()
  assert said == ["- masks/casual", "+ masks/causal", "~ normalisers/softmax"]
  assert last == "README.md is written"


@pytest.mark.parametrize("text", ["", catalogue.BEGIN, catalogue.END + catalogue.BEGIN, EMPTY * 2])
def test_a_readme_without_markers_is_refused(text):
  with pytest.raises(ValueError, match="once each"):
    catalogue.updated(text)
