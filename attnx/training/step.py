"""What is compiled: the loss, the update of the parameters, and the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
import inspect
import itertools
from typing import TYPE_CHECKING, Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnx.core.tokens import Tokens
from attnx.nn.aside import Sums, moved, with_asides
from attnx.sharded import rules, sequence
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


def learning(
  model: nnx.Module, batch, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Sums]:
  """Logits, what modules add to the loss, and what moves their averages."""
  return with_asides(lambda model: forward(model, batch, key), model)


def updater(plan: Plan) -> Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]:
  """(state, batch) to the next state and metrics; the state is donated.

  Metrics: `loss`, the mean in nats over what is scored, with what modules add to it;
  `learning_rate`; `grad_norm`; and `squares`, the squared norm of each gradient, in the order of
  the leaves of the parameters.
  """
  parts = plan.config["accumulate"]

  def gradients(params, rest, batch, key):
    total = jnp.maximum(batch["weights"].sum(), 1)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, part, key):
      with sequence.over(plan.mesh):
        logits, added, sums = learning(plan.model(params, rest), part, key)
      return nats(logits, part) / total + added / parts, sums

    if parts == 1:
      return loss(params, batch, key)

    def add(sums, part_key):
      return jax.tree.map(jnp.add, sums, loss(params, *part_key)), None

    # Row i goes to part i mod parts, so that every device has a share of every part.
    cut = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    cuts = (jax.tree.map(cut, batch), jax.random.split(key, parts))
    shapes = jax.eval_shape(loss, params, *jax.tree.map(lambda x: x[0], cuts))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, nothing, cuts)[0]

  def update(state, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
    (loss, sums), grads = gradients(state["params"], state["rest"], batch, key)
    updates, opt = plan.optimizer.update(grads, state["optimizer"], state["params"])
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    rate = jnp.asarray(plan.schedule(state["step"]), jnp.float32)
    metrics = dict(loss=loss, grad_norm=jnp.sqrt(squares.sum()), learning_rate=rate)
    params = optax.apply_updates(state["params"], updates)
    rest = moved(state["rest"], sums)
    after = state | dict(params=params, rest=rest, optimizer=opt, step=state["step"] + 1)
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
      with sequence.over(plan.mesh):
        logits = forward(plan.model(params, rest), batch)
      hits = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
      return jnp.stack([nats(logits, batch), hits.sum(), batch["weights"].sum()])

    self.sums = sums

  def __call__(self, state: Any, split: str, *, whole: bool = False) -> dict[str, float]:
    """`loss` in nats, `accuracy`, and `scored`, the sum of the weights."""
    held_out: Iterable = self.plan.batches(split)
    seen: list[Any] = []
    for batch in itertools.islice(held_out, None if whole else self.batches):
      batch = rules.place(batch, self.plan.mesh)
      seen.append(self.sums(state["params"], state["rest"], batch))
      if len(seen) > 1:  # two on their way keep devices busy; the collectives of many can lock up
        seen[-2] = jax.device_get(seen[-2])
    total, hits, weight = np.asarray(jax.device_get(seen), np.float64).sum(0)
    return dict(loss=total / weight, accuracy=hits / weight, scored=weight)
