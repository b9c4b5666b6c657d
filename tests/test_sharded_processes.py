"""Attention and recurrences over several processes are those of one device."""

import json
import pathlib
import subprocess
import sys

import pytest

from attnx.sharded.tree import REDUCTIONS
from runs import ended, environment, free_port

PROGRAM = pathlib.Path(__file__).with_name("sharded_process.py")
CHECKS = {"ring", "ulysses", "recurrence"} | {
  f"{tree}, {reduction}" for tree in ("tree", "tree of two levels") for reduction in REDUCTIONS
}


CLOSE = {"float32": 1e-5, "float64": 1e-9}


@pytest.mark.parametrize("count, devices, dtypes", [
  (2, 4, ["float64"]),
  (4, 1, ["float64"]),  # each compiles for itself
  pytest.param(2, 1, ["float32", "float64"], marks=pytest.mark.slow),  # as the others
], ids=["2 of 4 devices", "4 of 1", "2 of 1"])  # fmt: skip
def test_processes_are_as_one_device(count, devices, dtypes):
  where = [sys.executable, str(PROGRAM), f"127.0.0.1:{free_port()}", str(count)]
  processes = [
    subprocess.Popen(
      [*where, str(i), *dtypes], env=environment(devices), text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    for i in range(count)
  ]  # fmt: skip
  with ended(*processes):
    told = [process.communicate(timeout=180)[0] for process in processes]
  assert [process.returncode for process in processes] == [0] * count, told
  for text in told:
    found = json.loads(text.splitlines()[-1])
    assert found["devices"] == count * devices
    assert list(found["errors"]) == dtypes
    for dtype, errors in found["errors"].items():
      assert errors.keys() == CHECKS
      assert all(error < CLOSE[dtype] for error in errors.values()), (dtype, errors)
