"""Static schedules of attention kernels, per tile of 512 x 512 scores, over chips and block sizes.

pip install -e '.[tpu]' tokamax && python -m experiments.tpu_schedule.run

Figures that results.json holds are not measured again: remove the file, or the rows, to do so.
"""

from __future__ import annotations

import argparse
from importlib import metadata
import itertools
import json
import pathlib
import re
import tempfile
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from rich import progress

from experiments import measure
from experiments.tpu_schedule import cases
from pallas_kernels import aot

HERE = pathlib.Path(__file__).parent
SERIES: dict[str, tuple[str, dict[str, Any]]] = {  # a function of cases.py, and its options
  "splash": ("splash", {}),
  "tokamax": ("tokamax", {}),
  "tokamax, scheduler": ("tokamax", dict(use_experimental_scheduler=True)),
}
TILE = 512 * 512
BLOCKS = {  # block_q, block_kv, block_kv_compute
  "forward": [
    (512, 512, 512), (512, 1024, 512), (512, 1024, 1024), (512, 2048, 1024), (512, 4096, 1024),
    (1024, 1024, 1024), (1024, 2048, 1024),
  ],
  "backward": [(512, 512, 512), (512, 1024, 512), (1024, 1024, 512)],
}  # fmt: skip
BLOCKS["fused_backward"] = BLOCKS["backward"]
# One instruction streams 8 rows of float32 or 16 of bfloat16 through the weights that an MXU holds,
# 128 x 128 or 256 x 256; a product of a tile at H = 128 takes that many rows in all, and that many
# cycles on all MXUs of a core at the peak of the data sheet.
ROWS = {"f32": 8, "bf16": 16}
ROWS_PER_PRODUCT = dict(v5e=2048, v5p=2048, v6e=1024, tpu7x=1024)
PEAK_PER_PRODUCT = dict(v5e=512, v5p=512, v6e=256, tpu7x=256)
PRODUCTS = dict(forward=2, dq=3, dkv=4, fused=5)


def which(name: str, direction: str) -> str | None:
  """What a kernel of a program computes, by its name; None for the forward pass of a backward."""
  if direction == "forward":
    return "forward"
  if "fwd" in name or "forward" in name:
    return None
  return "fused" if direction == "fused_backward" else "dkv" if "dkv" in name else "dq"


def settings(series: str, chips: list[str]) -> list[dict[str, Any]]:
  """All block sizes with the full mask; the other masks with one."""
  plans = [("forward", "full", blocks) for blocks in BLOCKS["forward"]]
  plans += [("forward", mask, (512, 1024, 512)) for mask in cases.MASKS if mask != "full"]
  directions = ["backward", "fused_backward"]
  if "tokamax" in series:  # it has the fused kernel only, where its scheduler changes nothing
    directions = ["fused_backward"] if series == "tokamax" else []
  for direction in directions:
    plans += [(direction, "full", blocks) for blocks in BLOCKS[direction]]
    plans += [(direction, "causal", (512, 1024, 512))]
  return [
    dict(series=series, chip=chip, direction=direction, mask=mask, blocks=list(blocks))
    for chip, (direction, mask, blocks) in itertools.product(chips, plans)
  ]


def target(setting: dict[str, Any]) -> str:
  """The case as `python -m pallas_kernels.aot` takes it."""
  function, options = SERIES[setting["series"]]
  blocks = dict(zip(("block_q", "block_kv", "block_kv_compute"), setting["blocks"]))
  options = dict(direction=setting["direction"], mask=setting["mask"]) | blocks | options
  arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
  return f"experiments.tpu_schedule.cases:{function}({arguments})"


def tiles(region: dict[str, Any], kernel: str, chip: str) -> float:
  """Tiles of 512 x 512 scores whose products a region holds."""
  rows = sum(ROWS[kind] * count for kind, count in region["products"].items())
  return rows / (PRODUCTS[kernel] * ROWS_PER_PRODUCT[chip])


def rows_of(setting: dict[str, Any], report: dict[str, Any]) -> list[dict[str, Any]]:
  """One row per kernel; its body is the region that spends the fewest bundles on a tile."""
  if "error" in report:
    return [setting | dict(error=report["error"])]
  found = []
  for name, figures in report["kernels"].items():
    kernel = which(name, setting["direction"])
    if not figures["floor"] or kernel is None:
      continue
    bodies = [
      dict(tiles=count, bundles=region["bundles"] / count)
      for region in figures["regions"]
      if (count := tiles(region, kernel, setting["chip"])) > 0.25
    ]
    count, hot = sum(body["tiles"] for body in bodies), figures["hot"]
    found.append(
      setting
      | dict(kernel=kernel, bundles=min(body["bundles"] for body in bodies), bodies=bodies)
      | dict(hot=hot["bundles"] / count, share=hot["share"], spills=figures["spills"] / count)
      | dict(vmem=figures["vmem"], seconds=report["seconds"])
    )
  return found


def sweep(todo: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
  """Measures what is missing, and saves after each, since a sweep takes long."""
  with tempfile.TemporaryDirectory() as scratch:
    for n, setting in enumerate(progress.track(todo, f"{len(todo)} programs")):
      report = aot.measure(target(setting), setting["chip"], pathlib.Path(scratch, str(n)))
      rows += rows_of(setting, report)
      save(rows)


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """With the releases that they hold for."""
  packages = ("libtpu", "tokamax")
  versions = {name: metadata.version(name) for name in packages}
  return dict(machine=measure.machine(**versions), rows=rows)


def save(rows: list[dict[str, Any]]) -> None:
  (HERE / "results.json").write_text(json.dumps(results(rows), indent=1) + "\n")


def best(rows: list[dict[str, Any]], kernel: str, mask: str, chip: str) -> list[dict[str, Any]]:
  """For each series, the row with the fewest bundles per tile."""
  fits = lambda row: (row.get("kernel"), row["mask"], row["chip"]) == (kernel, mask, chip)
  by_series: dict[str, dict[str, Any]] = {}
  for row in sorted(filter(fits, rows), key=lambda row: row["bundles"]):
    by_series.setdefault(row["series"], row)
  return [by_series[series] for series in SERIES if series in by_series]


def table(rows: list[dict[str, Any]], chips: list[str]) -> list[list[str]]:
  """The best blocks of each series, kernel, mask and chip."""
  head = "kernel, mask, chip, series, blocks, bundles/tile, hot, peak, MXU, VALU, spills/tile, VMEM"
  lines = [head.split(", ")]
  for kernel, mask, chip in itertools.product(PRODUCTS, cases.MASKS, chips):
    for row in best(rows, kernel, mask, chip):
      blocks = "/".join(map(str, row["blocks"]))
      peak = PRODUCTS[kernel] * PEAK_PER_PRODUCT[chip]
      share = row["share"]
      lines.append([
        kernel, mask, chip, row["series"], blocks, f"{row['bundles']:.0f}", f"{row['hot']:.0f}",
        str(peak), f"{share['MXU']:.2f}", f"{share['VALU']:.2f}", f"{row['spills']:.0f}",
        aot.size(row["vmem"]),
      ])  # fmt: skip
  return lines


def draw(rows: list[dict[str, Any]], chips: list[str]) -> None:
  """Bundles per tile and the MXU's share, full mask, best blocks, with the data sheet's peak."""
  matplotlib.use("Agg")
  _, axes = plt.subplots(2, len(PRODUCTS), figsize=(11, 5), layout="constrained", sharey="row")
  width = 0.8 / len(SERIES)
  for column, (kernel, products) in enumerate(PRODUCTS.items()):
    for n, chip in enumerate(chips):
      for row in best(rows, kernel, "full", chip):
        at = list(SERIES).index(row["series"])
        x, label = n + (at + 0.5) * width - 0.4, row["series"] if (n, column) == (0, 0) else None
        axes[0, column].bar(x, row["bundles"], width, color=f"C{at}", label=label)
        axes[1, column].bar(x, row["share"]["MXU"], width, color=f"C{at}")
      peak = products * PEAK_PER_PRODUCT[chip]
      axes[0, column].hlines(peak, n - 0.4, n + 0.4, color="black", linewidth=1.5)
    axes[0, column].set_title(kernel)
    axes[1, column].set_xticks(range(len(chips)), chips)
    axes[0, column].set_xticks([])
  axes[0, 0].set_ylabel("bundles per 512 x 512 tile")
  axes[1, 0].set_ylabel("share of MXU slots, hot span")
  axes[0, 0].legend(frameon=False)
  plt.savefig(HERE / "plot.png", dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--chips", default=",".join(aot.TOPOLOGIES))
  parser.add_argument("--series", nargs="+", default=list(SERIES), choices=SERIES)
  parser.add_argument("--only", default="", help="a regex of the cases to measure")
  options = parser.parse_args()
  kept = HERE / "results.json"
  rows = json.loads(kept.read_text())["rows"] if kept.exists() else []
  done = {target(row) + row["chip"] for row in rows}
  planned = [s for series in options.series for s in settings(series, options.chips.split(","))]
  wanted = lambda case: case not in done and re.search(options.only, case)
  todo = [setting for setting in planned if wanted(target(setting) + setting["chip"])]
  sweep(todo, rows)
  chips = [chip for chip in aot.TOPOLOGIES if any(row["chip"] == chip for row in rows)]
  measure.write(HERE, results(rows), table(rows, chips))
  draw(rows, chips)


if __name__ == "__main__":
  main()
