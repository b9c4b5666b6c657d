"""What compiled programs send and hold, beside the formulas: exact, nothing is run.

python -m experiments.tree_vs_ring.exact [--topology v5e] [--topology v5p]

Host devices always; chips of a topology where libtpu is installed (`jax[tpu]`, no TPU is wanted).
"""

from __future__ import annotations

import argparse
import math
import os

import jax
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp

from experiments.tree_vs_ring import formulas, hlo, report, rings

SIZES = (2, 4, 8, 16, 32, 64)
SHAPE = dict(B=1, N=32, K=8, H=128, t=65536)
CHIPS = {
  "v5e": {2: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"},
  "v5p": {2: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
}


def prepare() -> None:
  """64 host devices, and what libtpu wants to be told where there is no TPU; before all else."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(SIZES))
  os.environ |= dict(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
                     TPU_ACCELERATOR_TYPE="v5litepod-4")  # fmt: skip


def devices_of(where: str, size: int):
  if where == "host":
    return jax.devices()[:size]
  name = f"{where}:{CHIPS[where][size]}"
  return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:size]


def compiled(name: str, devices, *, dtype, B: int, N: int, K: int, H: int, t: int):
  """The strategy, compiled for the devices."""
  size = len(devices)
  mesh = rings.mesh_of(devices, per_node=size)
  place = lambda spec: jax.NamedSharding(mesh, spec)
  like = lambda shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=place(spec))
  keys = like((B, size * t, K, H), P(None, rings.AXES))
  return jax.jit(rings.decode(name, mesh)).lower(like((B, 1, N, H), P()), keys, keys).compile()


def cost(program, size: int) -> dict[str, float]:
  """Steps one after the other, bytes that a device sends, and temporary bytes that it holds.

  Permutes of like sizes in one place go side by side: a hop of keys and of values is a step. An
  all-reduce counts as the ceil(log2 P) steps of a tree.
  """
  found = hlo.collectives(program.as_text())
  if unknown := {c.op for c in found} - {"collective-permute", "all-reduce"}:
    raise ValueError(f"unexpected collectives: {unknown}")
  reduces = [c for c in found if c.op == "all-reduce"]
  permutes = [c for c in found if c.op == "collective-permute"]
  share = 2 * (size - 1) / size
  return dict(
    steps=len(reduces) * math.ceil(math.log2(size)) + sum(c.times for c in permutes),
    sent=share * sum(c.size for c in reduces) + sum(c.size * c.times for c in permutes),
    temporary=program.memory_analysis().temp_size_in_bytes,
  )


def costs(where: str, size: int, *, dtype, **shape) -> dict[str, dict[str, float]]:
  """Of each strategy; the steps and bytes are checked to be those of the formulas."""
  found = {}
  devices = devices_of(where, size)
  for name, formula in formulas.FORMULAS.items():
    found[name] = cost(compiled(name, devices, dtype=dtype, **shape), size)
    if name == "ring of keys":
      found[name]["steps"] /= 2  # keys and values
    steps, sent = formula(size, itemsize=jnp.dtype(dtype).itemsize, **shape)
    expected = dict(found[name], steps=steps, sent=sent)
    assert found[name] == expected, (where, size, name, found[name], expected)
  tree, ring = (found[name]["temporary"] for name in ("tree, butterfly", "ring of keys"))
  message = formulas.partial_bytes(shape["B"], shape["N"], shape["H"])
  assert 2 * tree <= ring + message, (where, size, tree, ring)
  assert found["tree, butterfly"]["steps"] <= math.ceil(math.log2(size))
  return found


def main() -> None:
  prepare()
  parser = argparse.ArgumentParser()
  parser.add_argument("--topology", action="append", choices=CHIPS, default=[])
  results = {}
  for where in ("host", *parser.parse_args().topology):
    dtype = jnp.float32 if where == "host" else jnp.bfloat16
    results[where] = {size: costs(where, size, dtype=dtype, **SHAPE) for size in SIZES}
    for size, found in results[where].items():
      print(where, size, found, flush=True)
  report.save("exact", dict(shape=SHAPE, **results))


if __name__ == "__main__":
  main()
