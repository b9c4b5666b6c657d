"""Compilation ahead of time, in a process of its own."""

from collections.abc import Mapping
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from pallas_kernels import aot

ROOT = pathlib.Path(__file__).parent.parent


def run(
  file: str, *arguments: str, timeout: int = 300,
  environment: Mapping[str, str] = aot.TPU_ENVIRONMENT, stderr: int = subprocess.PIPE,
) -> str:  # fmt: skip
  """What a test file prints as a program: libtpu is told of a machine before JAX is imported."""
  path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
  ran = subprocess.run(
    [sys.executable, file, *arguments], cwd=ROOT, timeout=timeout, text=True, stderr=stderr,
    stdout=subprocess.PIPE, env=os.environ | environment | {"PYTHONPATH": path},
  )  # fmt: skip
  assert ran.returncode == 0, f"{ran.stdout[-3000:]}{(ran.stderr or '')[-3000:]}"
  return ran.stdout


class Kernel(NamedTuple):
  """What ptxas says of a kernel: registers of a thread, and bytes that it spills to memory."""

  registers: int
  stored: int
  loaded: int


class Program(NamedTuple):
  """A case that was compiled for an H100.

  Attributes:
    kernels: its Mosaic GPU kernels.
    calls: the targets of its custom calls.
    error: why it did not compile, or "".
    serialized: whether ptxas says that products in flight wait for one another.
  """

  kernels: list[Kernel]
  calls: list[str]
  error: str
  serialized: bool

  def kernel(self) -> Kernel:
    """Its one kernel, in which no products wait for one another."""
    assert not self.error and not self.serialized, (self.error, self.serialized)
    (kernel,) = self.kernels
    return kernel


def for_h100(file: str, timeout: int = 600) -> dict[str, Program]:
  """By name, the cases that a test file hands to `compile_for_h100` as a program.

  Skips the test that asks where there is no compiler.
  """
  if sys.version_info < (3, 12) or not importlib.util.find_spec("jax_cuda13_plugin"):
    pytest.skip("JAX's CUDA 13 plugin is absent, or Python is older than 3.12")
  output = run(
    file, timeout=timeout, environment=aot.GPU_ENVIRONMENT, stderr=subprocess.STDOUT
  )
  found = {}
  for part in output.split("\n== ")[1:]:
    name, said = part.split(" ==\n", 1)
    said, told = said.split("\n-- ", 1)
    kernels = [
      Kernel(int(used), int(stored), int(loaded))
      for _, stored, loaded, used in aot.PTXAS.findall(said)
    ]
    result = json.loads(told.split(" --\n")[0])
    found[name] = Program(kernels, **result, serialized="serialized" in said)
  return found


def compile_for_h100(file: str, function: str, cases: Mapping[str, Mapping[str, Any]]) -> None:
  """Compiles a function of a test file with the options of each case; prints what it found.

  Args:
    function: its name; what it gives is what `pallas_kernels.aot` wants.
    cases: options of the function by name.
  """
  for name, options in cases.items():
    print(f"\n== {name} ==", flush=True)  # behind it comes what ptxas says
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    found: dict[str, Any] = dict(calls=[], error="")
    try:
      target = f"{pathlib.Path(file).stem}:{function}({arguments})"
      program, _ = aot.compiled(target, "h100")
      found["calls"] = [kind for _, kind in aot.CUSTOM_CALL.findall(program.as_text())]
    except Exception as error:  # whatever it is, it belongs to this case
      found["error"] = f"{type(error).__name__}: {str(error)[:400]}"
    print(f"\n-- {json.dumps(found)} --", flush=True)
