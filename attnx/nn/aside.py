"""What training does beside following the gradient: losses that modules add, averages that move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

Sums = dict[tuple[Any, ...], jax.Array]  # by path of an average: what a batch adds to it


class Loss(nnx.Variable):
  """A term that a module adds to the loss, by `aside`."""


class Average(nnx.Variable):
  """x <- decay x + (1 - decay) s after each step, s being the sum over the batch of what was sown.

  No gradient moves it. Its module sows s by `aside`, under the name of the average.
  """

  decay = 0.99


def aside(module: nnx.Module, kind: type[nnx.Variable], name: str, value: jax.Array) -> None:
  """Sows a `Loss` or what an `Average` moves by; of several calls, the sum.

  A module that does this says `learns_aside = True`, so that a stack that would lose it refuses.
  """
  module.sow(kind, name, value, reduce_fn=jnp.add, init_fn=lambda: 0.0)


def learns_aside(model: nnx.Module) -> bool:
  """Whether some module of the model adds a loss or moves an average."""
  return any(getattr(module, "learns_aside", False) for _, module in nnx.iter_modules(model))


def with_asides(
  function: Callable[[nnx.Module], Any], model: nnx.Module
) -> tuple[Any, jax.Array, Sums]:
  """What a function of a model returns, the sum of the losses sown meanwhile, and of averages."""
  if not learns_aside(model):
    return function(model), jnp.zeros(()), {}
  captured: Any = nnx.capture(function, Loss, Average)(nnx.clone(model))
  output, losses, averages = captured
  total = sum(map(jnp.sum, jax.tree.leaves(losses)), jnp.zeros(()))
  return output, total, {path: s[...] for path, s in nnx.to_flat_state(averages)}


def moved(state: nnx.State, sums: Sums) -> nnx.State:
  """The state after a step, with its averages moved."""
  flat = dict(nnx.to_flat_state(state))
  for path, s in sums.items():
    average = flat[path]
    flat[path] = average.replace(average.decay * average[...] + (1 - average.decay) * s)
  return nnx.from_flat_state(flat)
