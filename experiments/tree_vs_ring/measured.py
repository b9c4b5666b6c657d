"""Seconds for a decoded token, on machines that a network with delays joins.

sudo python -m experiments.tree_vs_ring.measured [--quick]

Every machine is a process in a network namespace of its own; JAX joins them by gloo.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time

from experiments.tree_vs_ring import report
from experiments.tree_vs_ring.network import Network, address

KEYS, K, H = 16384, 8, 64  # of each machine, bfloat16
FEW = 64  # keys of a shard that are attended to where the network is what is measured
BUTTERFLY, ALL_REDUCE, PARTIALS, RING = (
  "tree, butterfly", "tree, all-reduce", "ring of partials", "ring of keys"
)  # fmt: skip
FLAT = (BUTTERFLY, ALL_REDUCE, PARTIALS, RING)
LEVELS = (BUTTERFLY, ALL_REDUCE, "two levels, butterfly", "two levels, all-reduce", PARTIALS)


@dataclasses.dataclass(frozen=True)
class Setting:
  """A network, and what is decoded on it."""

  delay_ms: float
  gbit: float
  strategies: tuple[str, ...] = FLAT
  across_ms: float | None = None
  per_node: int = 0  # 0: all on one
  query_heads: int = 8
  keys: int = KEYS
  attended: int = FEW
  repeats: int = 5


def settings(size: int, quick: bool) -> list[Setting]:
  """All that is measured with `size` machines."""
  delays = (1.0,) if quick else (0.0, 0.1, 1.0, 5.0)
  chosen = [Setting(delay, 10) for delay in delays]
  if quick:
    return chosen
  chosen += [Setting(delay, 1, repeats=3) for delay in (0.1, 1.0, 5.0)]
  chosen += [Setting(1, 10, keys=keys, strategies=(BUTTERFLY, RING)) for keys in (64, 1024, 4096)]
  chosen += [Setting(1, 10, query_heads=32)]
  chosen += [Setting(1, 10, attended=KEYS, repeats=5)]
  chosen += [Setting(0.1, 10, across_ms=5, per_node=size // 2, strategies=LEVELS)]
  return chosen


class Machine:
  """One process of the group, in its namespace."""

  def __init__(self, rank: int, size: int) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"{address(0)}:9000", size, rank)
    self.rank, self.size, self.compiled = rank, size, {}

  def array(self, shape: tuple[int, ...], mesh, spec, seed: int):
    import jax
    import jax.numpy as jnp

    draw = lambda: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    return jax.jit(draw, out_shardings=jax.NamedSharding(mesh, spec))()

  def program(self, name: str, s: Setting):
    """The compiled strategy with its keys: a function of the query, which is an output's like."""
    import jax
    from jax.sharding import PartitionSpec as P

    from experiments.tree_vs_ring import rings

    at = (name, s.per_node if "two" in name else 0, s.query_heads, s.keys, s.attended)
    if at not in self.compiled:
      mesh = rings.mesh_of(jax.devices(), s.per_node or self.size)
      whole, sharded = P(), P(None, rings.AXES)
      q = self.array((1, 1, s.query_heads, H), mesh, whole, 0)
      k, v = (self.array((1, s.keys * self.size, K, H), mesh, sharded, i) for i in (1, 2))
      run = jax.jit(rings.decode(name, mesh, attended=s.attended)).lower(q, k, v).compile()
      self.compiled[at] = lambda tokens: self.chain(run, q, k, v, tokens)
    return self.compiled[at]

  def chain(self, run, q, k, v, tokens: int):
    """Each token is attended to with the output for the one before it."""
    for _ in range(tokens):
      q = run(q, k, v)
    return q.block_until_ready()

  def measure(self, s: Setting) -> dict[str, float]:
    """Median seconds of a token by each strategy, which take turns."""
    import numpy as np

    runs = {name: self.program(name, s) for name in s.strategies}
    outs = {name: np.asarray(run(1).addressable_data(0), np.float32) for name, run in runs.items()}
    for out in outs.values():
      np.testing.assert_allclose(out, outs[s.strategies[0]], atol=0.02)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(s.repeats):
      for name, run in runs.items():
        tokens = 1 if name == RING or s.attended > FEW else 10
        runs[BUTTERFLY](1)  # all begin together
        begin = time.perf_counter()
        run(tokens)
        seconds[name].append((time.perf_counter() - begin) / tokens)
    return {name: statistics.median(times) for name, times in seconds.items()}


def work(rank: int, size: int) -> None:
  """A machine's process: measures what it is told on standard input, a setting a line."""
  machine = Machine(rank, size)
  print({}, flush=True)
  for line in sys.stdin:
    fields = json.loads(line)
    s = Setting(**fields | {"strategies": tuple(fields["strategies"])})
    print(json.dumps(machine.measure(s)), flush=True)


def answer(process: subprocess.Popen) -> dict[str, float]:
  """What a machine says next; gloo writes to standard output too."""
  line = next((line for line in process.stdout if line.startswith("{")), None)
  if line is None:
    raise RuntimeError(f"a machine ended: {process.args}")
  return json.loads(line)


def measure(size: int, quick: bool) -> list[dict]:
  """Results of all settings with `size` machines."""
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "GLOG_minloglevel": "2"}
  found = []
  with Network(size) as network:
    network.shape(0, 0 if network.kind == "relay" else 100)
    processes = []
    for rank in range(size):
      words = [sys.executable, "-m", "experiments.tree_vs_ring.measured"]
      command = network.command(rank, [*words, "--rank", str(rank), "--size", str(size)])
      process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
      )
      processes.append(process)
      network.callback(process.wait)
      network.callback(process.kill)
    ready = [answer(process) for process in processes]
    assert ready == [{}] * size, "a machine did not come up"
    for s in settings(size, quick):
      if s.across_ms is not None and network.kind != "relay":
        continue
      network.shape(s.delay_ms, s.gbit, across_ms=s.across_ms, per_node=s.per_node or size)
      for process in processes:
        process.stdin.write(json.dumps(dataclasses.asdict(s)) + "\n")
        process.stdin.flush()
      seconds, *_ = [answer(process) for process in processes]
      print(size, s, {name: f"{1e3 * t:.2f} ms" for name, t in seconds.items()}, flush=True)
      found.append(dict(machines=size, network=network.kind, **dataclasses.asdict(s),
                        seconds=seconds))  # fmt: skip
  return found


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--rank", type=int)
  parser.add_argument("--size", type=int, nargs="*", default=[4, 8])
  arguments = parser.parse_args()
  if arguments.rank is not None:
    return work(arguments.rank, arguments.size[0])
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # namespaces go on this exit too
  found = [result for size in arguments.size for result in measure(size, arguments.quick)]
  if not arguments.quick:
    report.save("measured", found)


if __name__ == "__main__":
  main()
