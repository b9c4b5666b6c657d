"""Versions and devices, the peak rate of the chips, and the work of a step."""

from __future__ import annotations

import math
import platform
import time
from typing import Any

import flax
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

PEAKS = {  # bfloat16 FLOP/s of one device, from the vendors' data sheets
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 1153.5e12,  # one of the two chiplets, which JAX calls a device
  "A100": 312e12,
  "H100": 989e12,
  "H200": 989e12,
  "B200": 2250e12,
}


def describe() -> dict[str, Any]:
  """Versions and devices."""
  versions = {"python": platform.python_version(), "jax": jax.__version__}
  return versions | {
    "flax": flax.__version__,
    "numpy": np.__version__,
    "platform": platform.platform(),
    "devices": [f"{d} ({d.device_kind})" for d in jax.devices()],
    "processes": jax.process_count(),
  }


def peak() -> float | None:
  """FLOP/s of all devices together: of a table, or measured on the CPU; None if unknown."""
  kind = jax.devices()[0].device_kind
  if jax.default_backend() != "cpu":
    known = [name for name in PEAKS if name in kind]
    return PEAKS[max(known, key=len)] * jax.device_count() if known else None
  x = jnp.ones((1024, 1024))
  multiply = jax.jit(jnp.dot)
  multiply(x, x).block_until_ready()
  seconds = math.inf
  for _ in range(3):
    begin = time.perf_counter()
    multiply(x, x).block_until_ready()
    seconds = min(seconds, time.perf_counter() - begin)
  return 2 * 1024**3 / seconds * jax.process_count()


def flops(jaxpr: core.Jaxpr) -> float:
  """Multiplications and additions of every matrix product and convolution of a traced function.

  A loop counts as often as it runs where that is known; of branches, the dearest.
  """
  total = 0.0
  eqns: Any = jaxpr.eqns
  for eqn in eqns:
    inner = [flops(sub) for value in eqn.params.values() for sub in jaxprs(value)]
    match eqn.primitive.name:
      case "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        width = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        total += 2 * width * eqn.outvars[0].aval.size
      case "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        total += 2 * eqn.outvars[0].aval.size * kernel.size / outputs
      case "scan":
        total += eqn.params["length"] * sum(inner)
      case "cond":
        total += max(inner)
      case "pallas_call":
        total += math.prod(eqn.params["grid_mapping"].grid) * sum(inner)
      case _:
        total += sum(inner)
  return total


def jaxprs(value: Any) -> list[core.Jaxpr]:
  """The jaxprs in a parameter of an equation."""
  match value:
    case core.ClosedJaxpr():
      return [value.jaxpr]
    case core.Jaxpr():
      return [value]
    case tuple() | list():
      return [jaxpr for part in value for jaxpr in jaxprs(part)]
  return []
