"""Copies of a model that do one thing differently: interventions are compositions, not hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec
from attnx.attention.transforms import Transform
from attnx.core import registry
from attnx.nn.combiner import Combiner
from attnx.nn.stack import Stack


def replaced(model: nnx.Module, path: str, wrap: Callable[[Any], Any]) -> nnx.Module:
  """A copy of a model in which `wrap(submodule)` takes the place of the submodule at `path`.

  Example:
    >>> copy = replaced(model, "stack/blocks/2/mixer", Quietened)     # doctest: +SKIP

  Args:
    model: left as it is; the copy shares its arrays.
    path: attributes and indices, as in the paths of `observe`; "" is the model.
    wrap: submodule to the module that takes its place; it may keep the submodule or write to it.

  Raises:
    KeyError: there is nothing at `path`.
    TypeError: what `wrap` gives is no module, and would not be a part of the copy as a pytree.
    NotImplementedError: `path` leads into a scanned stack, which holds many layers as one.
  """
  copy = nnx.clone(model)
  *above, child = walk(copy, path)
  new = wrap(child)
  if not isinstance(new, nnx.Module):
    raise TypeError(f"wrap gave a {type(new).__name__} for {path!r}; expected an nnx.Module")
  if not above:
    return new
  parent, last = above[-1], path.rpartition("/")[2]
  if isinstance(parent, nnx.List):
    parent[int(last)] = new
  else:
    setattr(parent, last, new)
  return copy


def walk(model: nnx.Module, path: str) -> Iterator[Any]:
  """The modules on the way, the model first and what is at `path` last."""
  here = model
  yield here
  for part in path.split("/") if path else ():
    if isinstance(here, Stack) and here.scan:
      raise NotImplementedError(f"{path!r} leads into a scanned stack; take `unrolled(model)`")
    if isinstance(here, nnx.List):
      there = dict(zip(map(str, range(len(here))), here))
    else:
      there = {k: v for k, v in vars(here).items() if isinstance(v, nnx.Module | nnx.List)}
    if part not in there:
      raise KeyError(f"there is no {part!r} of {path!r}; {registry.suggestion(part, there)}")
    here = there[part]
    yield here


def edited(model: nnx.Module, edits: Mapping[str, Transform]) -> nnx.Module:
  """A copy whose attention at each path applies one more edit to its weights, also in decoding.

  Example:
    >>> copy = edited(model, {"stack/blocks/2/mixer": Ablate(8, heads=(3,))})   # doctest: +SKIP

  Raises:
    TypeError: the module at a path has no `AttentionSpec`.
    KeyError, NotImplementedError: as `replaced`.
  """
  copy = nnx.clone(model)
  for path, edit in edits.items():
    *_, module = walk(copy, path)
    if not has_spec(module):
      raise TypeError(
        f"{path!r} is a {type(module).__name__}, which has no spec; expected attention: an edit "
        "changes weights, and for other mixers there is `replaced`"
      )
    module.spec = nnx.data(dataclasses.replace(module.spec, edits=(*module.spec.edits, edit)))
  return copy


def has_spec(module: Any) -> bool:
  """Whether edits can be added to what a module computes."""
  return isinstance(getattr(module, "spec", None), AttentionSpec)


def patched(
  model: nnx.Module, path: str, heads: Sequence[int], value: jax.Array
) -> nnx.Module:
  """A copy in which some heads of the attention at `path` read `value`, whatever they look at.

  With the mean of the `heads` that `observe` saw over a data set this is mean ablation, with those
  of another input activation patching (arXiv:2310.08744).

  Args:
    model: left as it is.
    path: of an attention with a `combiner`, which then sees the patched heads.
    heads: which heads.
    value: broadcasts to (B, T, len(heads), V).

  Raises:
    TypeError: the module at `path` has no place for a combiner.
    KeyError, NotImplementedError: as `replaced`.
  """

  def wrap(module):
    if not hasattr(module, "combiner"):
      raise TypeError(f"{path!r} is a {type(module).__name__}, which has no combiner to patch")
    module.combiner = nnx.data(Patch(heads, value, module.combiner))  # it may have been None
    return module

  return replaced(model, path, wrap)


class Patch(Combiner):
  """combiner(heads), with heads_n = value_n for the chosen n."""

  def __init__(self, heads: Sequence[int], value: jax.Array, combiner: Combiner | None):
    self.heads = tuple(heads)
    self.value, self.combiner = nnx.data(jnp.asarray(value)), combiner

  def __call__(self, heads, x):
    if not self.heads or not 0 <= min(self.heads) <= max(self.heads) < heads.shape[2]:
      raise ValueError(f"heads={self.heads} must be some of 0 .. {heads.shape[2] - 1}")
    heads = heads.at[:, :, np.array(self.heads)].set(self.value.astype(heads.dtype))
    return heads if self.combiner is None else self.combiner(heads, x)


def unrolled(model: nnx.Module) -> nnx.Module:
  """A copy whose scanned stacks hold their blocks one by one, so that each can be looked into."""
  copy = nnx.clone(model)
  stacks = [module for _, module in nnx.iter_modules(copy) if isinstance(module, Stack)]
  for stack in stacks:
    if stack.scan:
      graph, state = nnx.split(stack.blocks)
      layers = [jax.tree.map(lambda x: x[i], state) for i in range(stack.times)]
      stack.blocks = nnx.List([block for layer in layers for block in nnx.merge(graph, layer)])
      stack.scan = False
  return copy
