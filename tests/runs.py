"""Tiny runs of attnx.train, in this process and in others, for the tests of reliability."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx import train
from attnx.training.checkpoint import Checkpoints, read

TINY = dict(
  steps=12,
  data=dict(name="copying", batch=8, length=6, vocab=8, eval_examples=8),
  model=dict(
    name="decoder_lm", vocab=8, dim=16, depth=1, mixers=(dict(name="attention", num_heads=2),)
  ),
  optimizer=dict(peak=1e-2, warmup=2),
  checkpoint=dict(every=2, keep=3),
  log=dict(every=1, tensorboard=False),
)


def config_file(folder: pathlib.Path, text: str | None = None, **sections: Any) -> pathlib.Path:
  """A config file of TINY, with `sections` changed, or of any text."""
  file = folder / "tiny.py"
  config = f"ml_collections.ConfigDict({TINY | sections!r})"
  made = f"import ml_collections\n\n\ndef get_config():\n  return {config}\n"
  file.write_text(made if text is None else text)
  return file


def main(file: pathlib.Path, *arguments: Any) -> int:
  """The command in this process, which keeps its handlers of signals."""
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.getsignal(number) for number in numbers]
  try:
    return train.main(["train", f"--config={file}", *map(str, arguments)])
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


def start(
  file: pathlib.Path, *arguments: Any, devices: int = 1, doomed: bool = False, after: str = ""
) -> subprocess.Popen:
  """The command in a process of its own, perhaps after some code in Python.

  One that is `doomed` to be killed fills no cache.
  """
  cache = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1e9" if doomed else "0")
  code = f"{after}\nimport sys, attnx.train\nsys.exit(attnx.train.main(['train', *sys.argv[1:]]))"
  command = [sys.executable, *(("-c", code) if after else ("-m", "attnx.train"))]
  command += [f"--config={file}", *map(str, arguments)]
  return subprocess.Popen(
    command, env=environment(devices) | cache,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


def environment(devices: int) -> dict[str, str]:
  """Of a process with so many devices, and otherwise the flags of this one, which it may equal."""
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
  return os.environ | dict(XLA_FLAGS=flags)


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def together(
  file: pathlib.Path,
  *arguments: Any,
  count: int = 2,
  devices: int = 4,
  after: dict[int, str] | None = None,
) -> list[subprocess.Popen]:
  """The command in several processes, some of them after some code."""
  where = [f"--coordinator=127.0.0.1:{free_port()}", f"--num-processes={count}"]
  code = after or {}
  return [
    start(
      file, *where, f"--process-id={i}", *arguments, devices=devices, after=code.get(i, ""),
    )
    for i in range(count)
  ]  # fmt: skip


@contextlib.contextmanager
def ended(*processes: subprocess.Popen) -> Iterator[None]:
  """Leaves no process behind, whatever happens."""
  try:
    yield
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def finish(process: subprocess.Popen, seconds: float = 120) -> str:
  """What a process says until it ends."""
  with ended(process):
    return process.communicate(timeout=seconds)[0]


def seen(workdir: pathlib.Path) -> list[tuple[int, str]]:
  """Steps of what is among the checkpoints, each with "saving", "deleting" or "" after it."""
  folder = workdir / "checkpoints"
  parts = [name.partition(".") for name in (os.listdir(folder) if folder.exists() else ())]
  return sorted((int(step), suffix) for step, _, suffix in parts if step.isdecimal())


def steps(workdir: pathlib.Path) -> list[int]:
  """Of the whole checkpoints there."""
  return [step for step, suffix in seen(workdir) if not suffix]


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The newest checkpoint of a run that has ended, by dotted name."""
  about = read(workdir / "checkpoints" / str(steps(workdir)[-1]))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  targets = {
    name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=here)
    for name, (*shape, dtype) in about["arrays"].items()
  }
  return jax.device_get(Checkpoints(workdir / "checkpoints").restore(targets)[1])


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], **close: float) -> None:
  """The same arrays: bit for bit, or as close as asked for."""
  assert one.keys() == other.keys() and any(name.startswith("params.") for name in one)
  for name, x in one.items():
    if close:
      np.testing.assert_allclose(x, other[name], **close, err_msg=name)
    else:
      assert x.dtype == other[name].dtype and x.tobytes() == other[name].tobytes(), name


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Step to training loss, of metrics.jsonl."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}
