"""Looking inside a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.analysis.intervene import edited, has_spec
from attnx.mechanisms.edits.scale import Scale
from attnx.nn.sown import sown


def observe(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
  """Runs a model and returns its output and what its modules sowed, by path.

  Attention sows its `weights` (B, N, T, S) and `heads` (B, T, N, V), recurrences the matrix that
  they are, others what is worth looking at. The model itself is left as it is.

  Example:
    >>> logits, seen = observe(model, ids)               # doctest: +SKIP
    >>> seen["stack/blocks/2/mixer/weights"].shape       # doctest: +SKIP
    (4, 4, 33, 33)

  Args:
    model: called with the other arguments; may be traced.

  Returns:
    The output, and one array for each path. A module that runs more than once in a call has its
    arrays stacked along a new first axis.

  Raises:
    NotImplementedError: a stack of the model is scanned; observe its `unrolled` copy.
    ValueError: a module that ran more than once sowed arrays of several shapes.
  """
  return captured(lambda model: model(*args, **kwargs), model)


def captured(
  function: Callable[[nnx.Module], Any], model: nnx.Module
) -> tuple[Any, dict[str, jax.Array]]:
  """What a function of a model returns and what modules sow meanwhile, as `observe`."""
  output, state = nnx.capture(function, nnx.Intermediate)(nnx.clone(model))
  flat = jax.tree.leaves_with_path(nnx.to_pure_dict(state), is_leaf=lambda x: isinstance(x, tuple))
  seen = {}
  for keys, arrays in flat:
    path = "/".join(str(key.key) for key in keys)
    if len({x.shape for x in arrays}) > 1:
      shapes = ", ".join(str(x.shape) for x in arrays)
      raise ValueError(f"{path} was sown with shapes {shapes}; observe calls of one shape")
    seen[path] = arrays[0] if len(arrays) == 1 else jnp.stack(arrays)
  return output, seen


def gate_gradients(
  loss: Callable[[nnx.Module], jax.Array], model: nnx.Module
) -> dict[str, jax.Array]:
  """d loss / d g at g = 1, where g_btn multiplies what head n reads for token t of example b.

  That is the product of what it reads with the gradient of the loss there (arXiv:1905.10650). Gates
  sit in the edits of every attention that has a spec, so that one backward pass gives all of them.

  Args:
    loss: of a model, called once with each example in a row of the batch; the sum over examples,
      so that the gates of an example have the gradient of its own loss. Without dropout.
    model: not scanned.

  Returns:
    `<path>/gate_gradients` to (B, N, T) float32, for each attention that the loss runs.

  Raises:
    NotImplementedError: a stack of the model is scanned; take its `unrolled` copy.
    ValueError: no attention with a spec is run, or one is run more than once.
  """
  _, seen = jax.eval_shape(lambda: captured(loss, model))
  specs = {"/".join(map(str, p)) for p, module in nnx.iter_modules(model) if has_spec(module)}
  heads = {path: x for path, x in sown(seen, "heads", 4).items() if path in specs}
  if not heads:
    raise ValueError(f"none of {', '.join(sown(seen, 'heads', 4))} has a spec with edits to gate")
  gates = {path: jnp.ones([x.shape[i] for i in (0, 2, 1)]) for path, x in heads.items()}

  def gated(gates):
    return loss(edited(model, {path: Scale(g[..., None]) for path, g in gates.items()}))

  return {f"{path}/gate_gradients".lstrip("/"): g for path, g in jax.grad(gated)(gates).items()}
