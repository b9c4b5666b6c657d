"""When one of several processes is gone, the others say so and end, and fewer go on.

The loss of a process is made at a known moment: it stays in the making of the seventh batch, when
the checkpoint of step 6 is whole, and the others wait for it in a collective.
"""

import re
import signal
import time

import pytest

from runs import config_file, ended, finish, free_port, losses, main, start, steps, together

BATCH = dict(name="copying", batch=24, length=6, vocab=8, eval_examples=24)  # for 1, 2, 3 and 8
STAYS = """
import time
from attnx.data.pipeline import Batches
make, made = Batches.__next__, []
def spoiled(batches):
  made.append(1)
  if len(made) == 1 + 7:
    {act}
  return make(batches)
Batches.__next__ = spoiled
"""  # the first batch is the plan's


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
  """A run that nothing disturbed: its config file and its losses."""
  folder = tmp_path_factory.mktemp("calm")
  file = config_file(folder, data=BATCH)
  assert main(file, f"--workdir={folder / 'workdir'}") == 0
  return file, losses(folder / "workdir")


def lose(file, workdir, index: int, count: int, number: signal.Signals, seconds: float) -> None:
  """Sends a signal to a process at step 7; all others must end within seconds and say why."""
  after = {index: STAYS.format(act="time.sleep(1000)")}
  flags = f"--workdir={workdir}", "--patience=3"
  processes = together(file, *flags, count=count, devices=1, after=after)
  with ended(*processes):
    until = time.monotonic() + 100
    while 6 not in steps(workdir) and time.monotonic() < until:
      assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes]
      time.sleep(0.01)
    time.sleep(0.5)
    processes[index].send_signal(number)
    begin = time.monotonic()
    told = [p.communicate(timeout=60)[0] for p in processes if p is not processes[index]]
    assert time.monotonic() - begin < seconds
    assert [p.returncode for p in processes if p is not processes[index]] == [1] * (count - 1)
  why = "its connection closed" if number is signal.SIGKILL else "nothing was heard of it for 3 sec"
  for text in told:
    *_, last = text.splitlines()
    assert re.match(rf"attnx.train: stopped: process {index} \(host \S+\) is gone: {why}", last)
    assert "checkpoints: 2, 4, 6; started again, with these processes or with those" in last, last
    assert last.endswith("the run goes on from step 6"), last
    assert text.count("stopped:") == 1
    assert "Traceback" not in text and "Check failure" not in text


def test_one_of_three_processes_is_killed_and_two_go_on(calm, tmp_path):
  file, expected = calm
  lose(file, tmp_path, 1, 3, signal.SIGKILL, seconds=10)
  processes = together(file, f"--workdir={tmp_path}", devices=1)
  with ended(*processes):
    told = [process.communicate(timeout=100)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], told
  assert "step 7/12" in told[0] and "step 6/12" not in told[0]
  assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("index, number", [
  pytest.param(0, signal.SIGKILL, id="the first is killed"),
  pytest.param(1, signal.SIGSTOP, id="the second hangs", marks=pytest.mark.slow),  # as the first
  pytest.param(0, signal.SIGSTOP, id="the first hangs"),
])  # fmt: skip
def test_one_of_two_processes_is_gone_and_one_goes_on(calm, tmp_path, index, number):
  file, expected = calm
  lose(file, tmp_path, index, 2, number, seconds=10)
  assert main(file, f"--workdir={tmp_path}") == 0
  assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("index, error, words", [
  (1, "OSError(28, 'No space left on device')", "failed: stopped: results cannot be written"),
  (0, "TypeError('a bug')", "failed: TypeError: a bug"),
], ids=["its disk is full", "it has a bug"])  # fmt: skip
def test_the_error_of_one_process_ends_the_other(calm, tmp_path, index, error, words):
  after = {index: STAYS.format(act=f"raise {error}")}
  processes = together(calm[0], f"--workdir={tmp_path}", devices=1, after=after)
  with ended(*processes):
    told = [process.communicate(timeout=60)[0] for process in processes]
  assert [process.returncode for process in processes] == [1, 1], told
  assert re.search(rf"attnx.train: stopped: process {index} \(host \S+\) {words}", told[1 - index])
  assert "Traceback" not in told[1 - index] and "Check failure" not in "".join(told)
  assert ("Traceback" in told[index]) == ("bug" in error)


def test_a_mistake_of_all_is_told_by_each(calm, tmp_path):
  processes = together(calm[0], "--config.model.depth=-1", devices=1)
  with ended(*processes):
    told = [process.communicate(timeout=60)[0] for process in processes]
  assert [process.returncode for process in processes] == [2, 2], told
  assert all("depth=-1" in text.splitlines()[-1] for text in told)


def test_who_does_not_come_is_named(calm):
  for i, words in enumerate(["process 1 did not come", "process 0 did not answer"]):
    where = f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2", f"--process-id={i}"
    hurry = "from attnx.training import peers\npeers.START = 1.0"
    process = start(calm[0], *where, after=hurry)
    told = finish(process, 60)
    assert process.returncode == 2 and words in told and told.count("\n") == 1, told
