"""Named cases for `python -m pallas_kernels.aot`: kernels of this package at sizes worth reading.

A case returns (fn, shapes): what to compile, and a jax.ShapeDtypeStruct for each of its arguments.
Its parameters have defaults, and the command line may set them. To add one, write a function under
`@case("kernel.variant.direction")`; import the kernel inside it, so that listing the names imports
none.

  @case("streaming.full.forward")
  def streaming_full_forward(block_q=512):
    from pallas_kernels.tpu import streaming

    fn = functools.partial(streaming.forward, block_q=block_q)
    return fn, [jax.ShapeDtypeStruct((8, 4096, 128), jnp.bfloat16)] * 3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Case = Callable[..., tuple[Callable[..., Any], Any]]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
  """Registers the decorated function under `name`; raises ValueError where the name is taken."""

  def register(make: Case) -> Case:
    if name in CASES:
      raise ValueError(f"the case {name!r} is registered already, by {CASES[name].__module__}")
    CASES[name] = make
    return make

  return register


def attention(kernel: str, H: int, V: int, dtype: str, options: dict[str, Any], **edits: Any):
  """A streaming kernel with softmax: 8 heads, T = S = 4096, blocks by options."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from pallas_kernels.algebra import softmax
  from pallas_kernels.tpu import backward, streaming
  from pallas_kernels.tpu.walk import Blocks
  from pallas_kernels.visits import FULL

  blocks, T, N = Blocks(**options), 4096, 8
  kinds = np.full((1, T // blocks.q, T // blocks.k), FULL, np.int32)
  shape = lambda *shape, dtype=jnp.dtype(dtype): jax.ShapeDtypeStruct(shape, dtype)
  side = shape(1, 3, T, dtype=jnp.int32)
  shapes = [shape(1, N, T, H), shape(1, N, T, H), shape(1, N, T, V), side, side]
  if kernel != "forward":
    shapes += [shape(1, N, 8, T, dtype=jnp.float32), shape(1, N, T, V)]

  def run(q, k, v, q_side, k_side, *told):
    how = dict(algebra=softmax(H**-0.5, **edits), blocks=blocks)
    of = streaming.forward if kernel == "forward" else backward.gradients
    return of(q, k, v, q_side, k_side, (), kinds, *told, **how)

  return run, shapes


@case("streaming.softmax.forward")
def streaming_forward(H: int = 128, V: int = 128, dtype: str = "bfloat16", **blocks):
  return attention("forward", H, V, dtype, blocks)


@case("streaming.softmax.backward")
def streaming_backward(H: int = 128, V: int = 128, dtype: str = "bfloat16", **blocks):
  return attention("gradients", H, V, dtype, blocks)
