"""Files stay small enough to be read in one sitting, and the framework in one afternoon."""

import ast
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ENTRIES = ("attnx/mechanisms", "attnx/data/sources")  # a file each: there may be many
CLUSTER = (  # what goes over devices and processes, which nobody needs for a model on one
  "attnx/sharded", "attnx/decod", "attnx/training/processes.py", "attnx/training/peers.py",
)  # fmt: skip
KERNELS = (  # what hands specs to kernels, one file for each kind of chip
  "attnx/attention/by_tile.py", "attnx/attention/handed.py", "attnx/attention/pallas_tpu.py",
  "attnx/attention/mosaic_gpu.py", "attnx/attention/cudnn.py", "attnx/attention/cudnn_spec.py",
  "attnx/recurrence/kernels.py", "attnx/recurrence/pallas_tpu.py",
  "attnx/recurrence/mosaic_gpu.py",
)  # fmt: skip
FILES = {str(path.relative_to(ROOT)): path for path in ROOT.glob("attnx/**/*.py")}
APART = ENTRIES + CLUSTER + KERNELS
FRAMEWORK = [path for name, path in FILES.items() if not name.startswith(APART)]
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


def code(path: pathlib.Path) -> int:
  """Lines that hold code: none that are blank, or only a comment or a docstring."""
  text = path.read_text()
  told = [
    range(node.body[0].lineno, node.body[0].end_lineno + 1)
    for node in ast.walk(ast.parse(text))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
  ]
  silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  spans = [range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in silent and t.string]
  return len({n for span in spans for n in span} - {n for span in told for n in span})


def test_lines_of_code_are_counted_without_what_explains_them(tmp_path):
  (tmp_path / "x.py").write_text('"""A\n\nb."""\n\n# c\nx = """\ny"""  # d\n\ndef f():\n  "g"\n')
  assert code(tmp_path / "x.py") == 3


def test_the_framework_without_mechanisms_stays_under_5000_lines_of_code():
  assert sum(map(code, FRAMEWORK)) < 5000


def test_what_goes_over_devices_and_processes_stays_under_2000_lines_of_code():
  assert sum(code(path) for name, path in FILES.items() if name.startswith(CLUSTER)) < 2000


def test_what_hands_specs_to_kernels_stays_under_1000_lines_of_code():
  assert sum(code(path) for name, path in FILES.items() if name in KERNELS) < 1000


def test_no_line_is_longer_than_100_columns():
  folders = ("attnx", "pallas_kernels", "tests", "configs", "experiments")
  files = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
  assert not [p for p in files for line in p.read_text().splitlines() if len(line) > 100]
