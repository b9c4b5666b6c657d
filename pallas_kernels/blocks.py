"""Block sizes of the streaming kernels, per chip and shape, as data: `blocks/<chip>.json`.

Every entry was found by `python -m pallas_kernels.tune` over compiled schedules and stands beside
the figures that justified it. Nothing is tuned at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
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
PAIRS = 2**19  # in a tile of all arrays of pairs together, so that they and a gradient fit


class Chosen(NamedTuple):
  """The blocks of the kernels of a call, which share the sizes of their tiles."""

  forward: Blocks
  backward: Blocks


def present() -> str:
  """The TPU at hand, by the name of its table; v5e stands for what has none."""
  return CHIPS.get(jax.devices()[0].device_kind, "v5e")


def choose(
  T: int, S: int, H: int, V: int, dtype: Any, chip: str | None = None, *, pairs: int = 0
) -> Chosen:
  """How the kernels cut T queries and S keys of widths H and V.

  The tiles of the nearest shape of the table, or smaller ones of even size where they would stand
  out: 600 queries in tiles of 512 become two of 384.

  Args:
    T, S, H, V: the sizes of q and of k and v.
    dtype: of the arrays; one of the table of as many bytes stands for it.
    chip: the name of a table; that of the TPU at hand if None.
    pairs: how many arrays of pairs stand beside q, k and v; their tiles share fast memory.

  Raises:
    ValueError: the chip has no table.
  """
  best = nearest(table(present() if chip is None else chip), H, V, jnp.dtype(dtype).itemsize)
  q, k = (fitting(n, block) for n, block in zip((T, S), shared(best["q"], best["k"], pairs)))
  return Chosen(*(cut(q, k, best[name]) for name in Chosen._fields))


def nearest(entries: list[dict[str, Any]], H: int, V: int, size: int) -> dict[str, Any]:
  """The entry of the nearest widths, in whole registers first, among those of the dtype's bytes."""
  registers = lambda n: -(-n // LANES)

  def distance(entry: dict[str, Any]):
    pairs = ((entry["H"], H), (entry["V"], V))
    apart = lambda measure: sum(abs(measure(a) - measure(b)) for a, b in pairs)
    return jnp.dtype(entry["dtype"]).itemsize != size, apart(registers), apart(int)

  return min(entries, key=distance)


def shared(q: int, k: int, pairs: int) -> tuple[int, int]:
  """Sizes of a tile, of which the longer is halved until so many arrays of pairs fit."""
  while q * k * pairs > PAIRS and max(q, k) > LANES:
    q, k = (q // 2, k) if q > k else (q, k // 2)
  return q, k


def fitting(length: int, block: int) -> int:
  """Tiles of one size that cover a length, no more of them than of `block`, and no longer ones."""
  count = -(-length // block)
  return -(-length // (count * LANES)) * LANES


def dividing(size: int, piece: int) -> int:
  """The piece of whole registers that divides a size and is nearest to `piece`, by their ratio."""
  divisors = [n for n in range(LANES, size + 1, LANES) if size % n == 0]
  return min(divisors, key=lambda n: max(n, piece) / min(n, piece))


def cut(q: int, k: int, pieces: Mapping[str, Any]) -> Blocks:
  """Blocks of these sizes with pieces that divide them.

  Sums lie where pieces fill more columns of a matrix unit than a head does. (Where tiles have 128
  queries, libtpu 0.0.42 also crashes over the gradients of weights that have no peaks.)
  """
  rows, columns = dividing(q, pieces["rows"]), dividing(k, pieces["columns"])
  lying = pieces["lying"] and min(rows, columns) > LANES
  return Blocks(q, k, rows, columns, pieces["ahead"], lying)


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
