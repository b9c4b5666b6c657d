"""What a run leaves for people: its loss beside baselines, a sample, the curve, what heads see."""

from __future__ import annotations

from collections.abc import Mapping
import concurrent.futures
import json
import lzma
import math
import pathlib
from typing import Any

from flax import nnx
import jax
from jax.experimental import multihost_utils
import numpy as np

from attnx import data
from attnx.analysis import plots
from attnx.analysis.intervene import unrolled
from attnx.analysis.observe import captured
from attnx.models import sampling
from attnx.nn.sown import sown
from attnx.sharded import rules
from attnx.training.plan import Plan
from attnx.training.step import forward

PREFIX = 2**24  # bytes of training text that xz is given at most; they take it about ten seconds
MAPPED = 2048  # tokens of the longest row whose (T, T) maps are drawn
TEMPERATURE = 0.8  # of the sample

Baselines = Mapping[str, tuple[float, float | None]]  # name to nats, and the share that is hit


def write(
  plan: Plan,
  model: nnx.Module,
  results: Mapping[str, Mapping[str, float]],
  seconds: float,
  workdir: pathlib.Path | None,
) -> str:
  """The report as text; in the workdir it is report.txt, beside loss.png and maps.png.

  Every process takes part, for arrays may be spread over all of them; process 0 writes.

  Args:
    plan: of the run.
    model: trained.
    results: of `Evaluation`, for every split that is held out.
    seconds: that the run took.
    workdir: of the run; None draws nothing.
  """
  first = next(iter(results))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:  # xz works while the model does
    known = pool.submit(lambda: {split: baselines(plan, split) for split in results})
    row = first_row(plan, first)
    text, maps = sample(plan, model, row), attention(plan, model, row)
    beside = known.result()
  parts = [summary(plan, seconds)]
  parts += [table(plan, split, result, beside[split]) for split, result in results.items()]
  parts += [text] if text else []
  if workdir is None:
    return "\n\n".join(["", *parts, "Without a workdir nothing of this is kept."])
  if jax.process_index() == 0:
    title = f"{plan.config['model']['name']} on {plan.config['data']['name']}"
    draw_loss(plan, workdir, title, beside[first])
    draw_maps(plan, workdir, title, maps, row)
    kept = ", ".join(sorted({"report.txt", *(path.name for path in workdir.iterdir())}))
    parts.append(
      f"All of it is in {workdir}: {kept}.\nThe same command with "
      f"--config.steps={2 * plan.config['steps']} trains on from here."
    )
    (workdir / "report.txt").write_text("\n\n".join(parts) + "\n")
  return "\n\n".join(["", *parts])


def summary(plan: Plan, seconds: float) -> str:
  """How large, how long."""
  size = sum(x.size for x in jax.tree.leaves(plan.state["params"]))
  time = f"{int(seconds) // 60}:{int(seconds) % 60:02}"
  return (
    f"{size:,} parameters after {plan.config['steps']:,} steps of {plan.per_step:,} "
    f"{plan.about.kind}; {time} minutes, compiling and evaluation among them, on "
    f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  )


def unit(plan: Plan) -> tuple[str, float]:
  """Of losses, and how many of it a nat is: bits per byte where tokens are bytes."""
  if plan.about.raw is not None:
    return "bits per byte", 1 / math.log(2)
  return f"nats per scored {plan.about.kind.removesuffix('s')}", 1.0


def table(plan: Plan, split: str, result: Mapping[str, float], beside: Baselines) -> str:
  """Loss and accuracy of the model and of each baseline, one a line."""
  name, per_nat = unit(plan)
  rows = {"this model": (result["loss"], result["accuracy"]), **beside}
  lines = [f"{split}, {result['scored']:,.0f} scored {plan.about.kind}, {name}:"]
  for label, (loss, hits) in rows.items():
    accuracy = "" if hits is None else f"   accuracy {hits:.1%}"
    lines.append(f"  {label:40} {loss * per_nat:8.4f}{accuracy}")
  return "\n".join(lines)


def baselines(plan: Plan, split: str) -> Baselines:
  """Nats a target, and the share that is hit, of what needs no model.

  The entropy is that of the frequencies of the held-out targets themselves: no code that ignores
  context is shorter, and the commonest target is hit most often. xz at preset 9 is given the
  held-out bytes alone; or it is what they add to the training bytes before them.
  """
  counts = np.zeros(plan.about.vocab or plan.about.classes or 0)
  for batch in data.batches(plan.config["data"], split=split, seed=0):
    np.add.at(counts, batch["targets"], batch["weights"])
  p = counts[counts > 0] / counts.sum()
  found = {"order-0 entropy": (-float(p @ np.log(p)), float(p.max()))}
  if plan.about.raw is None:
    return found
  held_out, train = plan.about.raw(split), plan.about.raw("train")
  before = train[-PREFIX:]
  xz = lambda text: len(lzma.compress(text, preset=9)) * 8 * math.log(2) / len(held_out)
  with concurrent.futures.ThreadPoolExecutor() as pool:  # lzma lets go of Python's lock
    known, both, alone = pool.map(xz, (before, before + held_out, held_out))
  told = "the training bytes" if len(before) == len(train) else f"{PREFIX >> 20} MiB of training"
  return {f"xz -9 after {told}": (both - known, None), "xz -9 alone": (alone, None)} | found


def first_row(plan: Plan, split: str) -> dict[str, np.ndarray]:
  """The first row of a split as a batch of one, the same in every process."""
  batch = next(plan.batches(split))
  return multihost_utils.broadcast_one_to_all({name: x[:1] for name, x in batch.items()})


def sample(plan: Plan, model: nnx.Module, row: Mapping[str, np.ndarray]) -> str | None:
  """How a held-out beginning goes on; None where targets are not the next piece of a text."""
  if plan.about.decode is None or not predicts_the_next(row):
    return None
  ids, length = row["inputs"], row["inputs"].shape[1]
  segments = row.get("segments", np.ones_like(ids))
  size = max(1, min(length // 8, int((segments == segments[0, 0]).sum())))
  choose = sampling.sampler(temperature=TEMPERATURE)
  run = lambda model, key: sampling.generate(
    model, jax.numpy.asarray(ids[:, :size]), max(1, length - size), choose=choose, key=key
  )
  try:
    written = everywhere(plan, run)(model, jax.random.key(plan.config["seed"]))
  except NotImplementedError as error:
    return f"no sample: {error}"
  begun = row["targets"][0, : size - 1]  # where rows have a start token, targets do not
  told = plan.about.decode(begun.tolist())
  whole = plan.about.decode([*begun.tolist(), *np.asarray(written)[0].tolist()])
  return (
    f"a sample at temperature {TEMPERATURE}; what is before ▶ was given, and is held out:\n"
    f"{printable(told)}▶{printable(whole[len(told) :])}"
  )


def predicts_the_next(row: Mapping[str, np.ndarray]) -> bool:
  """Whether most targets count, and are the next input."""
  inputs, targets, weights = (row[name][0] for name in ("inputs", "targets", "weights"))
  hits = (targets[:-1] == inputs[1:]) * weights[:-1]
  return bool(hits.sum() > 0.5 * len(hits))


def everywhere(plan: Plan, function: Any) -> Any:
  """Compiled, with results that every process holds."""
  return jax.jit(function, out_shardings=rules.replicated(plan.mesh))


def printable(text: str) -> str:
  """The text without the characters that would steer a terminal."""
  return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def attention(
  plan: Plan, model: nnx.Module, row: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Layer to its maps (N, T, S) of a row, without padding; empty where no layer sows any."""
  tokens = plan.about.kind == "tokens"
  if tokens and row["inputs"].shape[1] > MAPPED:
    return {}

  def look(model):
    seen = captured(lambda model: forward(model, row), unrolled(model))[1]
    return sown(seen, "weights", 4) if any(path.endswith("/weights") for path in seen) else {}

  maps = {name: np.asarray(x[0]) for name, x in everywhere(plan, look)(model).items()}
  size = exists(row).sum()
  return {name: x[:, :size, :size] if tokens else x for name, x in maps.items()}


def exists(row: Mapping[str, np.ndarray]) -> np.ndarray:
  """(T,), whether there is a token."""
  return row["positions"][0] >= 0 if "positions" in row else np.ones(row["inputs"].shape[1], bool)


def draw_loss(plan: Plan, workdir: pathlib.Path, title: str, beside: Baselines) -> None:
  """loss.png."""
  name, per_nat = unit(plan)
  lines = {label: loss * per_nat for label, (loss, _) in beside.items()}
  rows = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
  path = workdir / "loss.png"
  plots.curve(rows, path, title=title, baselines=lines, unit=name, per_nat=per_nat)


def draw_maps(
  plan: Plan,
  workdir: pathlib.Path,
  title: str,
  maps: Mapping[str, np.ndarray],
  row: Mapping[str, np.ndarray],
) -> None:
  """maps.png, where there are maps; tokens are named by their text, or by their ids."""
  if not maps:
    return
  words = None
  if plan.about.kind == "tokens":
    decode = plan.about.decode or (lambda ids: str(ids[0]))
    words = [decode([i]) for i in row["inputs"][0, exists(row)].tolist()]
    words = words if any(x.shape[2] == len(words) for x in maps.values()) else None
  title = f"{title}: what heads look at in a held-out row"
  plots.heads(maps, workdir / "maps.png", title=title, labels=words)
