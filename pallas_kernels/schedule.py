"""Reads what libtpu dumps of a compiled program: the final schedule of each kernel, and its VMEM.

A TPU core runs VLIW bundles, about one a cycle where nothing waits for memory. For each bundle the
compiler writes how many slots of each unit are taken (`final_hlo-static-per-bundle-utilization`)
and what the bundle holds (`final_bundles`), where comments mark the regions of control flow. Both
are static: a bundle counts once, however often it runs.

  share of a unit = slots taken / (slots of the unit * bundles)

over one of these stretches of bundles:

  all      the kernel.
  hot      from the first to the last bundle with work for the MXU; in a kernel without any, its
           longest region. Where a kernel has several bodies (one that masks, one that does not),
           this holds all of them and what lies between: read the regions then.
  regions  every unbroken run of bundles of one innermost region that holds work for the MXU, with
           the loads before that work and the stores after it: one entry for a body, or several
           where the body itself branches or loops.

Slots of the MXU are taken for as long as a matrix product streams through it, so the same products
need at least `floor` = slots taken / slots of the unit bundles. Spills are vector registers stored
to VMEM for want of registers, and fills are the loads that fetch them back. `products` counts the
matrix instructions by the type of their left operand, 8 rows of float32 or 16 of bfloat16 each.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})?: ", re.M)
MARK = re.compile(r"/\* (Start|End) region (\d+) \*/")
PRODUCT = re.compile(r"\bvmatmul\.(?:mubr\.)?(\w+)")
DUMP = re.compile(r"\d+-(?P<kernel>.+)-\d+-(?P<what>[\w-]+)\.txt")
FRAME = ("TLP", "<late-initialization>", "<late-finalization>")  # of the program, no kernels
UTILISATION, BUNDLES = "final_hlo-static-per-bundle-utilization", "final_bundles"
VMEM = "vmem_report.html"


def utilisation(text: str) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Units, the slots of each in a bundle, and the slots taken, (bundles, units)."""
  lines = text.splitlines()
  units = [unit.strip() for unit in lines[1].split(",")]
  slots = np.array(lines[2].split(), int)
  taken = np.array([line.split() for line in lines[4:] if line.strip()], int)
  return units, slots, taken.reshape(-1, len(units))


def bundles(text: str) -> list[str]:
  """The text of each bundle."""
  starts = [match.start() for match in BUNDLE.finditer(text)]
  return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


def runs(texts: Sequence[str]) -> list[tuple[int, int, int]]:
  """(region, first bundle, one past the last) for every unbroken run of one innermost region."""
  open_regions = [0]
  found: list[tuple[int, int, int]] = []
  for n, text in enumerate(texts):
    marks = MARK.findall(text)
    open_regions += [int(region) for what, region in marks if what == "Start"]
    if found and found[-1][0] == open_regions[-1]:
      found[-1] = (open_regions[-1], found[-1][1], n + 1)
    else:
      found.append((open_regions[-1], n, n + 1))
    ended = {int(region) for what, region in marks if what == "End"}
    open_regions = [region for region in open_regions if region not in ended]
  return found


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The final schedule of one kernel.

  Attributes:
    units: their names.
    slots: of each unit in a bundle, (units,).
    taken: slots that each bundle takes, (bundles, units).
    texts: what each bundle holds.
  """

  units: list[str]
  slots: np.ndarray
  taken: np.ndarray
  texts: list[str]

  def figures(self, first: int, end: int) -> dict[str, Any]:
    """Of the bundles from `first` up to, not including, `end`."""
    taken = self.taken[first:end].sum(0)
    total = dict(zip(self.units, taken.tolist()))
    products = PRODUCT.findall("".join(self.texts[first:end]))
    return dict(
      bundles=end - first,
      floor=-(-total["MXU"] // int(self.slots[self.units.index("MXU")])),
      products=dict(collections.Counter(products)),
      share=dict(zip(self.units, (taken / (self.slots * (end - first))).round(4).tolist())),
      spills=total["VSTORE:SPILL"],
      fills=total["VLOAD:FILL"],
    )

  def report(self) -> dict[str, Any]:
    """Figures of the kernel, of its hot span and of its regions with matrix work."""
    spans, busy = runs(self.texts), self.taken[:, self.units.index("MXU")] > 0
    _, *hot = max(spans, key=lambda span: span[2] - span[1])
    if busy.any():
      hot = [int(busy.argmax()), len(busy) - int(busy[::-1].argmax())]
    return self.figures(0, len(self.taken)) | dict(
      hot=self.figures(*hot),
      regions=[
        dict(region=region, first=first) | self.figures(first, end)
        for region, first, end in spans
        if busy[first:end].any()
      ],
    )


def kernel(utilisation_text: str, bundles_text: str) -> dict[str, Any]:
  """`Schedule.report` of one kernel; raises ValueError where the two texts disagree."""
  units, slots, taken = utilisation(utilisation_text)
  texts = bundles(bundles_text)
  if len(texts) != len(taken):
    raise ValueError(
      f"the dump lists {len(texts)} bundles but the use of {len(taken)}: this release of libtpu "
      "writes another format than pallas_kernels.schedule reads"
    )
  return Schedule(units, slots, taken, texts).report()


def vmem(report: str) -> dict[str, dict[str, int]]:
  """VMEM bytes of each kernel, and the part of them that spilled registers take."""
  data, _ = json.JSONDecoder().raw_decode(report, report.index("{", report.index("const DATA")))
  spilled = lambda blocks: sum(
    allocation["size"]
    for block in blocks
    for allocation in block["allocations"]
    if allocation.get("tag") == "SPILL"
  )
  return {
    name: dict(vmem=entry["total_size"], vmem_spilled=spilled(entry["blocks"]))
    for name, entry in data["hlo_breakdowns"].items()
  }


def read(dump: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Figures of every kernel in a folder of dumps, by the name of its HLO instruction."""
  files: dict[str, dict[str, pathlib.Path]] = {}
  for path in sorted(dump.iterdir()):
    if match := DUMP.fullmatch(path.name):
      files.setdefault(match["kernel"], {})[match["what"]] = path
  memory: dict[str, dict[str, int]] = {}
  for path in dump.glob(f"*{VMEM}"):
    memory |= vmem(path.read_text())
  return {
    name: kernel(found[UTILISATION].read_text(), found[BUNDLES].read_text())
    | memory.get(name, dict(vmem=None, vmem_spilled=None))
    for name, found in files.items()
    if name not in FRAME and {UTILISATION, BUNDLES} <= set(found)
  }
