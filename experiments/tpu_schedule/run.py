"""Static schedules of attention kernels, per tile of 512 x 512 scores, over chips and block sizes.

pip install -e '.[tpu]' tokamax && python -m experiments.tpu_schedule.run

Figures that results.json holds are not measured again: remove the file, or the rows, to do so.
Those of attnx are, once the tables of blocks say something else.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from importlib import metadata
import itertools
import json
import math
import pathlib
import re
import tempfile
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from rich import progress

from experiments import measure
from experiments.tpu_schedule import cases
from pallas_kernels import aot, blocks as tables

HERE = pathlib.Path(__file__).parent
SERIES: dict[str, tuple[str, dict[str, Any]]] = {  # a function of cases.py, and its options
  "attnx": ("attnx", {}),
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
# 128 x 128 or 256 x 256; a product of a tile at H = 128 takes that many rows in all where it leaves
# half of the larger ones empty, and that many cycles on all MXUs of a core, where they are full, at
# the peak of the data sheet.
ROWS = {"f32": 8, "bf16": 16}
ROWS_PER_PRODUCT = dict(v5e=2048, v5p=2048, v6e=1024, tpu7x=1024)
PEAK_PER_PRODUCT = dict(v5e=512, v5p=512, v6e=128, tpu7x=128)
PRODUCTS = dict(forward=2, dq=3, dkv=4, fused=5)
OURS = dict(forward=0, fused=1)  # the place of a kernel in `tables.Chosen`
DIRECTIONS = ("forward", "backward")
MASKED = ("causal", "local", "segments")  # masks that leave some tiles crossed
LONG, LONG_CHIP = 2**15, "v6e"  # where memory is read
MEMORY = [
  ("attnx", "backward"), ("splash", "backward"), ("splash", "fused_backward"),
  ("tokamax", "fused_backward"),
]  # fmt: skip


def which(name: str, direction: str) -> str | None:
  """What a kernel of a program computes, by its name; None for the forward pass of a backward."""
  if direction == "forward":
    return "forward"
  if "fwd" in name or "forward" in name:
    return None
  if direction == "fused_backward" or "gradients" in name:
    return "fused"
  return "dkv" if "dkv" in name else "dq"


def own_blocks(chip: str, length: int = cases.T) -> list[list[int]]:
  """q, k, rows, columns, ahead and lying of attnx's kernels, as the table says."""
  chosen = tables.choose(length, length, cases.H, cases.H, "bfloat16", chip)
  return [list(dataclasses.astuple(cut)) for cut in chosen]


def settings(series: str, chips: list[str]) -> list[dict[str, Any]]:
  """All block sizes with the full mask and the other masks with one; attnx's as its tables say."""
  if series == "attnx":
    return [
      dict(series=series, chip=chip, direction=direction, mask=mask, blocks=own_blocks(chip))
      for chip, direction, mask in itertools.product(chips, DIRECTIONS, cases.MASKS)
    ]
  peers = [mask for mask in cases.MASKS if mask not in ("full", "alibi")]  # they have no ALiBi
  plans = [("forward", "full", blocks) for blocks in BLOCKS["forward"]]
  plans += [("forward", mask, (512, 1024, 512)) for mask in peers]
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
  if function == "attnx":
    blocks = dict(blocks=setting["blocks"])
  if "length" in setting:
    blocks |= dict(length=setting["length"])
  options = dict(direction=setting["direction"], mask=setting["mask"]) | blocks | options
  arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
  return f"experiments.tpu_schedule.cases:{function}({arguments})"


Regions = list[dict[str, Any]]


def bodies_of(setting: dict[str, Any], kernel: str, regions: Regions) -> list[tuple[float, int]]:
  """(tiles of 512 x 512 scores, bundles) of every region, by the products that it holds."""
  rows = lambda region: sum(ROWS[kind] * count for kind, count in region["products"].items())
  of_tile = PRODUCTS[kernel] * ROWS_PER_PRODUCT[setting["chip"]]
  return [(rows(x) / of_tile, x["bundles"]) for x in regions if rows(x) > 0.25 * of_tile]


def own_bodies(setting: dict[str, Any], kernel: str, regions: Regions) -> list[tuple[float, int]]:
  """Those of a kernel of attnx: a body computes a block of q x k scores, and may wait midway."""
  q, k, *_ = setting["blocks"][OURS[kernel]]
  spent = collections.Counter[int]()
  for part in regions:
    spent[part["region"]] += part["bundles"]
  return [(q * k / TILE, bundles) for bundles in spent.values()]


def rows_of(setting: dict[str, Any], report: dict[str, Any]) -> list[dict[str, Any]]:
  """One row per kernel; its body is the region that spends the fewest bundles on a tile."""
  if "error" in report:
    return [setting | dict(error=report["error"])]
  found = []
  for name, figures in report["kernels"].items():
    kernel = which(name, setting["direction"])
    if not figures["floor"] or kernel is None:
      continue
    of = own_bodies if setting["series"] == "attnx" else bodies_of
    bodies = [dict(tiles=count, bundles=bundles / count)
              for count, bundles in of(setting, kernel, figures["regions"])]  # fmt: skip
    count, hot = sum(body["tiles"] for body in bodies), figures["hot"]
    found.append(
      setting
      | dict(kernel=kernel, bundles=min(body["bundles"] for body in bodies), bodies=bodies)
      | dict(hot=hot["bundles"] / count, share=hot["share"], spills=figures["spills"] / count)
      | dict(vmem=figures["vmem"], seconds=report["seconds"])
    )
  return found


def memory_of(setting: dict[str, Any], report: dict[str, Any]) -> list[dict[str, Any]]:
  """Bytes of a program of both passes, beside its arguments and results."""
  sizes = ("argument_bytes", "output_bytes", "temp_bytes", "error")
  return [setting | {name: report[name] for name in sizes if name in report}]


def memory_settings() -> list[dict[str, Any]]:
  blocks: dict[str, Any] = dict(attnx=own_blocks(LONG_CHIP, LONG))
  return [
    dict(series=series, chip=LONG_CHIP, direction=direction, mask=mask, length=LONG)
    | dict(blocks=blocks.get(series, [512, 1024, 512]))
    for (series, direction), mask in itertools.product(MEMORY, ("full", "causal"))
  ]  # fmt: skip


def key(setting: dict[str, Any]) -> str:
  return target(setting) + setting["chip"]


def sweep(todo: list[dict[str, Any]], found: dict[str, Any]) -> None:
  """Measures what is missing, and saves after each, since a sweep takes long."""
  with tempfile.TemporaryDirectory() as scratch:
    for n, setting in enumerate(progress.track(todo, f"{len(todo)} programs")):
      report = aot.measure(target(setting), setting["chip"], pathlib.Path(scratch, str(n)))
      kind, read = ("memory", memory_of) if "length" in setting else ("rows", rows_of)
      found[kind] += read(setting, report)
      save(found)


def kept(planned: list[dict[str, Any]]) -> dict[str, Any]:
  """What results.json holds, but for attnx at blocks that are its own no longer."""
  path = HERE / "results.json"
  found = json.loads(path.read_text()) if path.exists() else {}
  own = {key(setting) for setting in planned if setting["series"] == "attnx"}
  stays = lambda row: row["series"] != "attnx" or key(row) in own
  return {kind: list(filter(stays, found.get(kind, []))) for kind in ("rows", "memory")}


def results(found: dict[str, Any]) -> dict[str, Any]:
  """With the releases that they hold for."""
  versions = {name: metadata.version(name) for name in ("libtpu", "tokamax")}
  return dict(machine=measure.machine(**versions)) | found


def save(found: dict[str, Any]) -> None:
  (HERE / "results.json").write_text(json.dumps(results(found), indent=1) + "\n")


def best(rows: list[dict[str, Any]], kernel: str, mask: str, chip: str) -> list[dict[str, Any]]:
  """For each series, the row with the fewest bundles per tile."""
  fits = lambda row: (row.get("kernel"), row["mask"], row["chip"]) == (kernel, mask, chip)
  by_series: dict[str, dict[str, Any]] = {}
  for row in sorted(filter(fits, rows), key=lambda row: row["bundles"]):
    by_series.setdefault(row["series"], row)
  return [by_series[series] for series in SERIES if series in by_series]


def bodies(row: dict[str, Any]) -> tuple[float, float | None]:
  """Bundles per tile of a tile that no mask crosses, and of one that a mask does, where any is.

  A kernel with one body spends the same on both.
  """
  spent = [body["bundles"] for body in row["bodies"]]
  return min(spent), max(spent) if row["mask"] in MASKED else None


def number(x: float | None, digits: int = 0) -> str:
  return "-" if x is None else f"{x:.{digits}f}"


def cut(row: dict[str, Any]) -> str:
  """The blocks of a row: attnx's q/k/rows/columns+ahead, others' q/kv/kv at once."""
  if row["series"] != "attnx":
    return "/".join(map(str, row["blocks"]))
  *sizes, ahead, lying = row["blocks"][OURS[row["kernel"]]]
  return f"{'/'.join(map(str, sizes))}+{ahead}{', lying' if lying else ''}"


def table(rows: list[dict[str, Any]], chips: list[str]) -> list[list[str]]:
  """The best blocks of each series, kernel, mask and chip."""
  head = "kernel, mask, chip, series, blocks, full, partial, hot, peak, MXU, VALU, spills, VMEM"
  lines = [head.split(", ")]
  for kernel, mask, chip in itertools.product(PRODUCTS, cases.MASKS, chips):
    for row in best(rows, kernel, mask, chip):
      peak = PRODUCTS[kernel] * PEAK_PER_PRODUCT[chip]
      full, partial = bodies(row)
      share = row["share"]
      lines.append([
        kernel, mask, chip, row["series"], cut(row), number(full), number(partial),
        number(row["hot"]), str(peak), number(share["MXU"], 2), number(share["VALU"], 2),
        number(row["spills"]), aot.size(row["vmem"]),
      ])  # fmt: skip
  return lines


def bars(rows: list[dict[str, Any]], chips: list[str]) -> list[list[str]]:
  """attnx beside the best of the others: bundles of either body, share of the MXU, spills."""
  lines = ["kernel, mask, chip, full, partial, MXU, spills".split(", ")]
  for kernel, mask, chip in itertools.product(OURS, cases.MASKS, chips):
    found = best(rows, kernel, mask, chip)
    if len(found) < 2 or found[0]["series"] != "attnx":
      continue
    full, partial = zip(*map(bodies, found))
    share = [row["share"]["MXU"] for row in found]
    spills = [row["spills"] for row in found]
    against = lambda own, other, digits=0: f"{own:.{digits}f} : {other:.{digits}f}"
    lines.append([
      kernel, mask, chip, against(full[0], min(full[1:])),
      against(partial[0], min(partial[1:])) if mask in MASKED else "-",
      against(share[0], max(share[1:]), 2), against(spills[0], min(spills[1:])),
    ])  # fmt: skip
  return lines


def whole_backward(rows: list[dict[str, Any]], chips: list[str]) -> list[list[str]]:
  """Bundles that a whole backward pass spends on a tile: two kernels, or one."""
  lines = ["chip, attnx, splash dq + dkv, splash fused, tokamax fused".split(", ")]
  for chip in chips:
    spent: dict[tuple[str, str], float] = {
      (kernel, row["series"]): bodies(row)[0]
      for kernel in PRODUCTS for row in best(rows, kernel, "full", chip)
    }  # fmt: skip
    nothing = float("nan")
    of = lambda kernel, series: spent.get((kernel, series), nothing)
    two = of("dq", "splash") + of("dkv", "splash")
    own, *fused = (of("fused", series) for series in ("attnx", "splash", "tokamax"))
    lines.append([chip, *(number(None if math.isnan(x) else x) for x in (own, two, *fused))])
  return lines


def memory_table(memory: list[dict[str, Any]]) -> list[list[str]]:
  lines = ["series, backward pass, mask, arguments, results, temporary".split(", ")]
  for row in memory:
    if "error" not in row:
      sizes = (row[f"{name}_bytes"] for name in ("argument", "output", "temp"))
      one = row["series"] == "attnx" or row["direction"] == "fused_backward"
      kind = "one kernel" if one else "two kernels"
      lines.append([row["series"], kind, row["mask"], *map(aot.size, sizes)])
  return lines


def insert(mark: str, lines: list[list[str]]) -> None:
  """A table between the marks of that name in README.md."""
  head, *body = lines
  text = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])
  readme, marks = HERE / "README.md", re.compile(f"(<!-- {mark} -->\n).*(<!-- /{mark} -->)", re.S)
  readme.write_text(marks.sub(rf"\1{text}\n\2", readme.read_text()))


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
  settings_of = lambda series: settings(series, options.chips.split(","))
  planned = [setting for series in options.series for setting in settings_of(series)]
  planned += [setting for setting in memory_settings() if setting["series"] in options.series]
  found = kept(settings("attnx", list(aot.TOPOLOGIES)) + memory_settings())
  done = {key(row) for rows in found.values() for row in rows}
  wanted = lambda case: case not in done and re.search(options.only, case)
  sweep([setting for setting in planned if wanted(key(setting))], found)
  rows = found["rows"]
  chips = [chip for chip in aot.TOPOLOGIES if any(row["chip"] == chip for row in rows)]
  measure.write(HERE, results(found), table(rows, chips))
  insert("bars", bars(rows, chips))
  insert("backward", whole_backward(rows, chips))
  insert("memory", memory_table(found["memory"]))
  draw(rows, chips)


if __name__ == "__main__":
  main()
