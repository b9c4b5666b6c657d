"""What the warpgroups of a kernel on Hopper GPUs share: the line they work on, rings, turns.

One warpgroup moves tiles through rings in shared memory; the others multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.experimental.pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gpu.tiles import COMPILER, Order
from pallas_kernels.varying import varying
from pallas_kernels.visits import occurring

REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 24)}  # of those that multiply, and that move


class Line(NamedTuple):
  """A line that a block of the grid works on, and what it visits.

  Each warpgroup finds it for itself: the one that moves tiles has no registers to keep it in.

  Attributes:
    b, n, line: row of the batch, head, and line.
    full, visits: how many visits are of FULL tiles, which come first, and how many there are.
    tiles: (#B, lines, length), tiles of a line in order.
    size: tokens of a tile.
    group: heads whose tiles are visited one after the other.
  """

  b: Any
  n: Any
  line: Any
  full: Any
  visits: Any
  tiles: Any
  size: int
  group: int

  @classmethod
  def at(
    cls, order: Order, number: Any, heads: int, counts, tiles, size, group=1, *, first=False
  ) -> Line:
    """The line of that number; those that come `first` are the longest, or the last."""
    bn, line = order.at(number)
    line = order.lines - 1 - line if first else line
    b, n = lax.div(bn, jnp.int32(heads)), lax.rem(bn, jnp.int32(heads))
    own = 0 if counts.shape[0] == 1 else b
    full, some = (counts[own, line, c] * group for c in range(2))
    return cls(b, n, line, full, full + some, tiles, size, group)

  @property
  def numbers(self) -> tuple:
    """All of it that is known at run time only."""
    return self.b, self.n, self.line, self.full, self.visits

  def fold(self, step: Callable, sums: Any, kinds: Any) -> Any:
    """step(masked, t, sums) for its visits, without masks for the first `full`."""
    whole_occurs, some_occurs = occurring(kinds)
    if whole_occurs:
      sums = lax.fori_loop(0, self.full, functools.partial(step, False), sums)
    if some_occurs:
      sums = lax.fori_loop(self.full, self.visits, functools.partial(step, True), sums)
    return sums

  def of(self, ref):
    """The index in an array whose first axis is the batch, or one."""
    return 0 if ref.shape[0] == 1 else self.b

  def head(self, t):
    return self.n * self.group + lax.rem(t, jnp.int32(self.group))

  def tile(self, t):
    """The tokens of the tile of a visit."""
    t = lax.div(t, jnp.int32(self.group))
    at = self.tiles[self.of(self.tiles), self.line, t] * self.size
    return pl.ds(pl.multiple_of(at, self.size), self.size)


def ring(*tiles: Any, readers: int, arrivals: int | None = None) -> tuple:
  """Tiles (stages, ..) that are moved together, and barriers: they are there; they may go."""
  stages = dict(num_barriers=tiles[0].shape[0])
  full = plgpu.Barrier(num_arrivals=arrivals or len(tiles), **stages)
  return tiles, full, plgpu.Barrier(num_arrivals=readers, **stages)


def _slot(ring, t):
  return lax.rem(t, jnp.int32(ring[0][0].shape[0]))


def fill(ring, t, *sources) -> None:
  """Starts to move the tiles of visit t, as soon as nobody reads what lies there.

  A source is one place, or a list of them, one for each warpgroup.
  """
  tiles, full, free = ring
  slot = _slot(ring, t)
  pl.when(t >= tiles[0].shape[0])(lambda: plgpu.barrier_wait(free.at[slot]))
  for tile, source in zip(tiles, sources, strict=True):
    if not isinstance(source, list):
      plgpu.copy_gmem_to_smem(source, tile.at[slot], full.at[slot])
      continue
    for c, part in enumerate(source):
      plgpu.copy_gmem_to_smem(part, tile.at[slot, c], full.at[slot])


def drain(visits, *rings) -> None:
  """Waits until nobody reads any tile that was moved."""
  for ring in rings:
    last = jnp.maximum(visits - ring[0][0].shape[0], 0)
    pl.loop(last, visits)(lambda t: plgpu.barrier_wait(ring[2].at[_slot(ring, t)]))


def ready(t, exists, *rings) -> None:
  """Waits until the tiles of visit t are there, if there is such a visit."""

  @pl.when(exists)
  def _():
    for ring in rings:
      plgpu.barrier_wait(ring[1].at[_slot(ring, t)])


def tiles_of(ring, t) -> list:
  """The tiles of visit t, which must be there."""
  return [tile.at[_slot(ring, t)] for tile in ring[0]]


def wait(ring, t) -> list:
  """The tiles of visit t, once they are there."""
  plgpu.barrier_wait(ring[1].at[_slot(ring, t)])
  return tiles_of(ring, t)


def free(ring, t) -> None:
  plgpu.barrier_arrive(ring[2].at[_slot(ring, t)])


class Turns(NamedTuple):
  """Warpgroups that start products in turn, so that one multiplies while others weigh.

  A turn of a warpgroup is from the sums of a visit to the products of the next. All `take` as many
  as they `give`, between `begin` and `end`.
  """

  barriers: Any
  w: jax.Array
  warpgroups: int

  def give(self) -> None:
    if self.warpgroups > 1:
      plgpu.barrier_arrive(self.barriers.at[lax.rem(self.w + 1, jnp.int32(self.warpgroups))])

  def take(self) -> None:
    if self.warpgroups > 1:
      plgpu.barrier_wait(self.barriers.at[self.w])

  def begin(self) -> None:
    pl.when(self.w == self.warpgroups - 1)(self.give)

  def end(self) -> None:
    pl.when(self.w == 0)(self.take)


def anew(index, *tiles) -> list:
  """Tiles at an index, found anew at every visit.

  The compiler would rather keep the descriptors of all their parts, in registers that sums need.
  """
  index = lax.optimization_barrier(jnp.int32(index))
  return [tile.at[index] for tile in tiles]


def write(*outs) -> None:
  """Moves sums to global memory by way of a tile, for each (tile, sums, place)."""
  for tile, sums, _ in outs:
    tile[...] = sums.astype(tile.dtype)
  plgpu.commit_smem()
  for tile, _, place in outs:
    plgpu.copy_smem_to_gmem(tile, place)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def digits(number, sizes: Sequence[int]) -> list:
  """The index in an array of these sizes, from that in the flat one."""
  found: list = []
  for size in reversed(sizes):
    found.insert(0, lax.rem(number, jnp.int32(size)))
    number = lax.div(number, jnp.int32(size))
  return found


def run(kernel, name: str, blocks: int, warpgroups: int, outs, scratch, interpret, *inputs):
  """Results of a kernel, `outs` being (shape, dtype) of each; they vary as inputs do."""
  arrays = [jnp.asarray(x) for x in inputs]
  out = plgpu.kernel(
    kernel,
    out_type=[jax.ShapeDtypeStruct(*out) for out in outs],
    grid=(blocks,),
    grid_names=("block",),
    num_threads=warpgroups + 1,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=dataclasses.replace(COMPILER, reduction_scratch_bytes=0),
    interpret=interpret or None,
    kernel_name=name,
  )(*arrays)
  return varying(out, arrays)
