"""The collectives of a compiled program, with how often each runs."""

from __future__ import annotations

import dataclasses
import math
import re

BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s32=4, u32=4, f32=4, f64=8, s64=8, u64=8)
COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) .*\{$")
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
COLLECTIVE = re.compile(
  r" = (.+?) (collective-permute|all-reduce|all-gather|reduce-scatter|all-to-all)(-start)?\("
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CONDITION = re.compile(r"condition=%?([\w.-]+)")
LIMIT = re.compile(r" s32\[\]\S* constant\((\d+)\)")
CALLED = re.compile(r"(?:body|calls|to_apply|branch_computations)=\{?%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """`op` of `size` bytes a device, which runs `times` times."""

  op: str
  size: int
  times: int


def collectives(text: str) -> list[Collective]:
  """Those of the program, wherever they stand; loops that hold any must count upwards from 0.

  Raises:
    ValueError: a loop with collectives in it does not say how often it runs.
  """
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    if match := COMPUTATION.match(line):
      name = match[2]
      entry = name if match[1] else entry
    bodies.setdefault(name, []).append(line)

  def visit(name: str) -> list[Collective]:
    found = []
    for line in bodies.get(name, ()):
      if match := COLLECTIVE.search(line):
        found.append(Collective(match[2], result_bytes(match[1], bool(match[3])), 1))
      elif called := CALLED.search(line):
        inside = visit(called[1])
        if " while(" in line and inside:
          times = trips(line, bodies[CONDITION.search(line)[1]])
          inside = [dataclasses.replace(c, times=c.times * times) for c in inside]
        found += inside
    return found

  return visit(entry)


def trips(loop: str, condition: list[str]) -> int:
  """How often a loop runs: as XLA says, or until its condition's one constant is reached."""
  if known := TRIPS.search(loop):
    return int(known[1])
  limits = LIMIT.findall("\n".join(condition))
  if len(limits) != 1 or not any("direction=LT" in line for line in condition):
    raise ValueError(f"how often does this loop run? {loop.strip()[:200]}")
  return int(limits[0])


def result_bytes(kind: str, start: bool) -> int:
  """Bytes of what comes out; a start of a permute shows what goes in and what comes out."""
  sizes = [
    BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
    for dtype, shape in ARRAY.findall(kind)
  ]
  if start and "u32[]" in kind:
    sizes = [size for size, (dtype, shape) in zip(sizes, ARRAY.findall(kind)) if shape]
  return sum(sizes) // (2 if start and kind.startswith("(") else 1)
