"""Imports point one way: down this list, never up."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
  "pallas_kernels",
  "attnx.core",
  "attnx.attention",
  "attnx.recurrence",
  "attnx.sharded",
  "attnx.nn",
  "attnx.mechanisms",
  "attnx.models",
  "attnx.analysis",
  "attnx.data",
  "attnx.training",
  "attnx.train",
  "attnx.decoding",
  "attnx.decode",
]
HEAVY = ("jax", "flax", "numpy", "tensorflow")
FILES = sorted([*ROOT.glob("attnx/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])


def layer(module: str) -> int | None:
  """The index of the layer that a dotted name belongs to."""
  return max(
    (i for i, name in enumerate(LAYERS) if (module + ".").startswith(name + ".")), default=None
  )


def imported(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_lower_layers(path):
  module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for name in imported(path):
    if layer(name) is not None and layer(module) is not None:
      assert layer(name) <= layer(module), f"{module} imports {name}, which is above it"


@pytest.mark.parametrize(
  "path", [p for p in FILES if "mechanisms" in p.parts], ids=lambda p: p.stem
)
def test_mechanisms_do_not_import_each_other(path):
  assert not [name for name in imported(path) if name.startswith("attnx.mechanisms")]


def test_importing_attnx_is_instant():
  code = f"import sys, attnx; print([m for m in {HEAVY} if m in sys.modules])"
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "[]"


def test_importing_the_library_starts_no_backend():
  code = (
    "import attnx.attention, attnx.recurrence.linear, attnx.models, jax\n"
    "from jax._src import xla_bridge\n"
    "print(len(xla_bridge._backends))"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "0"
