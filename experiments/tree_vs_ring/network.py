"""Machines of a network on one machine: a namespace each, with delays and a rate between them."""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import pathlib
import shutil
import subprocess
import tempfile

RELAY = pathlib.Path(__file__).parent / "relay.c"


def shell(command: str) -> None:
  subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)


def address(machine: int) -> str:
  return f"10.77.0.{machine + 1}"


class Network(contextlib.ExitStack):
  """Namespaces that see each other as 10.77.0.1, 10.77.0.2, ..; all is gone on exit.

  `kind` is "netem" where the kernel has it (veth pairs, a bridge, `tc netem` on each machine), else
  "relay": a TAP device each, and relay.c between them. Wants root.
  """

  def __init__(self, size: int, kind: str | None = None) -> None:
    super().__init__()
    self.size, self.kind = size, kind
    self.names = [f"attnx{i}" for i in range(size)]

  def __enter__(self) -> Network:
    super().__enter__()
    try:
      for name in self.names:
        shell(f"ip netns add {name}")
        self.callback(shell, f"ip netns del {name}")
      self.kind = self.kind or ("netem" if has_netem(self.names[0]) else "relay")
      {"netem": self.join_by_bridge, "relay": self.join_by_relay}[self.kind]()
      for i in range(self.size):
        self.configure(i)
    except BaseException:
      self.close()
      raise
    return self

  def join_by_bridge(self) -> None:
    shell("ip link add attnx type bridge")
    self.callback(shell, "ip link del attnx")
    for name in self.names:
      shell(f"ip link add {name} type veth peer name net0 netns {name}")
      self.callback(shell, f"ip link del {name}")
      shell(f"ip link set {name} master attnx mtu 65000 up")
    shell("ip link set attnx mtu 65000 up")

  def join_by_relay(self) -> None:
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    shell(f"{shutil.which('cc')} -O2 -o {folder / 'relay'} {RELAY}")
    self.relay = subprocess.Popen(
      [folder / "relay", *self.names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.callback(self.relay.wait)
    self.callback(self.relay.terminate)
    assert self.relay.stdout.readline() == "ok\n"

  def configure(self, machine: int) -> None:
    """Addresses, known neighbours, and buffers for what is under way at 10 Gbit/s and 5 ms."""
    name, mac = self.names[machine], "02:00:00:00:00:{:02x}"
    inside = f"ip netns exec {name}"
    shell(f"ip -n {name} link set lo up")
    shell(f"ip -n {name} link set net0 address {mac.format(machine + 1)} mtu 65000 up")
    shell(f"ip -n {name} addr add {address(machine)}/24 dev net0")
    for i in set(range(self.size)) - {machine}:
      shell(f"ip -n {name} neigh add {address(i)} lladdr {mac.format(i + 1)} dev net0")
    for which in ("rmem", "wmem"):
      command = f"{inside} sysctl -q -w net.ipv4.tcp_{which}".split()
      subprocess.run([*command[:-1], command[-1] + "=4096 4194304 67108864"], check=True)
    shell(f"{inside} sysctl -q -w net.ipv4.tcp_slow_start_after_idle=0")

  def shape(
    self, delay_ms: float, gbit: float, *, across_ms: float | None = None, per_node: int = 1
  ) -> None:
    """One-way delay of every hop and rate of every machine; `across_ms` is between nodes."""
    across_ms = delay_ms if across_ms is None else across_ms
    if self.kind == "relay":
      line = f"{1e3 * delay_ms} {1e3 * across_ms} {1e3 * gbit} {per_node}\n"
      self.relay.stdin.write(line)
      self.relay.stdin.flush()
      assert self.relay.stdout.readline() == "ok\n"
      return
    if across_ms != delay_ms:
      raise NotImplementedError("delays that differ by node want the relay: kind='relay'")
    for name in self.names:
      shell(
        f"ip netns exec {name} tc qdisc replace dev net0 root netem "
        f"delay {delay_ms}ms rate {gbit}gbit limit 100000"
      )

  def command(self, machine: int, words: Sequence[str]) -> list[str]:
    """The command, run on a machine whose host name is its address."""
    name = f"hostname {address(machine)}; exec \"$@\""
    enter = ["ip", "netns", "exec", self.names[machine]]
    return [*enter, "unshare", "--uts", "sh", "-c", name, "sh", *words]


def has_netem(namespace: str) -> bool:
  command = f"ip netns exec {namespace} tc qdisc add dev lo root netem delay 1ms"
  return subprocess.run(command.split(), capture_output=True).returncode == 0
