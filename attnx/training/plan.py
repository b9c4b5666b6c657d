"""From a config to everything a run needs; a config that cannot run is refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh
import optax

from attnx import data, models
from attnx.sharded import rules, sequence
from attnx.training import config as configs
from attnx.training import devices, optimizer, step
from attnx.training.checkpoint import Checkpoints
from attnx.training.config import Mistake
from attnx.training.console import Console


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a config says, with every part built except for the arrays.

  Attributes:
    config: plain values, every section there.
    about: what the dataset says of itself.
    mesh: the devices.
    graph: of the model, for `nnx.merge`.
    optimizer: of the parameters.
    schedule: step to learning rate.
    state: shapes of params, rest, optimizer, key and step, with their shardings.
    batch: shapes of a global batch.
    flops: of a step.
  """

  config: dict[str, Any]
  about: data.Description
  mesh: Mesh
  graph: Any
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  state: Any
  batch: Any
  flops: float = 0.0

  def model(self, params: Any, rest: Any) -> nnx.Module:
    """The model with these arrays."""
    return nnx.merge(self.graph, params, rest)

  @property
  def per_step(self) -> int:
    """Tokens or images of a step."""
    inputs = self.batch["inputs"]
    return inputs.size if self.about.kind == "tokens" else inputs.shape[0]

  def batches(self, split: str):
    """This process' batches."""
    config, (index, count) = self.config, rules.share(self.mesh)
    return data.batches(
      config["data"], split=split, seed=config["seed"], process_index=index, process_count=count
    )

  def init(self) -> Any:
    """The first state, made where it will live."""
    shardings = jax.tree.map(lambda x: x.sharding, self.state)
    make = lambda seed: initial(self.config["model"], self.optimizer, seed)
    return jax.jit(make, out_shardings=shardings)(jax.numpy.uint32(self.config["seed"]))


def initial(
  model: Mapping[str, Any], optimizer: optax.GradientTransformation, seed: jax.typing.ArrayLike
) -> dict[str, Any]:
  """params, rest, optimizer, key and step of a new run."""
  weights, dropout = jax.random.split(jax.random.key(seed))
  built: Any = nnx.split(models.build(model, rngs=nnx.Rngs(weights)), nnx.Param, ...)
  _, params, rest = built
  return dict(
    params=params,
    rest=rest,
    optimizer=optimizer.init(params),
    key=jax.random.key_data(dropout),
    step=jax.numpy.zeros((), "int32"),
  )


def make(config: Mapping[str, Any]) -> Plan:
  """The plan of a config.

  Raises:
    Mistake: the config cannot run, and why.
  """
  configs.fits("config", configs.complete, config)
  config = configs.complete(**config)
  if config["steps"] < 1 or config["accumulate"] < 1:
    raise Mistake("config.steps and config.accumulate must be at least 1")
  for section, function, offered in (
    ("optimizer", optimizer.make, ["steps"]),
    ("mesh", rules.make_mesh, []),
    ("eval", step.Evaluation, ["plan"]),
    ("checkpoint", Checkpoints, ["directory", "say"]),
    ("log", Console, ["workdir", "steps", "begin", "unit"]),
  ):
    configs.fits(f"config.{section}", function, config[section], offered)

  with mistakes("config.data"):
    about = data.describe(config["data"])
    first = next(data.batches(config["data"], split="train", seed=config["seed"]))
  with mistakes("config.mesh"):
    mesh = rules.make_mesh(**config["mesh"])
    spread(config, mesh, about)
  with mistakes("config.model"):
    build = lambda: models.build(config["model"], rngs=nnx.Rngs(0))
    graph = nnx.split(nnx.eval_shape(build), nnx.Param, ...)[0]
  transformation, schedule = optimizer.make(**config["optimizer"], steps=config["steps"])
  shapes = jax.eval_shape(lambda: initial(config["model"], transformation, 0))
  with mistakes("config.sharding"):
    places = rules.shardings(shapes, mesh, config["sharding"])
  state = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
  )
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
  plan = Plan(config, about, mesh, graph, transformation, schedule, state, batch)
  with mistakes("config.model"):
    plan = dataclasses.replace(plan, flops=work(plan))
    if sequence.shared(mesh):
      with sequence.over(mesh):  # what cannot go over devices says so now
        jax.eval_shape(learned(plan), plan.state, plan.batch)
    return plan


def spread(config: Mapping[str, Any], mesh: Mesh, about: data.Description) -> None:
  """Refuses batches that the devices cannot share."""
  rows, parts, shares = config["data"]["batch"], config["accumulate"], rules.rows(mesh)
  rules.share(mesh)
  if rows % (parts * shares):
    raise ValueError(
      f"data.batch={rows} must be a multiple of {shares} devices that share its rows times"
      f" accumulate={parts}"
    )
  if (seq := mesh.shape["seq"]) > 1 and (about.length is None or about.length % seq):
    raise ValueError(f"seq={seq} must divide the length of the data, {about.length}")


def work(plan: Plan) -> float:
  """FLOPs of a step, as three times the forward pass; refuses outputs that do not fit the targets.

  What rematerialisation computes again is not counted.
  """
  jaxpr, (logits, *_) = jax.make_jaxpr(learned(plan), return_shape=True)(plan.state, plan.batch)
  classes = plan.about.vocab if plan.about.kind == "tokens" else plan.about.classes
  wanted = (*plan.batch["targets"].shape, classes)
  if logits.shape != wanted:
    raise ValueError(f"the model's outputs are {logits.shape}, and the data want {wanted}")
  return 3 * devices.flops(jaxpr.jaxpr)


def learned(plan: Plan) -> Callable[[Any, Any], Any]:
  """(state, batch) to what `step.learning` gives."""
  return lambda state, batch: step.learning(plan.model(state["params"], state["rest"]), batch)


@contextlib.contextmanager
def mistakes(section: str) -> Iterator[None]:
  """Errors of values, kinds, names and files that a section of the config causes, as the user's."""
  try:
    yield
  except (KeyError, TypeError, ValueError, NotImplementedError, OSError, ImportError) as error:
    raise Mistake(f"{section}: {configs.sentence(error)}") from error
