"""Finds block sizes of the streaming kernels over compiled schedules: `blocks/<chip>.json`.

  python -m pallas_kernels.tune --chip v6e                            # every shape of the table
  python -m pallas_kernels.tune --chip v5e --shapes 128x128,128x128:float32
  python -m pallas_kernels.tune --chip v5p --dry-run                  # search, write no table

What is compared are bundles of the body region per 512 x 512 scores, in tiles that no mask crosses;
pallas_kernels/aot.py says what a bundle is. The kernels of a shape (forward, backward) share q and
k, since they share the plan of tiles; rows, columns, ahead and lying are chosen for each. Of pieces
within 1 %, those are taken that spill the fewest registers. Of tiles, the one with the least

  bundles of both + 2 * 300 * 512^2 / (q k)

where 300 is about what a grid step spends around its body. That is for a mask that leaves all
pairs; a caller whose mask leaves few of a tile takes smaller ones. What takes more VMEM than the
compiler grants a kernel on the chip, less a margin for masks and operands, is out. So are tiles of
more than 32 pieces, which take minutes to compile.

The search descends from what the table says, or where it says nothing from three points, by steps
along ahead, columns, rows or lying, at one size of tiles; then it tries the other sizes with what
it found, and descends again at the best of them. A shape after the first that the table does not
know begins where the first ended, and tries the sizes that were within 3 % there.

Every figure is kept in a file as it comes (--kept), beside a digest of the kernels and the releases
of JAX and libtpu that it holds for. After Ctrl-C the same command goes on where it stopped; tables
of shapes that were done are written already. A schedule knows nothing of waits for HBM.

Needs libtpu (pip install 'jax[tpu]'), and no TPU. Exit status: 0; 1 where a shape found no blocks
that compile; 2 after a mistake in the command; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent import futures
import dataclasses
import hashlib
from importlib import metadata
import itertools
import json
import operator
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple

from pallas_kernels import aot, blocks as tables
from pallas_kernels.tpu.walk import Blocks

KERNELS = tables.Chosen._fields
SIZES = (
  (512, 1024), (1024, 512), (1024, 1024), (512, 2048), (2048, 512), (1024, 2048), (2048, 1024),
  (2048, 2048),
)  # fmt: skip
MOST = 32  # pieces of a tile, all of which the code of a kernel holds
LEAST = (512, 512)  # the tile of shapes for which BASE has no room
PIECES = dict(
  ahead=(0, 1, 2, 3, 4, 5, 6, 7), columns=(256, 512, 1024, 2048), rows=(128, 256, 512, 1024),
  lying=(False, True),
)  # fmt: skip
BASE = (1024, 1024)  # the tile at which the search begins
STARTS = [(512, 512, 0, False), (128, 1024, 2, False), (256, 512, 3, True)]
NAMES = ("rows", "columns", "ahead", "lying")  # of what a start says
pieces_of = operator.attrgetter(*NAMES)  # of blocks
NEAR = 1.03  # of the least cost: tiles that the shapes after the first are tried at
STEP = 300  # bundles of a grid step around its body, most of them scalar work for copies
UNIT = 512 * 512
VMEM = {chip: size * 2**20 for chip, size in dict(v5e=14, v5p=14, v6e=28, tpu7x=28).items()}
TIE = 1.01  # of the fewest bundles: pieces between which spills decide
EXPECTED = 50, 25  # measurements of the first shape and of another, to tell the time left
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Shape:
  """Widths and dtype of queries, keys and values."""

  H: int
  V: int
  dtype: str = "bfloat16"

  @classmethod
  def parse(cls, text: str) -> Shape:
    """`HxV` or `HxV:dtype`."""
    found = re.fullmatch(r"(\d+)x(\d+)(?::(bfloat16|float32))?", text)
    if found is None or 0 in (int(found[1]), int(found[2])):
      raise aot.UsageError(
        f"--shapes {text!r} is not like 128x128 or 192x128:float32 (H x V, bfloat16 or float32)"
      )
    return cls(int(found[1]), int(found[2]), found[3] or "bfloat16")

  def __str__(self) -> str:
    return f"{self.H}x{self.V}" + ("" if self.dtype == "bfloat16" else f":{self.dtype}")


SHAPES = (
  Shape(128, 128), Shape(64, 64), Shape(192, 128), Shape(256, 256), Shape(128, 128, "float32"),
)  # fmt: skip


class Figures(NamedTuple):
  """What a schedule says of the body of a kernel.

  Attributes:
    bundles: per 512 x 512 scores.
    mxu: share of the slots of the matrix units.
    spills: registers stored for want of registers, per 512 x 512 scores.
    vmem: bytes of the kernel.
  """

  bundles: float
  mxu: float
  spills: float
  vmem: int


def target(kernel: str, shape: Shape, cut: Blocks) -> str:
  """The case as `python -m pallas_kernels.aot` takes it."""
  options = dataclasses.asdict(shape) | dataclasses.asdict(cut)
  return f"streaming.softmax.{kernel}({', '.join(f'{n}={v!r}' for n, v in options.items())})"


def figures(report: dict[str, Any], cut: Blocks) -> Figures:
  """Those of the body in a report of `aot.measure` that has one kernel with matrix work."""
  (kernel,) = (found for found in report["kernels"].values() if found["regions"])
  count, bodies = cut.q * cut.k / UNIT, kernel["regions"]
  bundles = sum(body["bundles"] for body in bodies)
  busy = sum(body["share"]["MXU"] * body["bundles"] for body in bodies)
  spills = sum(body["spills"] for body in bodies)
  return Figures(
    round(bundles / count, 1), round(busy / bundles, 3), round(spills / count, 1), kernel["vmem"]
  )


def releases() -> dict[str, str]:
  return {name: metadata.version(name) for name in ("jax", "libtpu")}


def digest() -> str:
  """Of what a figure depends on: the kernels, their cases, and the compiler."""
  here = pathlib.Path(__file__).parent
  names = ("cases", "algebra", "scaled", "products", "visits", "tpu/walk", "tpu/streaming",
           "tpu/backward")
  sources = [(here / f"{name}.py").read_bytes() for name in names]
  return hashlib.sha256(b"\0".join([*sources, json.dumps(releases()).encode()])).hexdigest()[:16]


class Bench:
  """Measures blocks on one chip, once each; what was measured before is read from a file."""

  def __init__(self, chip: str, kept: pathlib.Path, jobs: int = 1, left: int = 0):
    self.chip, self.kept, self.jobs = chip, kept, jobs
    self.digest, self.begin = digest(), time.monotonic()
    self.fresh, self.left = 0, left
    self.known: dict[str, Figures | None] = {}
    for line in kept.read_text().splitlines() if kept.exists() else ():
      entry = json.loads(line)
      if entry.pop("digest") == self.digest:
        self.known[entry["case"]] = Figures(*entry["figures"]) if entry["figures"] else None

  def of(
    self, kernel: str, shape: Shape, cuts: Iterable[Blocks]
  ) -> dict[Blocks, Figures]:
    """Figures of those that compile and fit."""
    wanted = {cut: target(kernel, shape, cut) for cut in cuts if len(cut.pieces()) <= MOST}
    missing = [cut for cut, case in wanted.items() if case not in self.known]
    with tempfile.TemporaryDirectory(prefix="tune-") as scratch:
      pool = futures.ThreadPoolExecutor(self.jobs)
      try:
        runs = {
          pool.submit(aot.measure, wanted[cut], self.chip, pathlib.Path(scratch, str(n))): cut
          for n, cut in enumerate(missing)
        }
        for run in futures.as_completed(runs):
          self.keep(wanted[runs[run]], runs[run], run.result())
      finally:
        pool.shutdown(cancel_futures=True)
    fits = lambda found: found is not None and found.vmem <= VMEM[self.chip]
    found = {cut: self.known[case] for cut, case in wanted.items()}
    return {cut: told for cut, told in found.items() if told is not None and fits(told)}

  def keep(self, case: str, cut: Blocks, report: dict[str, Any]) -> None:
    """Adds a report to the file, and says how far the search is."""
    found = None if "error" in report else figures(report, cut)
    self.known[case] = found
    entry = dict(digest=self.digest, case=case, figures=found, error=report.get("error"))
    self.kept.parent.mkdir(parents=True, exist_ok=True)
    with self.kept.open("a") as lines:
      lines.write(json.dumps(entry) + "\n")
    self.fresh += 1
    pace = (time.monotonic() - self.begin) / self.fresh
    said = f"{found.bundles:.0f} bundles" if found else "does not compile"
    left = max(self.left - self.fresh, 0) * pace / 60
    print(
      f"[{self.fresh}, {pace:.1f} s each, about {left:.0f} min left] {case}: {said}",
      file=sys.stderr, flush=True,
    )  # fmt: skip


def blocks_of(q: int, k: int, pieces: tuple[int, int, int, bool]) -> Blocks:
  """Blocks with these pieces, cut down to the tile; no more of them ahead than there are."""
  rows, columns, ahead, lying = pieces
  rows, columns = min(q, rows), min(k, columns)
  return Blocks(q, k, rows, columns, min(ahead, q * k // (rows * columns) - 1), lying)


def beside(cut: Blocks, name: str) -> list[Blocks]:
  """`cut` between its neighbours along one of PIECES."""
  asked = [dataclasses.asdict(cut) | {name: value} for value in PIECES[name]]
  line = list(dict.fromkeys(blocks_of(cut.q, cut.k, operator.itemgetter(*NAMES)(a)) for a in asked))
  at = line.index(cut)
  return line[max(at - 1, 0) : at + 2]


def best(found: dict[Blocks, Figures]) -> tuple[Blocks, Figures]:
  """The fewest bundles, and of those as good as that the fewest spills."""
  least = min(told.bundles for told in found.values())
  near = {cut: told for cut, told in found.items() if told.bundles <= TIE * least}
  return min(near.items(), key=lambda item: (item[1].spills, item[1].bundles))


def descend(
  bench: Bench, kernel: str, shape: Shape, starts: Sequence[Blocks]
) -> dict[Blocks, Figures]:
  """All that was measured on the ways down from `starts`, by steps along one of PIECES."""
  found: dict[Blocks, Figures] = {}
  for at in starts:
    names, settled = itertools.cycle(PIECES), 0
    name = next(names)
    while settled < len(PIECES):
      tried = bench.of(kernel, shape, beside(at, name))
      found |= tried
      to = min(tried, key=lambda cut: tried[cut].bundles, default=at)
      if to == at:
        name, settled = next(names), settled + 1
      else:
        at, settled = to, 0
  return found


class Tile(NamedTuple):
  """The best blocks of every kernel at one size of tiles, with their figures."""

  q: int
  k: int
  chosen: dict[str, tuple[Blocks, Figures]]

  @property
  def bundles(self) -> float:
    return sum(told.bundles for _, told in self.chosen.values())

  @property
  def cost(self) -> float:
    """Bundles per 512 x 512 scores, with those around the body."""
    return self.bundles + len(self.chosen) * STEP * UNIT / (self.q * self.k)


def settle(tiles: Iterable[Tile]) -> Tile:
  return min(tiles, key=lambda tile: tile.cost)


def descent(bench: Bench, shape: Shape, q: int, k: int, starts: dict[str, Any]) -> Tile | None:
  """The best pieces at a tile; None where a kernel has none that fit."""
  found = {
    kernel: descend(bench, kernel, shape, [blocks_of(q, k, start) for start in starts[kernel]])
    for kernel in KERNELS
  }
  if not all(found.values()):
    return None
  return Tile(q, k, {kernel: best(found[kernel]) for kernel in KERNELS})


def ends_of(tile: Tile) -> dict[str, list[Any]]:
  """Where the search ended at a tile, as starts."""
  return {kernel: [pieces_of(cut)] for kernel, (cut, _) in tile.chosen.items()}


def search(bench: Bench, shape: Shape, like: Sequence[Tile] = ()) -> list[Tile]:
  """Tiles that were tried and fit, each with its best pieces; `settle` takes one of them.

  Args:
    bench: what measures.
    shape: of queries, keys and values.
    like: what the search found for another shape; it then begins where that one ended.
  """
  sizes: Sequence[tuple[int, int]] = SIZES
  begin = BASE
  starts = first = dict.fromkeys(KERNELS, STARTS)
  if told := known(bench.chip, shape):
    begin = (told["q"], told["k"])
    starts = {n: [operator.itemgetter(*NAMES)(told[n])] for n in KERNELS}
  elif like:
    ended = settle(like)
    sizes = [(tile.q, tile.k) for tile in like if tile.cost <= NEAR * ended.cost]
    begin, starts = (ended.q, ended.k), ends_of(ended)
  base = descent(bench, shape, *begin, starts) or descent(bench, shape, *LEAST, first)
  if base is None:
    return []
  tiles = {(base.q, base.k): base} | others(bench, shape, base, sizes)
  done = {(base.q, base.k)}
  while (size := settle(tiles.values())[:2]) not in done:
    tiles[size] = descent(bench, shape, *size, ends_of(tiles[size])) or tiles[size]
    done.add(size)
  return list(tiles.values())


def known(chip: str, shape: Shape) -> dict[str, Any] | None:
  """What the table of a chip says of a shape, if anything."""
  entries = entries_of(tables.FOLDER / f"{chip}.json")
  return next((entry for entry in entries if same(entry, dataclasses.asdict(shape))), None)


def entries_of(path: pathlib.Path) -> list[dict[str, Any]]:
  """Those of a table, none where there is no such file; what others write is seen at once."""
  return json.loads(path.read_text())["entries"] if path.exists() else []


def same(entry: dict[str, Any], other: dict[str, Any]) -> bool:
  return all(entry.get(name) == other[name] for name in ("H", "V", "dtype"))


def others(
  bench: Bench, shape: Shape, base: Tile, sizes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Tile]:
  """The pieces of `base` at the other sizes of tiles, but for those that hold one without room."""
  tiles: dict[tuple[int, int], Tile] = {}
  refused: list[tuple[int, int]] = []
  for q, k in sorted(sizes, key=lambda size: size[0] * size[1]):
    if (q, k) == (base.q, base.k) or any(q >= least[0] and k >= least[1] for least in refused):
      continue
    found = {n: bench.of(n, shape, [blocks_of(q, k, to)]) for n, (to,) in ends_of(base).items()}
    if all(found.values()):
      tiles[q, k] = Tile(q, k, {kernel: best(found[kernel]) for kernel in KERNELS})
    else:
      refused.append((q, k))
  return tiles


def entry_of(shape: Shape, tile: Tile) -> dict[str, Any]:
  """What the table of a chip holds of a shape."""
  entry: dict[str, Any] = dataclasses.asdict(shape) | dict(q=tile.q, k=tile.k)
  for kernel, (cut, told) in tile.chosen.items():
    entry[kernel] = dict(zip(NAMES, pieces_of(cut))) | told._asdict()
  return entry | releases()


def write(path: pathlib.Path, entry: dict[str, Any]) -> None:
  """Puts an entry into a table, in place of the one of the same shape."""
  entries = [other for other in entries_of(path) if not same(other, entry)] + [entry]
  entries.sort(key=lambda e: (e["dtype"], e["H"], e["V"]))
  path.write_text(json.dumps(dict(entries=entries), indent=1) + "\n")


def shown(chip: str, shape: Shape, tiles: Sequence[Tile]) -> str:
  """The choice as a table, and what it was chosen from."""
  chosen = settle(tiles)
  head = ("kernel", *NAMES, "bundles", "MXU", "spills", "VMEM")
  lines = [
    f"{shape} on {chip}: tiles of {chosen.q} x {chosen.k}",
    "  " + "".join(f"{word:>11}" for word in head),
  ]
  for kernel, (cut, told) in chosen.chosen.items():
    cells = (
      kernel, *pieces_of(cut), f"{told.bundles:.0f}", f"{told.mxu:.2f}",
      f"{told.spills:.0f}", aot.size(told.vmem),
    )  # fmt: skip
    lines.append("  " + "".join(f"{cell:>11}" for cell in cells))
  ranks = sorted(tiles, key=lambda tile: tile.cost)
  sums = (f"{tile.q} x {tile.k}: {tile.bundles:.0f} ({tile.cost:.0f})" for tile in ranks)
  return "\n".join([*lines, f"  bundles of both (cost) by tile: {', '.join(sums)}"])


def parser() -> argparse.ArgumentParser:
  about, _, rest = (__doc__ or "").partition("\n\n")
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.tune", description=about, epilog=rest,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("--chip", required=True, help=f"one of {', '.join(aot.TOPOLOGIES)}")
  parser.add_argument(
    "--shapes", default=",".join(map(str, SHAPES)), metavar="HxV[:DTYPE],...",
    help="widths of queries and of values, bfloat16 unless said (default: %(default)s)",
  )  # fmt: skip
  parser.add_argument(
    "--jobs", type=int, default=1, metavar="N", help="compilations at once (default: 1)"
  )
  parser.add_argument(
    "--kept", type=pathlib.Path, metavar="FILE",
    help="figures, one a line (default: .cache/tune-CHIP.jsonl)",
  )  # fmt: skip
  parser.add_argument("--dry-run", action="store_true", help="print what is found, write no table")
  return parser


def run(options: argparse.Namespace) -> int:
  """Exit status: 0, or 1 where a shape has no blocks that compile."""
  if options.chip not in aot.TOPOLOGIES:
    raise aot.UsageError(f"--chip {options.chip!r} is not one of {', '.join(aot.TOPOLOGIES)}")
  if options.jobs < 1:
    raise aot.UsageError(f"--jobs {options.jobs} must be at least 1")
  shapes = [Shape.parse(text) for text in options.shapes.split(",")]
  aot.installed(options.chip)
  kept = options.kept or pathlib.Path(".cache", f"tune-{options.chip}.jsonl")
  left = EXPECTED[0] + (len(shapes) - 1) * EXPECTED[1]
  bench, status = Bench(options.chip, kept, options.jobs, left), 0
  found: dict[Shape, list[Tile]] = {}
  try:
    for n, shape in enumerate(shapes, 1):
      tiles = found[shape] = search(bench, shape, next(filter(None, found.values()), ()))
      bench.left = bench.fresh + (len(shapes) - n) * EXPECTED[1]
      if not tiles:
        print(f"{shape} on {options.chip}: no blocks compile; {kept} says why", flush=True)
        status = 1
        continue
      print(shown(options.chip, shape, tiles), end="\n\n", flush=True)
      if not options.dry_run:
        write(tables.FOLDER / f"{options.chip}.json", entry_of(shape, settle(tiles)))
  except KeyboardInterrupt:
    print(f"stopped; {kept} keeps the figures, and the same command goes on", file=sys.stderr)
    return INTERRUPTED
  return status


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line."""
  options = parser().parse_args(arguments)
  try:
    sys.path.insert(0, os.getcwd())
    return run(options)
  except aot.UsageError as error:
    print(f"error: {error}", file=sys.stderr)
    return aot.USAGE


if __name__ == "__main__":
  sys.exit(main())
