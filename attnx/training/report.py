"""What a run leaves for people: how good it is, a sample, the loss curve, what each head sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import concurrent.futures
import json
import lzma
import math
import pathlib

from flax import nnx
import jax
import numpy as np

from attnx.analysis import plots
from attnx.analysis.intervene import unrolled
from attnx.analysis.observe import observe
from attnx.core.tokens import Tokens
from attnx.models.sampling import generate, sampler
from attnx.nn.sown import sown
from attnx.training.plan import Plan

SHOWN, PROMPT, SAMPLE = 96, 48, 400  # tokens of a map, of a prompt, of a sample


def write(
  plan: Plan,
  model: nnx.Module,
  results: Mapping[str, Mapping[str, float]],
  seconds: float,
  workdir: pathlib.Path | None,
) -> str:
  """Draws how the run went into `workdir`, and returns what to say of it.

  Args:
    plan: of the run.
    model: trained.
    results: of the evaluation at the end, by split.
    seconds: that the run took.
    workdir: None for no pictures.
  """
  if jax.process_count() > 1:
    return "samples and pictures are made by one process: run the same command once more in one"
  model, about = jax.device_put(model, jax.devices()[0]), plan.about
  split = about.splits[-1]
  known = {} if about.raw is None else baselines(about.raw, split)
  lines = [f"{plan.config['steps']} steps took {seconds / 60:.1f} minutes"]
  if known:
    bits = results[split]["loss"] / math.log(2)
    others = ", ".join(f"{name} {value:.3f}" for name, value in known.items())
    lines.append(f"held-out bits per byte: {bits:.3f}; on the same bytes: {others}")
  if (text := sample(plan, model)) is not None:
    lines.append(f"a sample, which goes on at » from a held-out row:\n{text}\n")
  if workdir is None:
    return "\n".join(lines)
  told = dict(results=results, seconds=seconds, baselines=known)
  (workdir / "result.json").write_text(json.dumps(told, indent=2) + "\n")
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  unit = dict(unit="bits per byte") if known else dict(unit="nats", per_nat=1.0)
  plots.curve(rows, workdir / "loss.png", title=str(workdir), baselines=known, **unit)
  pictures = ["loss.png", *(["maps.png"] if maps(plan, model, workdir / "maps.png") else [])]
  lines.append(
    f"everything is in {workdir}: {', '.join(pictures)}, metrics.jsonl, tensorboard, checkpoints; "
    f"the same command with --config.steps={2 * plan.config['steps']} trains on from here"
  )
  return "\n".join(lines)


def baselines(raw: Callable[[str], bytes], split: str) -> dict[str, float]:
  """Bits per byte of the held-out bytes by what needs no model.

  Order-0 entropy is of their own counts; xz (preset 9) sees them alone, or after the training
  bytes, whose own size is taken off.
  """
  train, held_out = raw("train"), raw(split)
  pack = lambda data: 8 * len(lzma.compress(data, preset=9)) / len(held_out)
  with concurrent.futures.ThreadPoolExecutor() as pool:  # lzma lets go of Python's lock
    alone, before, after = pool.map(pack, (held_out, train, train + held_out))
  share = np.bincount(np.frombuffer(held_out, np.uint8)) / len(held_out)
  entropy = -float(share[share > 0] @ np.log2(share[share > 0]))
  return {
    "xz -9": alone,
    "xz -9 after the training bytes": after - before,
    "order-0 entropy": entropy,
  }


def first_row(plan: Plan, split: str, length: int | None) -> tuple[jax.Array, dict[str, Tokens]]:
  """The first `length` places of a row (1, ...), and `tokens` if the data say where they sit."""
  batch = {name: x[:1, :length] for name, x in next(plan.batches(split)).items() if x.ndim > 1}
  if "positions" not in batch:
    return batch["inputs"], {}
  index = np.arange(batch["inputs"].shape[1], dtype=np.int32)[None]
  return batch["inputs"], {"tokens": Tokens(index, batch["positions"], batch["segments"])}


def sample(plan: Plan, model: nnx.Module) -> str | None:
  """Text that the model writes on; None where tokens are no text, or most are not predicted."""
  decode, scored = plan.about.decode, next(plan.batches("train"))["weights"].mean() > 0.5
  if decode is None or not scored or not hasattr(model, "init_cache"):
    return None
  length = plan.batch["inputs"].shape[1]
  prompt, _ = first_row(plan, plan.about.splits[-1], min(PROMPT, length // 2))
  count = min(SAMPLE, length - prompt.shape[1])
  choose, key = sampler(temperature=0.8, top_p=0.95), jax.random.key(plan.config["seed"])
  try:
    ids = jax.jit(lambda model: generate(model, prompt, count, choose=choose, key=key))(model)
  except NotImplementedError as error:
    return f"(no sample: {error})"
  return f"{decode(prompt[0])}»{decode(np.asarray(ids[0]))}"


def maps(plan: Plan, model: nnx.Module, path: pathlib.Path) -> bool:
  """Draws what each head of each layer sees of a held-out row; False where nothing is sown."""
  shown = SHOWN if plan.about.kind == "tokens" else None
  inputs, where = first_row(plan, plan.about.splits[-1], shown)
  _, seen = jax.jit(lambda model: observe(unrolled(model), inputs, **where))(model)
  if not any(name.endswith("/weights") for name in seen):
    return False
  weights = {name: x[0] for name, x in sown(seen, "weights", 4).items()}
  labels = [plan.about.decode([i]) for i in inputs[0]] if plan.about.decode else None
  plots.heads(weights, path, title="what each head sees of a held-out row", labels=labels)
  return True
