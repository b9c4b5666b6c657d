"""Several processes train as one, save as one and stop as one."""

import socket
import subprocess
import signal
import time

import pytest

from attnx.training import devices
from attnx.training.checkpoint import read
from attnx.training.config import Mistake
from runs import arrays, assert_same, config_file, ended, losses, main, start, steps

CLOSE = dict(rtol=2e-3, atol=2e-4)  # sums over devices in another order, after 12 steps of Adam


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def together(file, workdir, *arguments) -> list[subprocess.Popen]:
  """Two processes of four devices each."""
  where = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
  return [
    start(file, f"--workdir={workdir}", *where, f"--process-id={i}", *arguments, devices=4)
    for i in range(2)
  ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """A run of one process, with eight devices."""
  folder = tmp_path_factory.mktemp("alone")
  file = config_file(folder)
  assert main(file, f"--workdir={folder / 'workdir'}") == 0
  return file, folder / "workdir"


def test_two_processes_have_the_losses_of_one_and_one_reads_what_they_save(alone, tmp_path):
  file, reference = alone
  processes = together(file, tmp_path, "--config.mesh.fsdp=8")
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


def test_a_signal_to_one_of_two_processes_saves_and_ends_both_and_one_goes_on(alone, tmp_path):
  file, reference = alone
  processes = together(file, tmp_path, "--config.checkpoint.every=1")
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
    devices.start(*given)
