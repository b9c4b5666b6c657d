"""Several processes as one: they find each other, and all end when one of them is gone.

JAX alone is slow and rude about that. The collectives of a CPU fail at once, those of a GPU hang;
then `jax.distributed` waits for heartbeats, 100 seconds, and again at exit for those who are dead.
And when process 0 is gone, or heartbeats are missed, its C++ aborts the process with a stack dump
before Python can say anything; it takes no callback in Python. So all processes keep a connection
of their own to process 0, see `attnx.training.peers`, and hear of JAX's through a relay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
import os
import re
import socket
import threading
from typing import Any

import jax

from attnx.training import peers
from attnx.training.config import Mistake, Stopped, sentence

PATIENCE = 45.0  # seconds of silence
SLACK = 30  # by which JAX's own heartbeats are more patient: for when Python itself is stuck
CLUSTERS = {"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "JAX_NUM_PROCESSES": "1"}


@dataclasses.dataclass(frozen=True)
class Group:
  """Several processes, and which this is.

  Args:
    coordinator: host:port of process 0.
    count: how many there are.
    index: of this one.
    local: the devices of this one, None if all of its machine.
  """

  coordinator: str
  count: int
  index: int
  local: Any = None

  @property
  def host(self) -> str:
    return self.coordinator.rsplit(":", 1)[0].strip("[]")

  @property
  def port(self) -> int:
    return int(self.coordinator.rsplit(":", 1)[1])


@contextlib.contextmanager
def guarded(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  program: str,
  lost: Callable[[], str],
  patience: float = PATIENCE,
) -> Iterator[None]:
  """Joins the other processes, if there are some, and ends with them or without them.

  If the work inside ends well, also by `Stopped` with code 0, all wait for each other and part. If
  another process is gone or has failed, `Stopped` is raised where the main thread comes back within
  a second; where it does not, another thread says the same and ends the process. If this process
  fails, the others are told why. After any failure the process ends when its main thread does, or
  three seconds later: nothing waits for what is dead.

  Args:
    coordinator: host:port of process 0; see `find`.
    num_processes: how many there are.
    process_id: which of them this is.
    program: its name, for a sentence that the main thread cannot say.
    lost: what is lost and how to go on, to end the sentence with.
    patience: seconds of silence after which a process counts as gone.

  Raises:
    Mistake: as `find`, or the processes do not find each other.
    Stopped: another process is gone or has failed.
  """
  if patience < 1:
    raise Mistake(f"--patience={patience:g} must be at least 1 second")
  group = find(coordinator, num_processes, process_id)
  if group is None:
    yield
    return
  watch = peers.Watch(group.index, *peers.meet(group), patience)
  watch.begin(program, lost)
  relay, calm = Relay(group.host, group.port), None
  try:
    join(group, relay, patience)
    yield
  except BaseException as error:
    if not isinstance(error, Stopped) or error.code:
      watch.fail(error)
      raise
    calm = error
  watch.part()
  relay.silent = False
  jax.distributed.shutdown()  # here, while threads still run and all are there
  if calm is not None:
    raise calm


def find(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Group | None:
  """Of flags, or of the variables of a launcher; None if this process is alone.

  Raises:
    Mistake: only some of the flags are given, or they do not fit.
  """
  given = (coordinator, num_processes, process_id)
  if any(x is not None for x in given):
    if coordinator is None or num_processes is None or process_id is None:
      raise Mistake("--coordinator, --num_processes and --process_id go together")
    if num_processes < 1:
      raise Mistake(f"--num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
      raise Mistake(f"--process_id={process_id} must be in 0 .. {num_processes - 1}")
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator):
      raise Mistake(f"--coordinator={coordinator} must be host:port")
    return Group(coordinator, num_processes, process_id)
  if (
    any(os.environ.get(name, one) != one for name, one in CLUSTERS.items())
    or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
  ):
    return launched()
  return None


def launched() -> Group:
  """What the variables of a launcher say.

  JAX has no public name for what `initialize` finds there, which the relay has to know before.
  """
  from jax._src.clusters import ClusterEnv

  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  found = ClusterEnv.auto_detect_unset_distributed_params(address, None, None, None, None, 300)
  coordinator, count, index, local = found
  if coordinator is None or count is None or index is None:
    raise Mistake(
      "the launcher's variables do not say who the other processes are; give --coordinator, "
      "--num_processes and --process_id"
    )
  return Group(coordinator, count, index, local)


def join(group: Group, relay: Relay, patience: float) -> None:
  """`jax.distributed.initialize`, whose failure is told in a sentence."""
  try:
    jax.distributed.initialize(
      relay.open() if group.index else group.coordinator,
      group.count,
      group.index,
      group.local,
      heartbeat_timeout_seconds=math.ceil(patience) + SLACK,
    )
  except (RuntimeError, ValueError) as error:
    raise Mistake(f"the processes do not find each other: {sentence(error)}") from error


class Relay:
  """A port of this machine that leads to JAX's service in process 0.

  While it is `silent` it does not pass on that process 0 closed its end, upon which JAX would abort
  this process.
  """

  def __init__(self, host: str, port: int):
    self.there, self.silent = (host, port), True

  def open(self) -> str:
    """Where the port is."""
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=self.serve, args=(server,), daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"

  def serve(self, server: socket.socket) -> None:
    while True:
      near, _ = server.accept()
      try:
        far = socket.create_connection(self.there, timeout=10)
      except OSError:  # the service is not there yet; JAX will ask again
        near.close()
        continue
      far.settimeout(None)
      for ends in ((near, far), (far, near)):
        threading.Thread(target=self.pass_on, args=ends, daemon=True).start()

  def pass_on(self, source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
      while data := source.recv(1 << 16):
        sink.sendall(data)
    if not self.silent:
      for end in (source, sink):
        with contextlib.suppress(OSError):
          end.shutdown(socket.SHUT_RDWR)
