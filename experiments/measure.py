"""What experiments share: interleaved timings, compiled memory, results beside their table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import platform
import re
import statistics
import time
from typing import Any

import jax
from rich import progress

CPU = re.compile(r"model name\s*:\s*(.+)")


def interleaved(runs: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, float]:
  """Median seconds of each run; all take turns in one process, so that drift hits them alike."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for run in runs.values():
    run()  # compiles, and warms what there is to warm
  for _ in progress.track(range(repeats), f"{len(runs)} runs, {repeats} times in turn"):
    for name, run in runs.items():
      begin = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - begin)
  return {name: statistics.median(times) for name, times in seconds.items()}


def temporary(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> int:
  """Bytes that the compiled function wants beside its arguments and results; exact."""
  return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def machine(**versions: str) -> dict[str, str]:
  """What the figures were measured on."""
  info = pathlib.Path("/proc/cpuinfo")
  models = CPU.findall(info.read_text()) if info.exists() else []
  cpu = models[0] if models else platform.processor()
  return dict(cpu=f"{len(models)} x {cpu}", python=platform.python_version(),
              jax=jax.__version__, **versions)  # fmt: skip


def write(folder: pathlib.Path, results: Mapping[str, Any], table: Sequence[Sequence[str]]) -> None:
  """results.json, and the table between the marks of README.md; the first row is its head."""
  (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  head, *body = table
  rows = [head, ["---"] * len(head), *body]
  text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
  on = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
  readme = folder / "README.md"
  marks = re.compile(r"(<!-- table -->\n).*(<!-- /table -->)", re.S)
  readme.write_text(marks.sub(rf"\1{text}\n\nMeasured on: {on}.\n\2", readme.read_text()))
  print(text)
