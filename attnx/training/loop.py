"""The loop, top to bottom: plan, state, steps, checkpoints, evaluation, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import json
import pathlib
import signal
from typing import Any

from flax import nnx
import jax
from jax.experimental import multihost_utils
import numpy as np

from attnx.attention import explain_first
from attnx.sharded import rules, sequence
from attnx.training import devices, report
from attnx.training import plan as plans
from attnx.training.checkpoint import Checkpoints
from attnx.training.config import Mistake, Stopped
from attnx.training.console import Console, complain
from attnx.training.plan import Plan
from attnx.training.step import Evaluation, forward, updater
from attnx.training.watch import Watch


def train(
  config: Mapping[str, Any],
  workdir: pathlib.Path | None = None,
  *,
  interrupted: Callable[[], str | None] = lambda: None,
  profile: bool = False,
) -> nnx.Module:
  """Runs a config, or goes on with it, and returns the trained model.

  Args:
    config: see `attnx.training.config.complete`.
    workdir: where everything is kept; None keeps nothing.
    interrupted: the name of a signal that asks to save and stop, once there was one.
    profile: trace the eleventh to the twentieth step of this session into `workdir`.

  Raises:
    Mistake: the config cannot run; nothing has been started.
    Stopped: by a signal, by a loss that is not finite, or by a disk that is full.
  """
  if profile and workdir is None:
    raise Mistake("a profile is written to the workdir: give one")
  plan = plans.make(config)
  _, *held_out = plan.about.splits
  steps = plan.config["steps"]
  checkpoints = None
  if workdir is not None:
    checkpoints = Checkpoints(workdir / "checkpoints", complain, **plan.config["checkpoint"])
  state, batches, begin, seconds = start(plan, checkpoints)
  if workdir is not None:
    write_down(plan, workdir)
  update, evaluate = updater(plan), Evaluation(plan, **plan.config["eval"])
  console = Console(workdir, steps, begin, plan.about.kind, **plan.config["log"])
  watch = Watch(plan, console, checkpoints, begin, seconds)

  with contextlib.closing(console):
    for step in range(begin + 1, steps + 1):
      state, metrics = update(state, rules.place(next(batches), plan.mesh))
      watch.add(step, metrics)
      stopping = asked_to_stop(step, interrupted)
      last = step == steps

      if step % console.every == 0 or last:
        watch.show()
      if step % evaluate.every == 0 and not last:
        watch.show_evaluation(held_out[0], evaluate(state, held_out[0]))
      if checkpoints is not None:
        checkpoints.check()
        if step % checkpoints.every == 0 or last or stopping:
          watch.settle()  # what is saved is known to be finite
          here = dict(data=states(plan, batches), seconds=watch.seconds())
          checkpoints.save(step, named(state), here)
      if profile:
        trace(step - begin, workdir, last or stopping is not None)
      if stopping:
        leave(step, stopping, checkpoints)

    if checkpoints is not None:
      checkpoints.wait()
    results = {split: evaluate(state, split, whole=True) for split in held_out}
    for split, result in results.items():
      watch.show_evaluation(split, result)
  model = plan.model(state["params"], state["rest"])
  console.say(report.write(plan, model, results, watch.seconds(), workdir))
  return model


def start(plan: Plan, checkpoints: Checkpoints | None) -> tuple[Any, Any, int, float]:
  """State, batches, step and seconds: of the newest whole checkpoint, or of a new run."""
  batches = plan.batches("train")
  found = None if checkpoints is None else checkpoints.restore(named(plan.state))
  if found is None:
    return plan.init(), batches, 0, 0.0
  step, arrays, host = found
  if step > plan.config["steps"]:
    raise Mistake(f"the run is at step {step} already, beyond config.steps={plan.config['steps']}")
  index, count = rules.share(plan.mesh)
  if len(saved := host["data"]) != count and any(state != saved[0] for state in saved):
    raise Mistake(
      f"the rows of the batches were packed in {len(saved)} shares by as many processes; {count}"
      " shares cannot go on"
    )
  with plans.mistakes("config.data"):
    batches.set_state(saved[index] if len(saved) == count else saved[0])
  state = jax.tree.unflatten(jax.tree.structure(plan.state), [arrays[x] for x in named(plan.state)])
  return state, batches, step, host["seconds"]


def named(tree: Any) -> dict[str, Any]:
  """Leaves by dotted path, in their order."""
  return {rules.name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def states(plan: Plan, batches: Any) -> list[Any]:
  """Where each share of the rows is in its data; who loads the same share is there together."""
  index, count = rules.share(plan.mesh)
  found = dict(everyone([index, batches.get_state()]))
  return [found[i] for i in range(count)]


def everyone(local: Any) -> list[Any]:
  """A JSON value of every process, in their order."""
  if jax.process_count() == 1:
    return [local]
  text = np.frombuffer(json.dumps(local).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(text.size))
  padded = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - text.size)))
  return [json.loads(bytes(row[:size])) for row, size in zip(padded, sizes, strict=True)]


def asked_to_stop(step: int, interrupted: Callable[[], str | None]) -> str | None:
  """The signal after which to stop; several processes agree on the step, as of SIGTERM."""
  if jax.process_count() > 1:
    if interrupted() == "SIGINT":
      signal.raise_signal(signal.SIGTERM)  # which JAX tells the other processes
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
  return interrupted()


def leave(step: int, stopping: str, checkpoints: Checkpoints | None) -> None:
  """Ends the run at the user's wish."""
  if checkpoints is None:
    raise Stopped(f"stopped by {stopping} at step {step}; without a workdir nothing is kept")
  checkpoints.wait()
  raise Stopped(
    f"stopped by {stopping} at step {step}, which is saved; the same command goes on from there",
    code=0 if stopping == "SIGTERM" else 130,
  )


def trace(step: int, workdir: pathlib.Path | None, last: bool) -> None:
  """Ten steps of `jax.profiler`, after the first ten; fewer where the session ends before."""
  if step == 10 and not last and workdir is not None:
    jax.profiler.start_trace(str(workdir / "profile"))
  elif step == 20 or (last and 10 < step < 20):
    jax.profiler.stop_trace()


def write_down(plan: Plan, workdir: pathlib.Path) -> None:
  """The resolved config, the versions and devices, and what attention will do."""
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
    (workdir / "environment.json").write_text(json.dumps(devices.describe(), indent=2) + "\n")
    run = lambda state, batch: forward(plan.model(state["params"], state["rest"]), batch)
    found = explain_first(run, plan.state, plan.batch)
    head = "The first call of attention in a forward pass over the whole batch:\n\n"
    text = "This model makes no call of attention." if found is None else f"{head}{found}"
    if found is not None and plan.mesh.shape["seq"] > 1:
      text += f"\n\nOver the mesh: {sequence.first_way(run, plan.mesh, plan.state, plan.batch)}."
    (workdir / "explain.txt").write_text(f"{text}\n")
