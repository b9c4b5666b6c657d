"""Every config and variant builds, fits its data and takes a step, and says what it gave."""

import ast
import math
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

from attnx.sharded import rules
from attnx.training import config as configs, plan as plans
from attnx.training.step import updater

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
SMALL = {  # what one step on one core should not wait for
  "listops": dict(depth=4, shortest=5, longest=60),
  "stdlib_bytes": dict(length=64),
  "bach_chorales": dict(length=64),
}


def variants(file: pathlib.Path) -> list[str]:
  """What may follow the colon: the keys of the tables of a file; "" is its default."""
  constants = [x for name, x in runpy.run_path(str(file)).items() if name.isupper()]
  tables = [x for x in constants if isinstance(x, dict)]
  tables = [x for x in tables if all(isinstance(value, dict) for value in x.values())]
  return ["", *(variant for table in tables for variant in table)]


CASES = [f"{file.name}:{variant}".rstrip(":") for file in FILES for variant in variants(file)]


@pytest.mark.parametrize("case", CASES)
def test_a_config_takes_a_step_from_the_loss_of_a_guess(case):
  config = configs.override(configs.load(str(ROOT / "configs" / case)), [])
  assert config["model"]["depth"] % len(config["model"]["mixers"]) == 0
  config["data"].update(SMALL.get(config["data"]["name"], {}), batch=8)
  config["model"].update(depth=len(config["model"]["mixers"]))
  plan = plans.make(config)
  batch = rules.place(next(plan.batches("train")), plan.mesh)
  state, metrics = updater(plan)(plan.init(), batch)
  guess = math.log(plan.about.vocab or plan.about.classes)
  assert 0.5 * guess < metrics["loss"] < 2 * guess
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))
  assert all(jax.device_get(metrics["squares"]) >= 0) and metrics["grad_norm"] > 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_docstring_has_commands_that_work_and_a_result(file):
  text = ast.get_docstring(ast.parse(file.read_text()))
  commands = re.findall(r"python -m attnx\.train --config configs/(\w+)\.py(?::(\S+))?", text)
  assert commands and {name for name, _ in commands} == {file.stem} and commands[0][1] == ""
  loaded = [configs.load(f"{file}:{variant}" if variant else str(file)) for _, variant in commands]
  result = text.split("\n\n")[-1]  # of as many steps as one of the commands takes
  assert {config.steps for config in loaded} & {int(n) for n in re.findall(r"(\d+) steps", result)}
  assert "two CPU cores" in result


def test_a_variant_that_is_not_there_is_named():
  with pytest.raises(configs.Mistake, match="has no variant 'nothing'"):
    configs.load(f"{ROOT / 'configs' / 'copying.py'}:nothing")
