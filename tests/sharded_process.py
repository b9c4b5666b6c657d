"""One of several processes that attend together; prints how far each is from one device.

python tests/sharded_process.py HOST:PORT COUNT INDEX DTYPE ...

The last line is JSON: dtype to check to error, of the shards that this process has, relative to 1 +
the size of what one device computes.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import specs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.recurrence import linear
from attnx.sharded import scan
from attnx.sharded.ring import ring_attend
from attnx.sharded.tree import REDUCTIONS, tree_attend
from attnx.sharded.ulysses import ulysses_attend
from attnx.training import processes

B, T, N, K, H = specs.B, 32, 8, 2, 8
PACKED = AttentionSpec(
  masks.Causal() & masks.Window(9) & registry.build("masks", "same_segment")
)  # which reaches over the edges of shards
LEVELS = P(None, ("node", "device"))


def inputs(dtype) -> tuple[np.ndarray, ...]:
  """q, k, v and a decay; the same in every process."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((B, T, n, H)).astype(dtype) for n in (N, K, K))
  return q, k, v, -rng.uniform(0, 0.3, (B, T, N, 1)).astype(dtype)


def mesh(*names: str) -> Mesh:
  """All devices of all processes: in a row, or a row for each of two nodes."""
  return Mesh(np.array(jax.devices()).reshape((2, -1) if len(names) == 2 else -1), names)


def place(tree, over: Mesh, layout: P):
  """Arrays that every process has, as arrays of which each keeps its shards."""
  here = NamedSharding(over, layout)
  one = lambda x: jax.make_array_from_callback(x.shape, here, lambda index: x[index])
  return jax.tree.map(lambda x: one(np.asarray(x)), tree)


def distance(actual, expected) -> float:
  """The largest error of the shards here; those of other processes are theirs to look at."""
  worst = 0.0
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    y = np.asarray(y)
    assert x.shape == y.shape and x.dtype == y.dtype
    assert not x.is_fully_addressable, "this took one process"
    for shard in x.addressable_shards:
      part = y[shard.index]
      worst = max(worst, float((np.abs(np.asarray(shard.data) - part) / (1 + np.abs(part))).max()))
  return worst


@functools.cache
def with_gradients(function):
  """Outputs, and gradients of a sum of their cosines."""

  def run(arrays, *rest):
    out = function(*arrays, *rest)
    return jnp.cos(out).sum(), out

  return jax.jit(jax.grad(run, has_aux=True))


@functools.cache
def call(function):
  """Outputs."""
  return jax.jit(lambda arrays, *rest: function(*arrays, *rest))


def tokens() -> Tokens:
  """Two documents in a row and padding in one row, as whole arrays."""
  where = specs.packed(T)
  return jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (B, T)), where)


def alone(q, k, v, where):
  return attend(q, k, v, PACKED, q_tokens=where, k_tokens=where, implementation="reference")


def tree(arrays, reduction: str, layout: P) -> float:
  """Whole queries, keys over one or two axes of the mesh."""
  names = layout[1] if isinstance(layout[1], tuple) else (layout[1],)
  over = mesh(*names)
  function = lambda q, k, v, at, there: tree_attend(
    q, k, v, PACKED, q_tokens=at, k_tokens=there, axis_names=names[::-1], reduction=reduction
  )
  run = jax.shard_map(
    function, mesh=over, in_specs=(P(), layout, layout, P(), layout), out_specs=P(),
    check_vma=reduction == "all_reduce",
  )  # fmt: skip
  q, k, v = arrays
  given = (*place((q,), over, P()), *place((k, v), over, layout))
  out = jax.jit(run)(*given, place(tokens(), over, P()), place(tokens(), over, layout))
  return distance(out, call(alone)(arrays, tokens()))


def exchanged(arrays, function, gradients: bool) -> float:
  """Queries and keys over all devices."""
  over, layout = mesh("keys"), P(None, "keys")
  run = jax.shard_map(
    lambda q, k, v, at: function(q, k, v, PACKED, q_tokens=at, k_tokens=at, axis_name="keys"),
    mesh=over, in_specs=(layout,) * 4, out_specs=layout,
  )  # fmt: skip
  one, many = (with_gradients(f) if gradients else call(f) for f in (alone, run))
  actual = many(place(arrays, over, layout), place(tokens(), over, layout))
  return distance(actual, one(arrays, tokens()))


def recurrent(arrays) -> float:
  """A state that goes from process to process."""
  over, layout = mesh("tokens"), P(None, "tokens")
  segment = np.sort(np.random.default_rng(1).integers(0, 3, (B, T)), axis=1)
  one = lambda q, k, v, decay, segment: linear.linear_attention(
    q, k, v, decay, segment=segment, chunk=4
  )[0]
  many = jax.shard_map(
    lambda q, k, v, decay, segment: scan.linear_attention(
      q, k, v, decay, segment=segment, chunk=4, axis_name="tokens"
    )[0],
    mesh=over, in_specs=(layout,) * 5, out_specs=layout,
  )  # fmt: skip
  actual = call(many)(place(arrays, over, layout), place(segment, over, layout))
  return distance(actual, call(one)(arrays, segment))


whole = functools.partial(
  ulysses_attend, inside=functools.partial(attend, implementation="reference")
)


def checks(dtype: str) -> dict[str, float]:
  q, k, v, decay = inputs(dtype)
  repeated = [np.repeat(x, N // K, axis=2) for x in (k, v)]
  found = {}
  for reduction in REDUCTIONS:
    found[f"tree, {reduction}"] = tree((q, k, v), reduction, P(None, "keys"))
    found[f"tree of two levels, {reduction}"] = tree((q, k, v), reduction, LEVELS)
  found["ring"] = exchanged((q, k, v), ring_attend, gradients=True)
  found["ulysses"] = exchanged((q, k, v), whole, gradients=False)
  found["recurrence"] = recurrent((q, *repeated, decay))
  return found


def main(coordinator: str, count: int, index: int, dtypes: list[str]) -> None:
  jax.config.update("jax_enable_x64", True)
  with processes.guarded(coordinator, count, index, program="sharded_process", lost=lambda: "so"):
    assert jax.process_count() == count
    told = {dtype: checks(dtype) for dtype in dtypes}
  print(json.dumps(dict(devices=jax.device_count(), errors=told)))


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
