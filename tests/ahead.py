"""Compilation ahead of time, in a process of its own."""

import os
import pathlib
import subprocess
import sys

from pallas_kernels import aot

ROOT = pathlib.Path(__file__).parent.parent


def run(file: str, *arguments: str, timeout: int = 300) -> str:
  """What a test file prints as a program: libtpu is told of a machine before JAX is imported."""
  path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
  ran = subprocess.run(
    [sys.executable, file, *arguments], cwd=ROOT, check=True, timeout=timeout,
    capture_output=True, text=True, env=os.environ | aot.TPU_ENVIRONMENT | {"PYTHONPATH": path},
  )  # fmt: skip
  return ran.stdout
