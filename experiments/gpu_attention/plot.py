"""The plot of a results.json beside it, and its tables in README.md.

python -m experiments.gpu_attention.plot experiments/gpu_attention/results.json
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import json
import pathlib
import re
import sys
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from experiments.gpu_attention import cases, peers
from experiments.gpu_attention.run import UNMEASURED, Rows

HERE = pathlib.Path(__file__).parent


def rate(row: dict[str, Any], name: str) -> float:
  """TFLOP/s of the visible pairs."""
  return row["flops"] / row["seconds"][name] / 1e12


def lines(rows: Rows, direction: str, H: int) -> dict[str, list[tuple[int, float]]]:
  """Rates of causal attention over T, of each series."""
  found: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    if (row["kind"], row["mask"], row["direction"], row["H"]) == ("plain", "causal", direction, H):
      for name in row["seconds"]:
        found.setdefault(name, []).append((row["T"], rate(row, name)))
  return {name: sorted(points) for name, points in found.items()}


def bars(axes: Any, rows: Rows, direction: str, colours: dict[str, str]) -> None:
  """Rates of each series at the length that most cases have, side by side for each case."""
  plain = [row for row in rows if (row["kind"], row["direction"]) == ("plain", direction)]
  counts = collections.Counter(row["T"] for row in plain)
  T = max(counts, key=lambda T: counts[T], default=0)
  shown = sorted((row for row in plain if row["T"] == T), key=lambda r: (r["mask"], r["H"]))
  names = [name for name in colours if any(name in row["seconds"] for row in shown)]
  width = 0.85 / max(1, len(names))
  for n, name in enumerate(names):
    points = [(m + n * width, rate(row, name)) for m, row in enumerate(shown)
              if name in row["seconds"]]  # fmt: skip
    axes.bar(*zip(*points, strict=True), width=width, color=colours[name], label=name)
  axes.margins(y=0.3)
  axes.set_xticks([m + 0.4 for m in range(len(shown))], [f"{r['mask']}\nH={r['H']}" for r in shown])
  axes.set(ylabel="TFLOP/s", title=f"{direction}, T = S = {T}")


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  """Rates of plain attention, over lengths where several were measured, and every bar."""
  matplotlib.use("Agg")
  rows = found["rows"]
  widths = sorted({row["H"] for row in rows if row["kind"] == "plain"}) or [128]
  found_lines = {(d, H): lines(rows, d, H) for d in cases.DIRECTIONS for H in widths}
  several = any(len(points) > 1 for of in found_lines.values() for points in of.values())
  figure = plt.figure(figsize=(4 * len(widths) + 5, 7), layout="constrained")
  grid = figure.add_gridspec(2, len(widths) + 1, width_ratios=[*[1] * len(widths), 1.3])
  colours = {name: f"C{n}" for n, name in enumerate(peers.OF_KIND["plain"])}
  for n, direction in enumerate(cases.DIRECTIONS):
    if not several:
      axes = figure.add_subplot(grid[n, :-1])
      bars(axes, rows, direction, colours)
    for m, H in enumerate(widths if several else []):
      axes = figure.add_subplot(grid[n, m])
      for name, points in found_lines[direction, H].items():
        axes.plot(*zip(*points, strict=True), "o-", color=colours[name], label=name)
      axes.set_xscale("log", base=2)
      axes.set_ylim(bottom=0)
      axes.set(xlabel="T = S", ylabel="TFLOP/s", title=f"causal, {direction}, H={H}")
    if n == 0 and axes.get_legend_handles_labels()[0]:
      axes.legend(frameon=False, fontsize=7, ncols=1 if several else 3)
  axes = figure.add_subplot(grid[:, -1])
  held = [line for line in found["bars"][1:] if line[4] != UNMEASURED]
  share = [float(line[2]) / float(line[3]) for line in held]
  names = [line[0] for line in held]
  axes.barh(names, share, color=["#4c72b0" if line[4] == "pass" else "#c44e52" for line in held])
  axes.axvline(1.0, color="black", linewidth=1)
  axes.invert_yaxis()
  axes.tick_params(axis="y", labelsize=6)
  axes.set(xlabel="worst case / bar")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def rates(rows: Rows) -> list[list[str]]:
  """A row a case: TFLOP/s of each series, or milliseconds of decoding."""
  names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
  table = [["case", *names]]
  for row in rows:
    cell = lambda name, row=row: (
      "" if name not in row["seconds"]
      else f"{1e3 * row['seconds'][name]:.3g} ms" if row["kind"] in ("decode", "recurrence")
      else f"{rate(row, name):.4g}"
    )  # fmt: skip
    table.append([row["name"], *map(cell, names)])
  return table


def put(text: str, mark: str, table: Sequence[Sequence[str]], machine: dict[str, str]) -> str:
  """The text with a table, and where it was measured, between the marks of that name."""
  head, *body = table
  made = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
  on = ", ".join(f"{name} {value}" for name, value in machine.items())
  marks = re.compile(f"(<!-- {mark} -->\n).*(<!-- /{mark} -->)", re.S)
  return marks.sub(lambda m: f"{m[1]}{made}\n\nOn: {on}.\n{m[2]}", text)


def main(arguments: Sequence[str]) -> None:
  path = pathlib.Path(*arguments)
  found = json.loads(path.read_text())
  draw(found, path.with_name("plot.png"))
  if found["smoke"] or path.resolve().parent != HERE:
    return
  readme = HERE / "README.md"
  text = put(readme.read_text(), "bars", found["bars"], found["machine"])
  readme.write_text(put(text, "rates", rates(found["rows"]), found["machine"]))


if __name__ == "__main__":
  main(sys.argv[1:])
