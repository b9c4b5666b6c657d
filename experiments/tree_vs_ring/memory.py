"""Bytes on each of 64 v5p chips for the attention of a decode step over 2^20 cached tokens.

python -m experiments.tree_vs_ring.memory        # jax[tpu] is wanted, a TPU is not

The cache is that of Llama-3-8B: 32 layers, 8 key heads of width 128, bfloat16; 32 query heads. A
scan over the layers attends to each one's cache; the query of a layer is the output of the one
before it, as projections and weights are no part of this. Compiled ahead of time; nothing is run.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp

from experiments.tree_vs_ring import exact, report, rings

LAYERS, TOKENS, N, K, H = 32, 2**20, 32, 8, 128
TOPOLOGY, CHIPS, HBM = "v5p", 64, 95 * 2**30
NAMES = ("tree, butterfly", "tree, all-reduce", "ring of keys")


def step(name: str, batch: int, mesh: jax.sharding.Mesh):
  """All layers' attention of one token, compiled."""
  cache = P(None, None, rings.AXES)
  like = lambda shape, spec: jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec)
  )
  keys = like((LAYERS, batch, TOKENS, K, H), cache)
  attend = rings.decode(name, mesh)

  def layers(query, key, value):
    return jax.lax.scan(lambda q, kv: (attend(q, *kv), None), query, (key, value))[0]

  return jax.jit(layers).lower(like((batch, 1, N, H), P()), keys, keys).compile()


def main() -> None:
  exact.prepare()
  mesh = rings.mesh_of(exact.devices_of(TOPOLOGY, CHIPS), per_node=CHIPS)
  found = {}
  for batch in (1, 8, 32):
    for name in NAMES:
      m = step(name, batch, mesh).memory_analysis()
      parts = dict(arguments=m.argument_size_in_bytes, outputs=m.output_size_in_bytes,
                   temporary=m.temp_size_in_bytes)  # fmt: skip
      found[f"{name}, B={batch}"] = parts
      print(name, batch, parts, f"{sum(parts.values()) / HBM:.2%}", flush=True)
      assert name == NAMES[-1] or sum(parts.values()) < HBM
  report.save("memory", found)


if __name__ == "__main__":
  main()
