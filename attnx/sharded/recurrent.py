"""Recurrences of whole arrays over a mesh: which axes of which array go where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import inspect
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
import jax.numpy as jnp

from attnx.core.varying import together
from attnx.recurrence import convolution, delta, diagonal, linear
from attnx.sharded import scan
from attnx.sharded.rules import ROWS, SEQ, TENSOR, rows


class Recurrence(NamedTuple):
  """How arrays of a function of `attnx.recurrence` lie: B rows, T tokens, N heads, others whole.

  Attributes:
    over: the function of `sharded.scan` that is the same for shards.
    arguments: what the last axes of each array are, the first of which is (B, T, ...); of two
      readings that of as many axes.
    outputs: what the axes of the outputs are.
  """

  over: Callable
  arguments: Mapping[str, str | tuple[str, str]]
  outputs: Any


HEADS: dict[str, Any] = dict(
  q="BTNH", k="BTNH", v="BTNH", log_decay="BTNH", state="BNHV", segment="BT"
)
RECURRENCES: dict[Any, Recurrence] = {
  linear.linear_attention: Recurrence(
    scan.linear_attention, HEADS | dict(bonus="NH"), ("BTNV", "BNHV")
  ),
  delta.delta_rule: Recurrence(
    scan.delta_rule, HEADS | dict(beta="BTN", log_decay=("BTNH", "BTN")), ("BTNV", "BNHV")
  ),
  diagonal.diagonal_scan: Recurrence(
    scan.diagonal_scan, dict(b="BT...", a="BT...", state="B...", segment="BT"), ("BT...", "B...")
  ),
  convolution.long_convolution: Recurrence(
    scan.long_convolution, dict(x="BTD", kernel="LD", segment="BT"), "BTD"
  ),
}


def recurrence(mesh: Mesh, function: Callable, how: Recurrence, *args: Any, **kwargs: Any) -> Any:
  """A function of `attnx.recurrence` of whole arrays, over a mesh."""
  given = inspect.signature(function).bind(*args, **kwargs).arguments
  arrays = {
    name: jnp.asarray(x) for name, x in given.items() if name in how.arguments and x is not None
  }
  options = {name: x for name, x in given.items() if name not in how.arguments}
  alone = functools.partial(inspect.unwrap(function), **options)
  like = arrays[next(iter(how.arguments))]
  size, parts = mesh.shape[SEQ], mesh.shape[TENSOR]
  channels = like.shape[2] if how.over is scan.long_convolution else size  # that are exchanged
  if like.shape[1] % size or channels % size:
    return alone(**arrays)
  split: dict[str, Any] = dict(T=SEQ) if size > 1 else {}
  if like.shape[0] % rows(mesh) == 0:
    split["B"] = ROWS
  if not any(arrays[name].shape[2] % parts for name in "qkv" if name in arrays):
    split["N"] = TENSOR

  def place(layout: Any, x: Any) -> PartitionSpec:
    layout = layout if isinstance(layout, str) else layout[x.ndim == len(layout[1])]
    axes = layout.replace("...", "." * (like.ndim - 2))[-x.ndim :]
    return PartitionSpec(*(split.get(axis) if n > 1 else None for axis, n in zip(axes, x.shape)))

  def body(arrays):
    arrays = together(arrays)
    if size == 1:
      return alone(**arrays)
    out = how.over(**arrays, **options, axis_name=SEQ)
    if isinstance(how.outputs, str):
      return out
    last = jax.lax.axis_index(SEQ) == size - 1
    return out[0], jax.lax.psum(jnp.where(last, out[1], 0), SEQ)

  run = jax.shard_map(
    body,
    mesh=mesh,
    in_specs=({name: place(how.arguments[name], x) for name, x in arrays.items()},),
    out_specs=jax.tree.map(
      lambda layout: PartitionSpec(*(split.get(axis) for axis in layout.rstrip("."))), how.outputs
    ),
  )
  return run(arrays)
