"""Files stay small enough to be read in one sitting, and the framework in one afternoon."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FRAMEWORK = sorted(
  path for path in ROOT.glob("attnx/**/*.py") if "mechanisms" not in path.relative_to(ROOT).parts
)
LIMITS = {
  "attnx/mechanisms/**/*.py": 250,
  "attnx/**/*.py": 300,
  "pallas_kernels/**/*.py": 600,
  "tests/mechanisms/*.py": 120,
}


def lines(path: pathlib.Path) -> int:
  return len(path.read_text().splitlines())


@pytest.mark.parametrize("pattern", LIMITS)
def test_no_file_is_longer_than_its_limit(pattern):
  sizes = {str(p.relative_to(ROOT)): lines(p) for p in ROOT.glob(pattern)}
  assert not {name: size for name, size in sizes.items() if size > LIMITS[pattern]}


def test_the_framework_without_mechanisms_stays_under_5000_lines():
  assert sum(map(lines, FRAMEWORK)) < 5000


def test_no_line_is_longer_than_100_columns():
  files = [*ROOT.glob("attnx/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/*.py")]
  assert not [p for p in files for line in p.read_text().splitlines() if len(line) > 100]
