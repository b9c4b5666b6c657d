"""Connections of all processes to process 0, by which each hears that the others live.

Both ends of a connection say so every second. An end that closes is a death, silence is a hang;
process 0 tells the others. Each then says in one sentence who is gone and why, and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any

from attnx.training.config import Mistake, Stopped, sentence

START = 300.0  # seconds for all to come
WORD = "attnx"
HELLO = 512  # bytes, with which a connection begins
GRACE = {True: 1, False: 10}  # seconds for the main thread to speak: of one gone, of one failed


def meet(group: Any) -> tuple[dict[int, str], dict[int, socket.socket]]:
  """Names of hosts, and connections: of process 0 to all others, of those to process 0.

  They meet at the port of the coordinator, before JAX takes it over, so that whatever goes wrong in
  JAX can be told. Connections stay.

  Args:
    group: `attnx.training.processes.Group`.

  Raises:
    Mistake: some do not come within `START` seconds.
  """
  end = time.monotonic() + START
  here = socket.gethostname()[:200]
  if group.index > 0:
    hello = dict(word=WORD, index=group.index, count=group.count, host=here)
    return {0: group.host, group.index: here}, {0: ask(group, hello, end)}
  hosts, peers = {0: here}, dict[int, socket.socket]()
  try:
    with listen(group) as server:
      while len(peers) < group.count - 1:
        server.settimeout(max(0.01, end - time.monotonic()))
        peer, _ = server.accept()
        if (came := welcome(peer, group, peers)) is not None:
          peers[came["index"]], hosts[came["index"]] = peer, came["host"]
  except OSError as error:
    missing = ", ".join(str(i) for i in range(1, group.count) if i not in peers)
    why = f"within {START:g} seconds" if isinstance(error, TimeoutError) else sentence(error)
    raise Mistake(f"process {missing} did not come to {group.coordinator}: {why}") from error
  for peer in peers.values():
    with contextlib.suppress(OSError):  # of one that is gone already, which `Watch` tells
      peer.sendall(b"\n")  # all are there
  return hosts, peers


def ask(group: Any, hello: dict[str, Any], end: float) -> socket.socket:
  """A connection to process 0, as soon as that listens and once all others have come."""
  while True:
    try:
      peer = socket.create_connection((group.host, group.port), timeout=5)
      peer.sendall(json.dumps(hello).encode().ljust(HELLO))
      peer.settimeout(max(0.01, end - time.monotonic()))
      if peer.recv(1) == b"\n":
        return peer
      raise ConnectionError("it closed the connection")
    except OSError as error:
      if time.monotonic() > end:
        raise Mistake(
          f"process 0 did not answer at {group.coordinator} within {START:g} seconds, or others "
          f"did not come: {sentence(error)}"
        ) from error
    time.sleep(0.2)


def listen(group: Any) -> socket.socket:
  """The port of the coordinator, at all addresses of this machine."""
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  return socket.create_server(
    ("", group.port), family=family, dualstack_ipv6=dual, backlog=group.count
  )


def welcome(peer: socket.socket, group: Any, peers: Any) -> dict[str, Any] | None:
  """What another process says first; None if the peer is none of ours."""
  peer.settimeout(5)
  text = b""
  with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
    while len(text) < HELLO and (more := peer.recv(HELLO - len(text))):
      text += more
    hello = json.loads(text)
    same = hello["word"] == WORD and hello["count"] == group.count
    if same and hello["index"] in set(range(1, group.count)) - set(peers):
      return hello
  peer.close()
  return None


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Why all have to end: process `index` is gone, or failed and said so."""

  index: int
  why: str
  gone: bool


class Watch(threading.Thread):
  """Tells that this process lives, hears whether others do, and ends it if one does not.

  Args:
    index: of this process.
    hosts: names by index; process 0 has all, and tells the others.
    peers: connections by index.
    patience: seconds of silence after which a process counts as gone.
  """

  def __init__(
    self, index: int, hosts: dict[int, str], peers: dict[int, socket.socket], patience: float
  ):
    super().__init__(name="watch", daemon=True)
    self.index, self.hosts, self.peers, self.patience = index, hosts, peers, patience
    self.lock = threading.RLock()  # of what follows, and of sending
    self.verdict: Verdict | None = None
    self.done: set[int] = set()
    self.settled = threading.Event()  # by a verdict, or since all are done
    self.taken = threading.Event()  # by the main thread, which speaks for itself
    self.code = 1
    self.heard = {i: (time.monotonic(), b"") for i in peers}  # when, and the start of a line

  def begin(self, program: str, lost: Callable[[], str]) -> None:
    """Starts; the arguments are those of `attnx.training.processes.guarded`."""
    self.program, self.lost = program, lost
    if self.index == 0:
      self.send(dict(hosts=sorted(self.hosts.items())))
    self.start()

  def run(self) -> None:
    beat, due = min(1.0, self.patience / 5), 0.0
    with selectors.DefaultSelector() as selector:
      for i, peer in self.peers.items():
        peer.settimeout(self.patience)
        selector.register(peer, selectors.EVENT_READ, i)
      while not self.settled.is_set():
        if (now := time.monotonic()) >= due:
          self.send({})
          due = now + beat
        for key, _ in selector.select(beat / 5):
          if not self.read(key.data):
            selector.unregister(key.fileobj)
        late = time.monotonic() - self.patience  # only after what had arrived was read
        for i, (when, _) in self.heard.items():
          if when < late and i not in self.done:
            self.judge(Verdict(i, f"nothing was heard of it for {self.patience:g} seconds", True))
    if self.verdict is not None:
      self.end(self.verdict)

  def read(self, i: int) -> bool:
    """What a peer says; whether it may say more."""
    try:
      data = self.peers[i].recv(1 << 16)
    except OSError:
      data = b""
    if not data:
      if i not in self.done:
        self.judge(Verdict(i, "its connection closed", True))
      return False
    *lines, rest = (self.heard[i][1] + data).split(b"\n")
    self.heard[i] = time.monotonic(), rest
    for message in map(json.loads, lines):
      if "why" in message:
        self.judge(Verdict(**message))
      self.hosts.update(message.get("hosts", ()))
      self.count(message.get("done", ()))
    return True

  def send(self, message: dict[str, Any]) -> None:
    with self.lock:
      for peer in self.peers.values():
        with contextlib.suppress(OSError):  # `read` says who is gone
          peer.sendall(json.dumps(message).encode() + b"\n")

  def judge(self, verdict: Verdict) -> None:
    """The first verdict holds; process 0 tells it to all."""
    with self.lock:
      if self.settled.is_set():
        return
      self.verdict = verdict
      if self.index in (0, verdict.index):
        self.send(dataclasses.asdict(verdict))
      self.settled.set()

  def count(self, done: Iterable[int]) -> None:
    """These processes have nothing left to do; process 0 says when that is so of all."""
    with self.lock:
      self.done.update(done)
      if self.done == set(self.hosts) and not self.settled.is_set():
        if self.index == 0:
          self.send(dict(done=sorted(self.done)))
        self.settled.set()

  def sentence(self, verdict: Verdict) -> str:
    how = "is gone" if verdict.gone else "failed"
    who = f"process {verdict.index} (host {self.hosts.get(verdict.index, 'unknown')})"
    try:
      lost = self.lost()
    except OSError as error:
      lost = sentence(error)
    return f"stopped: {who} {how}: {verdict.why}; {lost}"

  def part(self) -> None:
    """In the main thread: waits until all are done.

    Raises:
      Stopped: one will not be.
    """
    with self.lock:
      if self.index > 0:
        self.send(dict(done=[self.index]))
      self.count([self.index])
    self.settled.wait()
    if self.verdict is not None:
      self.taken.set()
      raise Stopped(self.sentence(self.verdict))

  def fail(self, error: BaseException) -> None:
    """In the main thread: tells the others, unless it is of them that something went wrong.

    An error that is no sentence of ours may be a collective's, whose peer is gone; of that, we hear
    at the same time or soon. One that is may come in all processes, and each shall tell its own.

    Raises:
      Stopped: another process is gone or failed.
    """
    ours = isinstance(error, Mistake | Stopped | KeyboardInterrupt)
    self.settled.wait(0.2 if ours else 2)
    codes = {Mistake: 2, KeyboardInterrupt: 130}
    self.taken.set()
    if self.verdict is not None and (self.verdict.gone or not ours):
      raise Stopped(self.sentence(self.verdict)) from error
    self.code = codes.get(type(error), getattr(error, "code", 1))
    name = "" if ours else f"{type(error).__name__}: "
    self.judge(Verdict(self.index, f"{name}{sentence(error)}"[:1000], False))

  def end(self, verdict: Verdict) -> None:
    """Ends this process soon after its main thread has spoken, or speaks if that does not.

    Not by way of the interpreter, whose main thread may not even end: executors, threads and exit
    hooks of Orbax and JAX wait for the dead. Where a process failed by itself, the others are often
    about to find the same, and have longer.
    """
    if self.taken.wait(GRACE[verdict.gone]):
      threading.main_thread().join(3)
    else:
      show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # which a progress bar hides
      print(f"{show_cursor}{self.program}: {self.sentence(verdict)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(self.code)
