"""What a ring sends travels while it attends: the order that the compiler for TPUs chose, read."""

import re
import sys

import ahead
import jax
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, masks
from attnx.core.tokens import Tokens
from attnx.sharded.ring import ring_attend

SHARD, TOPOLOGY = 512, "v5p:2x2x4"
COMPUTATION = re.compile(r"(?:ENTRY )?%\S+ .*\{$")
CALL = re.compile(
  r"\s+(?:ROOT )?(\S+) = (.+?) "
  r"(collective-permute-start|collective-permute-done|while)\((\S+?)[,)]"
)


def compile_ahead(*, gradient: bool) -> str:
  """The scheduled program of a ring of 16 chips; runs where libtpu is, without a TPU."""
  devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices)
  mesh = jax.sharding.Mesh(devices, ("ring",), axis_types=(jax.sharding.AxisType.Auto,))
  shards = P(None, "ring")
  ring = jax.shard_map(
    lambda q, k, v, at: ring_attend(
      q, k, v, AttentionSpec(masks.Causal()), q_tokens=at, k_tokens=at, axis_name="ring"
    ),
    mesh=mesh, in_specs=shards, out_specs=shards,
  )  # fmt: skip
  loss = lambda *qkv_at: ring(*qkv_at).astype(jnp.float32).sum()
  place = jax.NamedSharding(mesh, shards)
  length = SHARD * devices.size
  x = jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16, sharding=place)
  at = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), Tokens.of_length(length)
  )
  run = jax.grad(loss, (0, 1, 2)) if gradient else ring
  return jax.jit(run).lower(x, x, x, at).compile().as_text()


def hops(text: str) -> list[tuple[str, int]]:
  """Of each hop of keys or of their gradients: its computation, and the loops that it spans.

  A loop here is one over the tiles of a shard: such a computation holds no other.
  """
  found, flying, computation = [], {}, ""
  for line in text.splitlines():
    if COMPUTATION.match(line):
      computation, flying = line.split()[0], {}
    if not (call := CALL.match(line)):
      continue
    name, kind, op, operand = call.groups()
    if op == "collective-permute-start":
      flying[name] = [computation, 0, f"{SHARD},8,128]" in kind]
    elif op == "while":
      for hop in flying.values():
        hop[1] += 1
    else:
      computation, loops, large = flying.pop(operand)
      found += [(computation, loops)] if large else []
  return found


@pytest.mark.libtpu
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_hops_span_the_tiles_of_a_shard(gradient):
  found = hops(ahead.run(__file__, *["gradient"] * gradient))
  # of keys: the first hop, and one in the loop; of gradients, in the loop and after it, then home
  assert len(found) == (2 + 2) * 2 + 2 * 3 if gradient else len(found) == 2 * 2
  waits = [computation for computation, loops in found if not loops]
  assert waits == (["ENTRY"] * 2 if gradient else [])  # the last hop, home, has nothing to hide it


def test_the_reader_of_schedules_sees_a_hop_that_waits():
  start, done = "collective-permute-start", "collective-permute-done"
  shape = f"bf16[1,1,{SHARD},8,128]"
  text = [
    "%body (x: f32[]) -> f32[] {",
    f"  %s = ({shape}, {shape}) {start}(%k), channel_id=1",
    f"  %d = {shape} {done}(%s)",
    "  %w = (s32[]) while(%t), condition=%c, body=%b",
    "}",
    "ENTRY %main (x: f32[]) -> f32[] {",
    f"  %s.1 = ({shape}, {shape}) {start}(%k), channel_id=1",
    "  %w.1 = (s32[]) while(%t.1), condition=%c, body=%b",
    f"  ROOT %d.1 = {shape} {done}(%s.1)",
    "}",
  ]
  assert hops("\n".join(text)) == [("%body", 0), ("ENTRY", 1)]


if __name__ == "__main__":
  print(compile_ahead(gradient="gradient" in sys.argv))
