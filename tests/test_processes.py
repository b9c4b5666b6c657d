"""Several processes train as one, save as one and stop as one."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from attnx.training import processes
from attnx.training.checkpoint import read
from attnx.training.config import Mistake
from runs import arrays, assert_same, config_file, ended, finish, losses, main, steps, together

HOSTS = pathlib.Path(__file__).parent.parent / "experiments" / "cluster" / "hosts.sh"
CLOSE = dict(rtol=2e-3, atol=2e-4)  # sums over devices in another order, after 12 steps of Adam


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """A run of one process, with eight devices."""
  folder = tmp_path_factory.mktemp("alone")
  file = config_file(folder)
  assert main(file, f"--workdir={folder / 'workdir'}") == 0
  return file, folder / "workdir"


def test_two_processes_have_the_losses_of_one_and_one_reads_what_they_save(alone, tmp_path):
  file, reference = alone
  processes = together(file, f"--workdir={tmp_path}", "--config.mesh.fsdp=8")
  with ended(*processes):
    told = [process.communicate(timeout=150)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], told
  assert "step 12/12" in told[0] and "step" not in told[1]
  assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-4)
  assert_same(arrays(tmp_path), arrays(reference), **CLOSE)
  data = read(tmp_path / "checkpoints" / "12")["host"]["data"]
  assert [state["iterator"] for state in data] == [{"next_index": 12}] * 2
  saved = arrays(tmp_path)
  assert main(file, f"--workdir={tmp_path}") == 0
  assert_same(arrays(tmp_path), saved)


def test_two_processes_share_the_tokens_of_every_row(alone, tmp_path):
  file, reference = alone
  mesh = "--config.mesh.tensor=2", "--config.mesh.seq=4", "--config.checkpoint.every=5"
  processes = together(file, f"--workdir={tmp_path}", *mesh)
  with ended(*processes):
    told = [process.communicate(timeout=150)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], told
  assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-4)
  assert len(read(tmp_path / "checkpoints" / "12")["host"]["data"]) == 1  # both read the same rows


def test_a_signal_to_one_of_two_processes_saves_and_ends_both_and_one_goes_on(alone, tmp_path):
  file, reference = alone
  processes = together(file, f"--workdir={tmp_path}", "--config.checkpoint.every=1")
  with ended(*processes):
    while not steps(tmp_path) and processes[0].poll() is None:
      time.sleep(0.002)
    processes[1].send_signal(signal.SIGINT)  # which becomes a SIGTERM that both know of
    told = [process.communicate(timeout=150)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], told
  stopped = steps(tmp_path)[-1]
  if stopped < 12:  # the signal may come with the last step
    assert f"stopped by SIGTERM at step {stopped}, which is saved" in told[0]
  assert main(file, f"--workdir={tmp_path}") == 0
  assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-4)
  assert_same(arrays(tmp_path), arrays(reference), **CLOSE)


@pytest.mark.parametrize("given, words", [
  (("a:1", None, None), "go together"),
  ((None, 2, 0), "go together"),
  (("a:1", 2, 2), "--process_id=2 must be in 0 .. 1"),
  (("a:1", 2, -1), "--process_id=-1 must be in 0 .. 1"),
  (("a:1", 0, 0), "--num_processes=0 must be at least 1"),
  (("a", 2, 0), "--coordinator=a must be host:port"),
  (("a:port", 2, 0), "--coordinator=a:port must be host:port"),
])  # fmt: skip
def test_flags_of_processes_that_do_not_fit_are_mistakes(given, words):
  with pytest.raises(Mistake, match=words):
    processes.find(*given)


def hosts(*arguments, **environment) -> subprocess.Popen:
  """experiments/cluster/hosts.sh."""
  return subprocess.Popen(
    [str(HOSTS), *map(str, arguments)], env=os.environ | environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def test_a_script_runs_one_command_on_all_hosts(alone, tmp_path):
  file, reference = alone
  train = sys.executable, "-m", "attnx.train", f"--config={file}", f"--workdir={tmp_path}"
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
  process = hosts("--local", 2, *train, XLA_FLAGS=flags)
  told = finish(process)
  assert process.returncode == 0 and "\n0| step 12/12" in told and "1| step" not in told, told
  assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-4)


@pytest.mark.parametrize("where", ["--local", "over ssh"])
def test_the_script_tells_each_who_it_is_and_stops_all_when_one_ends_badly(tmp_path, where):
  code = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(99 * (sys.argv[3] < "
  code += "'--process-id=1')); sys.exit(3)"
  ssh = tmp_path / "ssh"
  ssh.write_text('#!/usr/bin/env bash\nshift; exec bash -c "$*"\n')
  ssh.chmod(0o755)
  given = ("--local", 2) if where == "--local" else ("me@host0,host1",)
  process = hosts(*given, sys.executable, "-c", code, GRACE="1", SSH=str(ssh), PORT="1234")
  told = finish(process, 30)
  assert process.returncode == 3
  name = "127.0.0.1" if where == "--local" else "host0"
  for i in range(2):
    flags = [f"--coordinator={name}:1234", "--num-processes=2", f"--process-id={i}"]
    assert f"{i}| {flags}\n" in told
  assert "hosts.sh: process 1 on" in told


def test_slurm_says_who_the_processes_are(monkeypatch):
  for name, value in dict(
    SLURM_JOB_ID="7", SLURM_STEP_NODELIST="node[3,5]", SLURM_NTASKS="16", SLURM_PROCID="9",
    SLURM_LOCALID="1", SLURM_STEP_NUM_NODES="2", JAX_COORDINATOR_PORT="1234",
  ).items():  # fmt: skip
    monkeypatch.setenv(name, value)
  assert processes.find(None, None, None) == processes.Group("node3:1234", 16, 9, [1])


def test_patience_is_a_second_at_least():
  with (
    pytest.raises(Mistake, match="--patience=0.5 must be at least 1 second"),
    processes.guarded(None, None, None, program="this", lost=str, patience=0.5),
  ):
    pass
