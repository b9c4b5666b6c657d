"""Block sizes of the streaming kernels, per chip and shape, as data: `blocks/<chip>.json`.

Every entry was found by `python -m pallas_kernels.tune` over compiled schedules and stands beside
the figures that justified it. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.walk import Blocks

FOLDER = pathlib.Path(__file__).parent / "blocks"
CHIPS = {  # what JAX calls a device
  "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
  "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "TPU v7x": "tpu7x",
}  # fmt: skip
LANES = 128


class Chosen(NamedTuple):
  """The blocks of the kernels of a call, which share the sizes of their tiles."""

  forward: Blocks
  queries: Blocks
  keys: Blocks


def present() -> str:
  """The TPU at hand, by the name of its table; v5e stands for what has none."""
  return CHIPS.get(jax.devices()[0].device_kind, "v5e")


def choose(T: int, S: int, H: int, V: int, dtype: Any, chip: str | None = None) -> Chosen:
  """How the kernels cut T queries and S keys of widths H and V.

  The nearest shape of the table, by widths in whole registers, cut down to lengths that are shorter
  than its tiles or would be padded by more than an eighth.
  """
  entries = table(present() if chip is None else chip)
  width = lambda n: -(-n // LANES)
  size = jnp.dtype(dtype).itemsize
  distance = lambda e: (
    e["bytes"] != size, abs(width(e["H"]) - width(H)) + abs(width(e["V"]) - width(V))
  )
  best = min(entries, key=distance)
  q, k = (fitting(n, best[side]) for n, side in ((T, "q"), (S, "k")))
  return Chosen(*(cut(q, k, best[name]) for name in Chosen._fields))


def fitting(length: int, block: int) -> int:
  """The largest block that pads a length by at most an eighth, or 128."""
  while block > LANES and (-length % block) * 8 > length:
    block //= 2
  return block


def cut(q: int, k: int, pieces: dict[str, int]) -> Blocks:
  """Blocks of these sizes with pieces that divide them."""
  rows, columns = min(q, pieces["rows"]), min(k, pieces["columns"])
  return Blocks(q, k, rows, columns, pieces["ahead"])


@functools.cache
def table(chip: str) -> list[dict[str, Any]]:
  """The entries of a chip.

  Raises:
    ValueError: it has no table.
  """
  path = FOLDER / f"{chip}.json"
  if not path.exists():
    known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json")))
    raise ValueError(f"chip={chip!r} has no table of blocks; known: {known}")
  return json.loads(path.read_text())["entries"]
