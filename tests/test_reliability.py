"""A run that is killed, stopped, starved of disk or moved ends with what an undisturbed one has."""

import contextlib
import gc
import json
import pathlib
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from attnx.data.pipeline import Batches
from attnx.training import checkpoint
from runs import (
  arrays, assert_same, config_file, ended, finish, losses, main, seen, start, steps,
)  # fmt: skip

LINES = "attnx.train: "


def killed(file: pathlib.Path, workdir: pathlib.Path, rng: random.Random, aim: str) -> bool:
  """Starts the run and kills it: whether it lived until then, i.e. had not ended.

  `aim` is "start", before the first step; "saving", within the writing of a checkpoint; or "any"
  moment after a new checkpoint.
  """
  before = max(steps(workdir), default=0)
  process = start(file, f"--workdir={workdir}", devices=8, doomed=True)
  with ended(process):
    if aim == "start":
      time.sleep(rng.uniform(0.5, 3))
    wanted = "saving" if aim == "saving" else ""
    while process.poll() is None and aim != "start":
      if any(step > before + 1 and suffix == wanted for step, suffix in seen(workdir)):
        time.sleep(rng.uniform(0, 0.02 if aim == "saving" else 0.3))
        break
      time.sleep(0.0005)
    process.kill()
    process.wait()
    return process.returncode == -signal.SIGKILL


def kill_and_go_on(folder: pathlib.Path, capsys, kills: int, total: int) -> None:
  """Kills a run `kills` times, lets it end, and compares it with an undisturbed one."""
  file = config_file(folder, steps=total, checkpoint=dict(every=1, keep=2))
  calm, workdir = folder / "calm", folder / "killed"
  assert main(file, f"--workdir={calm}") == 0
  rng, cut = random.Random(kills), 0
  for i in range(kills):
    assert killed(file, workdir, rng, ["saving", "any", "saving", "start"][i % 4])
    cut += any(suffix for _, suffix in seen(workdir))
  assert cut >= kills // 4, "the kills missed the writing of checkpoints"
  assert main(file, f"--workdir={workdir}") == 0
  assert "damaged" not in capsys.readouterr().err
  assert_same(arrays(workdir), arrays(calm))
  assert losses(workdir) == losses(calm)
  assert seen(workdir) == [(total - 1, ""), (total, "")]


def test_a_run_that_is_killed_goes_on_to_the_same_parameters(tmp_path, capsys):
  kill_and_go_on(tmp_path, capsys, kills=3, total=60)


@pytest.mark.slow  # twenty processes, each of which imports and compiles
def test_twenty_kills_leave_the_same_parameters(tmp_path, capsys):
  kill_and_go_on(tmp_path, capsys, kills=20, total=400)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run in this process that nothing disturbed: its config file, workdir and last checkpoint."""
  folder = tmp_path_factory.mktemp("run")
  file, workdir = config_file(folder), folder / "undisturbed"
  assert main(file, f"--workdir={workdir}") == 0
  return file, workdir, arrays(workdir)


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 16
  path.write_bytes(content)


def largest(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
  "truncated": lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:-7]),
  "missing": lambda folder: largest(folder).unlink(),
  "flipped": lambda folder: flip(largest(folder)),
  "unsealed": lambda folder: flip(folder / "manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(run, tmp_path, capsys, name):
  file, before, whole = run
  workdir = tmp_path / "workdir"
  shutil.copytree(before, workdir)
  assert steps(workdir) == [8, 10, 12]
  DAMAGES[name](workdir / "checkpoints" / "12")
  assert main(file, f"--workdir={workdir}") == 0
  told = capsys.readouterr().err
  assert told.startswith("the checkpoint of step 12 is damaged (") and told.count("\n") == 1
  assert steps(workdir) == [8, 10, 12]
  assert_same(arrays(workdir), whole)


@contextlib.contextmanager
def disk(folder: pathlib.Path, size: str):
  """A small file system of its own, where we may mount one."""
  folder.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
  if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
    pytest.skip("no file system may be mounted here; test_checkpoint.py limits a file instead")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax' event loop
def test_a_full_disk_stops_training_and_what_is_saved_stays_whole(tmp_path, capsys, run):
  _, _, whole = run
  file = config_file(tmp_path, checkpoint=dict(every=2, keep=99), log=dict(every=1))
  with disk(tmp_path / "small", "900k") as workdir:  # one checkpoint is 200k, or 400k while made
    assert main(file, f"--workdir={workdir}") == 1
    told = capsys.readouterr().err.splitlines()
    kept = steps(workdir)
    assert len(told) == 1 and told[0].startswith(LINES + "stopped: the checkpoint of step ")
    assert "no space left" in told[0] and f"there: {', '.join(map(str, kept))};" in told[0]
    assert kept[:1] == [2] and kept[-1] < 12
    folder = workdir / "checkpoints"
    assert [checkpoint.damage(folder / str(step)) for step in kept] == [None] * len(kept)
    shutil.copytree(workdir, tmp_path / "roomy")
    gc.collect()
  assert main(file, f"--workdir={tmp_path / 'roomy'}") == 0
  assert_same(arrays(tmp_path / "roomy"), whole)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_disk_that_metrics_fill_stops_training_too(tmp_path, capsys, tensorboard):
  file = config_file(
    tmp_path, steps=4000, checkpoint=dict(every=9999), log=dict(every=1, tensorboard=tensorboard)
  )
  with disk(tmp_path / "small", "100k") as workdir:
    assert main(file, f"--workdir={workdir}") == 1
    told = capsys.readouterr().err.splitlines()
  assert len(told) == 1 and told[0].startswith(LINES + "stopped: results cannot be written")


class Spoiler:
  """Does something while the n-th batch is made."""

  def __init__(self, monkeypatch, at: int, act):
    self.count, make = 0, Batches.__next__

    def spoiled(batches):
      self.count += 1
      batch = make(batches)
      return (act(batch) or batch) if self.count == at else batch

    monkeypatch.setattr(Batches, "__next__", spoiled)


def test_a_loss_that_is_not_finite_stops_training_and_is_explained(tmp_path, capsys, monkeypatch):
  file = config_file(tmp_path)
  Spoiler(monkeypatch, 1 + 7, lambda batch: batch | dict(weights=batch["weights"] * np.nan))
  assert main(file, f"--workdir={tmp_path / 'workdir'}") == 1
  told = capsys.readouterr().err.splitlines()
  assert len(told) == 1 and told[0].startswith(LINES + "stopped at step 7: loss nan, gradient norm")
  assert f"the last good checkpoint is step 6 in {tmp_path / 'workdir' / 'checkpoints'}" in told[0]
  assert "gradients that are not finite: 11 of 11, first " in told[0]
  assert steps(tmp_path / "workdir") == [2, 4, 6]
  found = json.loads((tmp_path / "workdir" / "diverged.json").read_text())
  assert found["step"] == 7 and np.isnan(found["loss"])
  assert len(found["gradient_norms"]) == 11 and all(map(np.isnan, found["gradient_norms"].values()))


def test_a_learning_rate_that_is_far_too_high_is_such_a_loss(tmp_path, capsys):
  changes = ["--config.optimizer.peak=1e30", "--config.optimizer.warmup=0"]
  assert main(config_file(tmp_path), *changes) == 1
  assert "nothing is saved" in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
  run, tmp_path, capsys, monkeypatch, number, code
):
  file, _, whole = run
  with monkeypatch.context() as patch:
    Spoiler(patch, 1 + 5, lambda batch: signal.raise_signal(number))
    assert main(file, f"--workdir={tmp_path}") == code
  told = capsys.readouterr().err
  assert told == (
    f"{LINES}stopped by {number.name} at step 5, which is saved; "
    "the same command goes on from there\n"
  )
  assert steps(tmp_path) == [2, 4, 5]
  assert main(file, f"--workdir={tmp_path}") == 0
  assert_same(arrays(tmp_path), whole)


def test_a_signal_without_a_workdir_says_that_nothing_is_kept(tmp_path, capsys, monkeypatch):
  Spoiler(monkeypatch, 1 + 5, lambda batch: signal.raise_signal(signal.SIGTERM))
  assert main(config_file(tmp_path)) == 1
  assert "nothing is kept" in capsys.readouterr().err


def test_a_run_goes_on_with_other_devices_and_comes_back(run, tmp_path, monkeypatch):
  file, before, whole = run
  workdir = tmp_path / "workdir"
  interrupt = lambda batch: signal.raise_signal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    Spoiler(patch, 1 + 4, interrupt)
    assert main(file, f"--workdir={workdir}", "--config.mesh.fsdp=8") == 0  # eight devices
  process = start(file, f"--workdir={workdir}", "--config.steps=8", devices=1)
  told = finish(process)
  assert process.returncode == 0 and steps(workdir) == [4, 6, 8], told
  assert main(file, f"--workdir={workdir}") == 0  # eight again
  assert jax.device_count() == 8
  # The same sums in another order: close; which data were seen is exact, and shows in the losses.
  same = ("key", "step", "optimizer.1.0.count")
  assert [arrays(workdir)[k].tolist() for k in same] == [whole[k].tolist() for k in same]
  curve, expected = losses(workdir), losses(before)
  assert [curve[i] for i in range(1, 5)] == pytest.approx([expected[i] for i in range(1, 5)], 1e-5)
