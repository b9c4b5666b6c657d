"""Blocks one after the other: each by itself, or as one scan over stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import nnx
import jax

from attnx.nn.aside import Loss, learns_aside
from attnx.nn.block import Block
from attnx.nn.mixer import observed

POLICIES = {
  "nothing": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_without_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nnx.Module):
  """blocks[depth - 1](... blocks[0](x)).

  Args:
    make: (index, rngs) to a block.
    depth: number of blocks.
    period: blocks repeat with this period, as hybrids do; only a scan wants to know.
    scan: compile one period and scan it over stacked parameters: compile time and code size then do
      not grow with the depth, and `observe` does not look inside.
    remat: what the backward pass keeps of a block: None for everything, else one of `POLICIES`.
  """

  def __init__(
    self,
    make: Callable[[int, nnx.Rngs], Block],
    depth: int,
    *,
    period: int = 1,
    scan: bool = False,
    remat: str | None = None,
    rngs: nnx.Rngs,
  ):
    if depth < 1:
      raise ValueError(f"depth={depth} must be at least 1")
    if remat is not None and remat not in POLICIES:
      raise ValueError(f"remat={remat!r} must be None or one of {', '.join(POLICIES)}")
    if scan and depth % period:
      raise ValueError(f"depth={depth} must be a multiple of the {period} mixers to be scanned")
    self.scan, self.remat = scan, remat
    if not scan:
      self.blocks = nnx.List([make(i, rngs) for i in range(depth)])
      return
    self.times = depth // period
    group = lambda rngs: nnx.List([make(i, rngs) for i in range(period)])
    graph = nnx.split(nnx.eval_shape(lambda: group(nnx.Rngs(0))))[0]
    stacked = jax.vmap(lambda key: nnx.split(group(nnx.Rngs(key)))[1])(
      jax.random.split(rngs.params(), self.times)
    )
    self.blocks = nnx.merge(graph, stacked)

  def __call__(self, x: jax.Array, *, key: jax.Array | None = None, **options: Any) -> jax.Array:
    """(B, T, D) to (B, T, D); `options` are those of a block."""
    if self.scan and observed(self):
      raise NotImplementedError(
        "a scanned stack cannot be looked into; build it with scan=False, or unroll it"
      )
    if (self.scan or self.remat) and observed(self, Loss) and learns_aside(self):
      raise NotImplementedError(
        "a block here learns aside of the gradient, which a stack with"
        f" scan={self.scan} and remat={self.remat!r} would lose; give scan=False and remat=None"
      )

    def run(x, i, block):
      call = lambda block, x: block(
        x, key=None if key is None else jax.random.fold_in(key, i), **options
      )
      if self.remat is not None and not observed(self):  # what it sows would be lost
        call = jax.checkpoint(call, policy=POLICIES[self.remat])
      return call(block, x)

    if not self.scan:
      for i, block in enumerate(self.blocks):
        x = run(x, i, block)
      return x

    graph, state = nnx.split(self.blocks)
    period = len(self.blocks)

    def body(x, of):
      i, state = of
      for j, block in enumerate(nnx.merge(graph, state)):
        x = run(x, i * period + j, block)
      return x, None

    return jax.lax.scan(body, x, (jax.numpy.arange(self.times), state))[0]

  def init_cache(self, batch: int, length: int, **options: Any) -> Sequence[Any]:
    """A cache for each block; of a scan, one for each block of a period, stacked."""
    make = lambda blocks: [block.init_cache(batch, length, **options) for block in blocks]
    if not self.scan:
      return make(self.blocks)
    graph, state = nnx.split(self.blocks)
    return jax.vmap(lambda state: make(nnx.merge(graph, state)))(state)

  def step(self, x: jax.Array, caches: Sequence[Any], **options: Any):
    """The next t tokens (B, t, D), and the caches after them."""

    def through(blocks, x, caches):
      after = []
      for block, cache in zip(blocks, caches, strict=True):
        x, cache = block.step(x, cache, **options)
        after.append(cache)
      return x, after

    if not self.scan:
      return through(self.blocks, x, caches)
    graph, state = nnx.split(self.blocks)
    body = lambda x, of: through(nnx.merge(graph, of[0]), x, of[1])
    return jax.lax.scan(body, x, (state, caches))


def pattern(mixers: Sequence[Any]) -> Callable[[int], Any]:
  """Index of a block to its mixer: they repeat in order."""
  mixers = [mixers] if isinstance(mixers, str) or hasattr(mixers, "keys") else list(mixers)
  if not mixers:
    raise ValueError("mixers=() names no mixer")
  return functools.partial(lambda mixers, i: mixers[i % len(mixers)], mixers)
