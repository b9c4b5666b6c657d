"""A trained model from the workdir of a run, on any devices; nothing there is written or moved."""

from __future__ import annotations

from collections.abc import Mapping
import json
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np
import orbax.checkpoint as ocp

from attnx import data, models
from attnx.sharded import rules
from attnx.training import checkpoint as checkpoints
from attnx.training import config as configs
from attnx.training.config import Mistake, sentence
from attnx.training.loop import named
from attnx.training.plan import mistakes


class Trained(NamedTuple):
  """A model, and what is known of it.

  Attributes:
    model: with its arrays on the devices.
    about: what the dataset says of itself: how text becomes ids.
    step: updates that it has seen.
    config: of the run.
  """

  model: nnx.Module
  about: data.Description
  step: int
  config: Mapping[str, Any]


def load(where: pathlib.Path, mesh: Mesh) -> Trained:
  """The model of a run.

  Args:
    where: the workdir, of which the newest whole checkpoint is read, or one of its checkpoints.
    mesh: where the parameters live, by the rules of the config, as while training.

  Raises:
    Mistake: there is no whole checkpoint of a run, or it is of another model than its config says.
  """
  chosen = where.name.isdecimal() and where.parent.name == "checkpoints"
  workdir = where.parent.parent if chosen else where
  config = resolved(workdir / "config.json")
  steps = [int(where.name)] if chosen else checkpoints.steps(workdir / "checkpoints")
  step = int(multihost_utils.broadcast_one_to_all(np.int32(newest(workdir, steps))))
  checkpoint = (workdir / "checkpoints" / str(step)).absolute()
  with mistakes("config.data"):
    about = data.describe(config["data"])
  with mistakes("config.model"):
    build = lambda: models.build(config["model"], rngs=nnx.Rngs(0))
    graph, *shapes = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
  state = dict(zip(("params", "rest"), shapes, strict=True))
  with mistakes("config.sharding"):
    places = rules.shardings(state, mesh, config["sharding"])
  wanted = named(
    jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )
  )
  arrays = read(checkpoint, wanted)
  state = jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in wanted])
  return Trained(nnx.merge(graph, state["params"], state["rest"]), about, step, config)


def resolved(file: pathlib.Path) -> dict[str, Any]:
  """The config that a run wrote down."""
  try:
    config = json.loads(file.read_text())
  except FileNotFoundError as error:
    raise Mistake(
      f"there is no {file}; --checkpoint wants the workdir of a run of attnx.train, or a folder"
      " WORKDIR/checkpoints/STEP"
    ) from error
  except (OSError, ValueError) as error:
    raise Mistake(f"{file} is not what a run wrote: {sentence(error)}") from error
  configs.fits(str(file), configs.complete, config)
  return configs.complete(**config)


def newest(workdir: pathlib.Path, steps: list[int]) -> int:
  """The last of the steps whose checkpoint is as it was written; process 0 looks."""
  if jax.process_index():
    return 0
  faults = []
  for step in reversed(steps):
    if (fault := checkpoints.damage(workdir / "checkpoints" / str(step))) is None:
      return step
    faults.append(f"that of step {step}: {fault}")
  told = f" ({'; '.join(faults)})" if faults else ""
  raise Mistake(f"there is no whole checkpoint in {workdir / 'checkpoints'}{told}")


def read(checkpoint: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
  """These arrays of a checkpoint, each where it is wanted."""
  there = checkpoints.read(checkpoint)["arrays"]
  for name, x in wanted.items():
    if there.get(name) != (here := [*x.shape, str(x.dtype)]):
      raise Mistake(f"{name} is {there.get(name)} in {checkpoint}, and {here} by its config.json")
  restore = ocp.args.PyTreeRestore(
    item=dict(wanted),
    restore_args=ocp.checkpoint_utils.construct_restore_args(dict(wanted)),
    partial_restore=True,
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    try:
      return orbax.restore(checkpoint / "arrays", args=restore)
    except Exception as error:  # of many kinds, by the format that Orbax wrote in
      raise Mistake(
        f"Orbax {ocp.__version__} cannot read {checkpoint}, though it is as it was written: "
        f"{sentence(error)[:200]}"
      ) from error
