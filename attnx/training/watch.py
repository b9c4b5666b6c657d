"""Metrics of the steps: read one step late, averaged, shown, and refused when not finite."""

from __future__ import annotations

from collections.abc import Mapping
import json
import math
import time

import jax
import numpy as np

from attnx.sharded import rules
from attnx.training import devices
from attnx.training.checkpoint import Checkpoints
from attnx.training.config import Stopped
from attnx.training.console import Console
from attnx.training.plan import Plan


class Watch:
  """Looks at the metrics of a step when the next one is on its way, so that neither waits.

  Args:
    plan: of the run.
    console: where they are shown.
    checkpoints: the ones to point to when the run fails.
    begin: the step that this session starts after.
    seconds: that earlier sessions of the run took.
  """

  def __init__(
    self, plan: Plan, console: Console, checkpoints: Checkpoints | None, begin: int, seconds: float
  ):
    self.plan, self.console, self.checkpoints = plan, console, checkpoints
    self.begin = time.perf_counter() - seconds
    self.peak = devices.peak() or math.nan
    self.step = begin
    self.pending: Mapping[str, jax.Array] | None = None
    self.losses: list[float] = []
    self.clock = self.timed = math.nan  # set by the first step, so that rates leave compiling out

  def seconds(self) -> float:
    """How long the run has taken, all its sessions together."""
    return time.perf_counter() - self.begin

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """A step is on its way; the one before must have ended well."""
    self.settle()
    self.step, self.pending = step, metrics
    self.console.tick(step)

  def settle(self) -> None:
    """Waits for the last step.

    Raises:
      Stopped: its loss or its gradient is not finite.
    """
    if (metrics := self.pending) is None:
      return
    self.pending = None
    self.last = {k: float(metrics[k]) for k in ("loss", "grad_norm", "learning_rate")}
    if not (math.isfinite(self.last["loss"]) and math.isfinite(self.last["grad_norm"])):
      self.diverged(metrics["squares"])
    self.losses.append(self.last["loss"])
    if math.isnan(self.clock):
      self.clock, self.timed = time.perf_counter(), self.step

  def show(self) -> None:
    """A row: the mean loss since the last row, the rates since then, the rest of the last step."""
    self.settle()
    now, steps = time.perf_counter(), self.step - self.timed
    rate = steps / (now - self.clock) if steps else math.nan
    self.clock, self.timed = now, self.step
    row = dict(step=self.step, seconds=self.seconds(), **self.last)
    row["loss"] = float(np.mean(self.losses))
    row[f"{self.plan.about.kind}_per_second"] = self.plan.per_step * rate
    row["mfu"] = self.plan.flops * rate / self.peak
    self.losses = []
    self.console.show(row, left=(self.plan.config["steps"] - self.step) / rate)

  def show_evaluation(self, split: str, result: Mapping[str, float]) -> None:
    """Results on a split; the rates of training leave out the time that they took."""
    self.settle()
    row = {f"{split}_{k}": v for k, v in result.items()}
    self.console.record(dict(step=self.step, seconds=self.seconds(), **row))
    self.clock, self.timed = time.perf_counter(), self.step
    found = f"{split} loss {result['loss']:.4f}, accuracy {result['accuracy']:.1%}"
    self.console.say(f"step {self.step}: {found}")

  def diverged(self, squares: jax.Array) -> None:
    """Stops the run, with what was not finite; what is saved is older and whole."""
    leaves = jax.tree_util.tree_leaves_with_path(self.plan.state["params"])
    paths = [rules.name(path) for path, _ in leaves]
    norms = dict(zip(paths, np.sqrt(jax.device_get(squares)).tolist(), strict=True))
    bad = [path for path, norm in norms.items() if not math.isfinite(norm)]
    saved = "nothing is saved"
    if self.checkpoints is not None:
      self.checkpoints.wait()
      steps, where = self.checkpoints.steps(), self.checkpoints.directory
      saved = f"the last good checkpoint is step {steps[-1]} in {where}" if steps else saved
      text = dict(step=self.step, **self.last, gradient_norms=norms)
      (where.parent / "diverged.json").write_text(json.dumps(text, indent=2) + "\n")
    first = f"; gradients that are not finite: {len(bad)} of {len(norms)}, first "
    first += ", ".join(bad[:3])
    raise Stopped(
      f"stopped at step {self.step}: loss {self.last['loss']}, gradient norm "
      f"{self.last['grad_norm']}{first if bad else ''}; {saved}"
    )
