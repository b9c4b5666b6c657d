"""What is compiled: the loss, the update of the parameters, and the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import inspect
import itertools
from typing import TYPE_CHECKING, Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnx.core.tokens import Tokens
from attnx.sharded import rules
from attnx.training.config import Mistake

if TYPE_CHECKING:
  from attnx.training.plan import Plan


def forward(model: nnx.Module, batch, key: jax.Array | None = None) -> jax.Array:
  """Logits (B, T, V) or (B, classes); `key` is for what drops, None is evaluation."""
  inputs, options = batch["inputs"], dict[str, Any]()
  if "positions" in batch:
    index: Any = np.arange(inputs.shape[1], dtype=np.int32)[None]
    options["tokens"] = Tokens(index, batch["positions"], batch["segments"])
  if key is not None and "key" in inspect.signature(type(model).__call__).parameters:
    options["key"] = key
  return model(inputs, **options)


def nats(logits: jax.Array, batch) -> jax.Array:
  """Sum over targets of weight times cross entropy, in float32."""
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  return (losses * batch["weights"]).sum()


def updater(plan: Plan) -> Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]:
  """(state, batch) to the next state and metrics; the state is donated.

  Metrics: `loss`, the mean in nats over what is scored; `learning_rate`; `grad_norm`; and
  `squares`, the squared norm of each gradient, in the order of the leaves of the parameters.
  """
  parts = plan.config["accumulate"]

  def gradients(params, rest, batch, key):
    total = batch["weights"].sum()

    def loss(params, part, key):
      return nats(forward(plan.model(params, rest), part, key), part) / jnp.maximum(total, 1)

    if parts == 1:
      return jax.value_and_grad(loss)(params, batch, key)

    def add(sums, part_key):
      return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, *part_key)), None

    # Row i goes to part i mod parts, so that every device has a share of every part.
    cut = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, nothing, (jax.tree.map(cut, batch), jax.random.split(key, parts)))[0]

  def update(state, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
    loss, grads = gradients(state["params"], state["rest"], batch, key)
    updates, opt = plan.optimizer.update(grads, state["optimizer"], state["params"])
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    rate = jnp.asarray(plan.schedule(state["step"]), jnp.float32)
    metrics = dict(loss=loss, grad_norm=jnp.sqrt(squares.sum()), learning_rate=rate)
    params = optax.apply_updates(state["params"], updates)
    after = state | dict(params=params, optimizer=opt, step=state["step"] + 1)
    return after, metrics | dict(squares=squares)

  places = jax.tree.map(lambda x: x.sharding, plan.state)
  everywhere = rules.replicated(plan.mesh)
  return jax.jit(update, donate_argnums=0, out_shardings=(places, everywhere))


class Evaluation:
  """Loss and accuracy over held-out data.

  Args:
    plan: of the run.
    every: steps from one evaluation to the next.
    batches: how many to look at; None for all. At the end of a run it is always all, of every
      split that is held out.
  """

  def __init__(self, plan: Plan, *, every: int = 500, batches: int | None = None):
    if every < 1 or (batches is not None and batches < 1):
      raise Mistake(f"eval.every={every} and eval.batches={batches} must be at least 1")
    self.plan, self.every, self.batches = plan, every, batches

    @jax.jit
    def sums(params, rest, batch):
      logits = forward(plan.model(params, rest), batch)
      hits = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
      return jnp.stack([nats(logits, batch), hits.sum(), batch["weights"].sum()])

    self.sums = sums

  def __call__(self, state: Any, split: str, *, whole: bool = False) -> dict[str, float]:
    """`loss` in nats, `accuracy`, and `scored`, the sum of the weights."""
    held_out: Iterable = self.plan.batches(split)
    seen = [
      self.sums(state["params"], state["rest"], rules.place(batch, self.plan.mesh))
      for batch in itertools.islice(held_out, None if whole else self.batches)
    ]
    total, hits, weight = np.asarray(jax.device_get(seen), np.float64).sum(0)
    return dict(loss=total / weight, accuracy=hits / weight, scored=weight)
