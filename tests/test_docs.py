"""What the documents show runs as it stands."""

import pathlib
import re
import textwrap

import jax
import numpy as np
import pytest

from attnx.attention import AttentionSpec, attend

ROOT = pathlib.Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
  """The Python examples of a Markdown file."""
  text = (ROOT / name).read_text()
  return [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", text, re.S)]


def test_the_mechanism_that_contributing_shows_works_as_it_stands():
  names: dict = {}
  exec(blocks("CONTRIBUTING.md")[0], names)  # noqa: S102 -- our own document
  spec = AttentionSpec(normaliser=names["ENTRY"].make(power=2))
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
  weights = np.maximum(np.einsum("btnh,bsnh->bnts", q, k) / 2, 0) ** 2 / 6
  expected = np.einsum("bnts,bsnv->btnv", weights, v)
  for implementation in ("reference", "chunked"):
    actual = attend(q, k, v, spec, implementation=implementation)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_example_of_the_readme_runs(capsys):
  for code in blocks("README.md"):
    exec(code.replace("4096", "256").replace("512", "64"), {})  # noqa: S102 -- our own document
  assert "chunked" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_path_that_a_document_names_exists(name):
  paths = re.findall(r"`(\w+/[\w/.]*)`", (ROOT / name).read_text())
  there = lambda path: (ROOT / path).exists() or (ROOT / "attnx" / path).exists()
  assert paths and not [path for path in paths if not there(path) and not path.startswith("runs/")]
