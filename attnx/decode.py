"""Goes on where prompts end, with a trained model, on any number of devices and processes.

python -m attnx.decode --checkpoint WORKDIR --prompt-file F --max-new-tokens N [--mesh seq=8]

F is one prompt, or, if it ends with .jsonl, one request a line: {"prompt": "..."}, with its own
"max_new_tokens" and "stop" if it has some. One prompt is continued as text, as it comes; several
are shown side by side on a terminal, and are pieces {"request": 0, "text": "..."} elsewhere, each
request ending with {"request": 0, "end": "stop"} or "length". Models whose tokens are no text take
and give ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import inspect
import json
import os
import pathlib
import sys
import time
from typing import Any

from absl import flags
import numpy as np

from attnx.decoding.text import Request, Text
from attnx.training import config as configs
from attnx.training.command import Command, Flag
from attnx.training.config import Mistake


FLAGS: Sequence[Flag] = (
  (flags.DEFINE_string, "checkpoint", None, "Workdir of a run, or its checkpoints/STEP."),
  (flags.DEFINE_string, "prompt_file", None, "What to go on from: text, or requests (.jsonl)."),
  (flags.DEFINE_string, "prompt", None, "What to go on from, instead of a file."),
  (flags.DEFINE_integer, "max_new_tokens", 256, "Tokens after each prompt, at the most."),
  (flags.DEFINE_multi_string, "stop", [], "Ends a text, and is not shown; may be given again."),
  (flags.DEFINE_string, "mesh", None, "Devices, e.g. seq=4,tensor=2; all share the sequence."),
  (flags.DEFINE_float, "temperature", 1.0, "Of the draws; 0 takes the most probable token."),
  (flags.DEFINE_integer, "top_k", None, "Draw from the k most probable tokens."),
  (flags.DEFINE_float, "top_p", None, "Draw from the fewest tokens with this probability."),
  (flags.DEFINE_float, "min_p", None, "Draw tokens this probable beside the most probable."),
  (flags.DEFINE_integer, "seed", 0, "Of the draws; the same one gives the same text."),
)


def requests(values: flags.FlagValues) -> list[Request]:
  """What the flags ask for."""
  if (values.prompt is None) == (values.prompt_file is None):
    raise Mistake("say what to go on from: --prompt-file F, or --prompt TEXT")
  if values.max_new_tokens < 1:
    raise Mistake(f"--max-new-tokens={values.max_new_tokens} must be at least 1")
  common = (values.max_new_tokens, tuple(values.stop))
  if values.prompt is not None:
    return [Request(values.prompt, *common)]
  file = pathlib.Path(values.prompt_file)
  try:
    text = file.read_text()
  except (OSError, ValueError) as error:
    raise Mistake(f"{file} cannot be read: {configs.sentence(error)}") from error
  if file.suffix != ".jsonl":
    return [Request(text, *common)]
  lines = [line for line in text.splitlines() if line.strip()]
  return [request(line, f"{file}, request {i}", *common) for i, line in enumerate(lines)]


def request(line: str, where: str, count: int, stop: tuple[str, ...]) -> Request:
  """A line of a file of requests."""
  try:
    given = json.loads(line)
  except ValueError as error:
    raise Mistake(f"{where} is not JSON: {configs.sentence(error)}") from error
  match given:
    case {"prompt": str(prompt), **more} if more.keys() <= {"max_new_tokens", "stop"}:
      own: Any = more.get("max_new_tokens", count)
      ends: Any = more.get("stop", [])
      ends = [ends] if isinstance(ends, str) else ends
      if isinstance(own, int) and own > 0 and all(isinstance(s, str) and s for s in ends):
        return Request(prompt, own, (*stop, *ends))
  raise Mistake(
    f'{where} is {configs.shown(given)}; expected {{"prompt": TEXT}}, and if need be'
    ' "max_new_tokens": N and "stop": [TEXT, ...]'
  )


def sizes(mesh: str | None) -> dict[str, int]:
  """seq=4,tensor=2 as a mapping."""
  try:
    return {k: int(v) for k, v in (part.split("=") for part in (mesh or "").split(",") if part)}
  except ValueError as error:
    raise Mistake(f"--mesh={mesh} must be like seq=8 or seq=4,tensor=2") from error


def chooser(values: flags.FlagValues) -> Callable:
  """How a token is chosen."""
  from attnx.models import sampling

  options = {k: getattr(values, k) for k in ("top_k", "top_p", "min_p")}
  options = {k: v for k, v in options.items() if v is not None}
  if values.temperature == 0:
    if options:
      raise Mistake(f"--temperature=0 draws nothing that {' or '.join(options)} could narrow")
    return sampling.greedy
  return sampling.sampler(temperature=values.temperature, **options)


def decode(values: flags.FlagValues) -> None:
  """Restores, takes in the prompts, and shows what follows."""
  import jax

  from attnx.decoding import trained
  from attnx.decoding.screen import Screen, apart
  from attnx.decoding.stream import Stream
  from attnx.sharded import rules
  from attnx.training.loop import everyone
  from attnx.training.plan import mistakes

  first = jax.process_index() == 0
  if jax.process_count() > 1:
    apart()
  asked = everyone(requests(values) if first else None)[0]  # only process 0 need have the file
  asked = [Request(prompt, most, tuple(stop)) for prompt, most, stop in asked]
  with mistakes("--mesh"):
    given = sizes(values.mesh)
    mesh = rules.make_mesh(**given if given else dict(data=1, seq=jax.device_count()))
  begin = time.perf_counter()
  model, about, step, config = trained.load(pathlib.Path(values.checkpoint), mesh)
  if about.kind != "tokens":
    raise Mistake(f"the model of {values.checkpoint} is one of {about.kind}, which nothing follows")
  wants = inspect.signature(getattr(model, "init_cache", decode)).parameters
  if list(wants) != ["batch", "length"]:
    raise Mistake(f"{config['model']['name']} wants more than a prompt; see attnx.models.sampling")
  with mistakes("the prompt"):
    encode = about.encode or (lambda text: np.asarray([int(word) for word in text.split()]))
    prompts = [np.asarray(encode(r.prompt), np.int32) for r in asked]
    if any(((p < 0) | (p >= (about.vocab or 0))).any() for p in prompts):
      raise ValueError(f"an id is not in 0 .. {(about.vocab or 0) - 1}")
    stream = Stream(
      model, prompts, max(r.most for r in asked), choose=chooser(values),
      key=jax.random.key(values.seed), mesh=mesh,
    )  # fmt: skip
  spell = about.decode or (lambda ids: "".join(f"{i} " for i in ids))
  texts = [Text(r, spell) for r in asked]
  over = ", ".join(f"{k}={n}" for k, n in mesh.shape.items() if n > 1) or "one device"
  head = f"{config['model']['name']} at step {step} of {values.checkpoint}, over {over}"
  with Screen(head, [r.prompt for r in asked], begin, quiet=not first) as screen:
    for ids in stream:
      for row, (text, id) in enumerate(zip(texts, ids, strict=True)):
        going = not text.end
        screen.add(row, text.feed(id), text.end if going else "")
      screen.tick(sum(text.taken for text in texts), sum(r.most for r in asked))
      if all(text.end for text in texts):
        break


def work(values: flags.FlagValues, _: list[str]) -> None:
  """Decodes what the flags say."""
  if values.checkpoint is None:
    raise Mistake("say which model: --checkpoint WORKDIR")
  from attnx.training import processes  # here, so that --help is instant

  with processes.guarded(
    values.coordinator, values.num_processes, values.process_id, program="attnx.decode",
    lost=lambda: "what was decoded is above; the same command begins anew, with any processes",
    patience=values.patience,
  ):  # fmt: skip
    decode(values)


def main(argv: Sequence[str]) -> int:
  try:
    return Command("attnx.decode", __doc__, FLAGS).run(argv, work, "interrupted")
  except BrokenPipeError:  # nobody reads on, as after `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
