"""Attention and recurrences on one Hopper GPU, beside cuDNN, tokamax and PyTorch; see README.md.

python -m experiments.gpu_attention.run --out results.json     # 8 minutes on an H100 or H200
python -m experiments.gpu_attention.run --smoke --out x.json   # tiny shapes, on any backend
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import statistics
import time
from typing import Any

from rich import console, progress, table

from experiments import measure
from experiments.gpu_attention import cases, peers
from experiments.gpu_attention.cases import Case

TOLERANCE = {"forward": 0.01, "backward": 0.02}  # of the norm; bfloat16 rounds by 0.004
UNMEASURED = "not measured"
Rows = list[dict[str, Any]]


@dataclasses.dataclass
class Setting:
  """How thoroughly all is measured.

  Attributes:
    repeats: samples of each series, of which the median is taken.
    sample: seconds that a sample takes at least.
    threads: series that are compiled side by side.
  """

  repeats: int = 20
  sample: float = 0.01
  threads: int = 8


def message(error: Exception) -> str:
  """The first line of what a peer raised."""
  return (str(error).strip().splitlines() or [""])[0][:300]


def prepare(case: Case, given: tuple, threads: int) -> tuple[dict[str, peers.Run], dict[str, str]]:
  """The series that can do a case, compiled, and why the others cannot."""
  ready: dict[str, peers.Run] = {}
  reasons: dict[str, str] = {}
  names = peers.OF_KIND[case.kind]

  def one(name: str) -> None:
    try:
      ready[name] = peers.SERIES[name](case, given)
    except peers.Absent as error:
      reasons[name] = f"absent: {error}"
    except Exception as error:  # whatever a peer raises is its answer
      kind = "refused" if isinstance(error, NotImplementedError) else type(error).__name__
      reasons[name] = f"{kind}: {message(error)}"

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(one, (name for name in names if name not in peers.IN_TORCH)))
  for name in names:
    if name in peers.IN_TORCH:
      one(name)
  return {name: ready[name] for name in names if name in ready}, reasons


def check(
  case: Case, given: tuple, ready: dict[str, peers.Run], reasons: dict[str, str]
) -> dict[str, float]:
  """Errors of the series against the definition in float32; those that are wrong are dropped."""
  expected = cases.exact(case, given)
  errors: dict[str, float] = {}
  for name in list(ready):
    softmax = case.kind == "recurrence" and name != peers.RECURRENT
    if name in peers.UNCHECKED or softmax:
      continue  # another kind of case checks it
    try:
      errors[name] = peers.relative_error(ready[name].results(), expected)
    except Exception as error:
      reasons[name] = f"{type(error).__name__}: {message(error)}"
    if not errors.get(name, math.inf) <= TOLERANCE[case.direction]:
      reasons.setdefault(name, f"wrong: relative error {errors.get(name):.3g}")
      del ready[name]
  return errors


def timed(ready: dict[str, peers.Run], setting: Setting) -> dict[str, float]:
  """Median seconds of each; all take turns, and a sample holds as many calls as fill it."""
  times: dict[str, int] = {}
  for name, run in ready.items():
    run(2)
    begin = time.perf_counter()
    run()
    times[name] = max(1, math.ceil(setting.sample / (time.perf_counter() - begin)))
  seconds: dict[str, list[float]] = {name: [] for name in ready}
  for _ in range(setting.repeats):
    for name, run in ready.items():
      begin = time.perf_counter()
      run(times[name])
      seconds[name].append((time.perf_counter() - begin) / times[name])
  return {name: statistics.median(each) for name, each in seconds.items()}


def measured(case: Case, setting: Setting) -> dict[str, Any]:
  """One row of the results."""
  given = cases.arrays(case)
  ready, reasons = prepare(case, given, setting.threads)
  errors = check(case, given, ready, reasons)
  seconds = timed(ready, setting)
  pairs = cases.visible(case)
  return case.facts() | dict(
    name=case.name, pairs=pairs, flops=case.flops(pairs), seconds=seconds, errors=errors,
    left_out=reasons,
  )  # fmt: skip


def sweep(
  planned: Sequence[Case], setting: Setting, budget: float, keep: Callable[[Rows], None]
) -> Rows:
  """Rows of as many cases as the budget of seconds has room for, in their order."""
  begin, rows, longest = time.perf_counter(), [], 0.0
  columns = (*progress.Progress.get_default_columns(), progress.TimeElapsedColumn())
  with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
    task = bar.add_task("", total=len(planned))
    for case in planned:
      spent = time.perf_counter() - begin
      if spent + longest > budget:
        bar.console.print(f"budget of {budget:.0f} s: {len(planned) - len(rows)} cases left out")
        break
      bar.update(task, description=case.name)
      rows.append(measured(case, setting))
      longest = max(longest, time.perf_counter() - begin - spent)
      keep(rows)
      bar.advance(task)
  return rows


Found = tuple[float, str]  # a ratio, and the case that it belongs to


def ratios(rows: Rows, above: str, below: str, **where: Any) -> list[Found]:
  """How many times faster `above` is than `below`, in each row that has both."""
  chosen = [row for row in rows if all(row[key] in value for key, value in where.items())]
  return [(row["seconds"][below] / row["seconds"][above], row["name"]) for row in chosen
          if {above, below} <= set(row["seconds"])]  # fmt: skip


def per_pair(rows: Rows, own: str, mask: str) -> list[Found]:
  """The rate of visible FLOPs over that of the plain kernel with a full mask."""
  return [
    (ratio * row["pairs"] / (row["T"] * row["S"]), name)
    for row in rows if row["kind"] == "special" and row["mask"] == mask
    for ratio, name in ratios([row], own, peers.PLAIN)
  ]  # fmt: skip


def against_softmax(rows: Rows, least: int) -> list[Found]:
  """The best softmax path's seconds over the recurrence's, from `least` tokens on."""
  found = []
  for row in rows:
    if row["kind"] == "recurrence" and row["T"] >= least:
      rest = {name: t for name, t in row["seconds"].items() if name != peers.RECURRENT}
      if rest and peers.RECURRENT in row["seconds"]:
        found.append((min(rest.values()) / row["seconds"][peers.RECURRENT], row["name"]))
  return found


def bars(rows: Rows, own: str = peers.OWN, least: int = 4096) -> list[list[str]]:
  """Claims, their worst case, the bar and whether it is held; the first row is a head."""
  one = lambda *values: dict(zip(("kind", "direction", "H"), ([v] for v in values), strict=False))
  widths = sorted({row["H"] for row in rows if row["kind"] == "plain"}) or [64, 128, 256]
  raw = ratios(rows, peers.AUTO, peers.RAW, kind=["plain", "decode"])
  claims: list[tuple[str, list[Found], float]] = [
    (f"rate of {peers.AUTO} / {peers.RAW}, where cuDNN can run", raw, 0.97)
  ]
  for direction, least_ratio in (("forward", {}), ("backward", {256: 1.3})):
    for H in widths:
      found = ratios(rows, own, peers.TOKAMAX, **one("plain", direction, H))
      bar = least_ratio.get(H, 0.95 if direction == "forward" else 1.0)
      claims.append((f"rate of {own} / {peers.TOKAMAX}, {direction}, H={H}", found, bar))
  for mask in cases.SPECIAL:
    claims.append((f"{mask}: rate per visible FLOP / plain", per_pair(rows, own, mask), 0.85))
    flex = ratios(rows, own, peers.FLEX, kind=["special"], mask=[mask])
    claims.append((f"{mask}: rate of {own} / {peers.FLEX}", flex, 1.2))
  for mask in cases.SPARSE:
    claims.append((f"{mask}: speed-up / bound of FLOPs", per_pair(rows, own, mask), 0.6))
  copied = ratios(rows, own, peers.COPY, kind=["decode"])
  claims.append(("decoding: bandwidth / that of a device copy", copied, 0.8))
  for mask in cases.RECURRENCES:
    faster = against_softmax([row for row in rows if row["mask"] == mask], least)
    claims.append((f"{mask}: best softmax / recurrence, from {least} tokens", faster, 1.0))
  head = ["claim", "worst case", "found", "at least", "held"]
  lines = [head]
  for claim, found, bar in claims:
    worst, name = min(found, default=(math.nan, ""))
    held = UNMEASURED if not found else "pass" if worst >= bar else "FAIL"
    lines.append([claim, name, f"{worst:.3g}" if found else "", f"{bar:g}", held])
  return lines


def shown(lines: list[list[str]]) -> table.Table:
  head, *body = lines
  made = table.Table(*head)
  for line in body:
    made.add_row(*line)
  return made


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="where results go, as JSON")
  parser.add_argument("--budget-s", type=float, default=450.0, help="stop before this many seconds")
  parser.add_argument("--repeats", type=int, default=20, help="samples of each series")
  parser.add_argument("--only", default="", help="cases whose name holds this")
  parser.add_argument("--smoke", action="store_true", help="tiny shapes on any backend, as a test")
  options = parser.parse_args(arguments)
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # PyTorch wants some, too
  sizes = cases.SMOKE if options.smoke else cases.Sizes()
  setting = Setting(options.repeats, 0.0, 2) if options.smoke else Setting(options.repeats)
  machine = measure.machine(**peers.versions())
  own, least = (peers.CHUNKED, 1) if options.smoke else (peers.OWN, 4096)

  def keep(rows: Rows) -> None:
    found = dict(machine=machine, smoke=options.smoke, repeats=options.repeats,
                 bars=bars(rows, own, least), rows=rows)  # fmt: skip
    options.out.write_text(json.dumps(found, indent=1) + "\n")

  planned = [case for case in cases.planned(sizes) if options.only in case.name]
  keep([])
  rows = sweep(planned, setting, options.budget_s, keep)
  keep(rows)
  screen = console.Console()
  screen.print(shown(bars(rows, own, least)))
  for row in rows:
    for name, reason in row["left_out"].items():
      if not reason.startswith("absent"):
        screen.print(f"{row['name']}: {name}: {reason}", style="dim")


if __name__ == "__main__":
  main()
