"""Compiles a kernel for accelerators that this machine does not have, and reads its schedule.

  python -m pallas_kernels.aot --list                                # kernels of this package
  python -m pallas_kernels.aot streaming.full.forward                # one of them, on every TPU
  python -m pallas_kernels.aot 'streaming.*' --chips v5e,v6e --json  # names may be patterns
  python -m pallas_kernels.aot my.flash:case --chips v5p             # your own function
  python -m pallas_kernels.aot 'my.flash:case(block_q=512)'          # with keyword arguments

A case is a function that returns (fn, shapes): what to compile, and for each of its arguments a
jax.ShapeDtypeStruct or a tree of them.

  def case(block_q=256):                                             # in my/flash.py
    fn = functools.partial(flash, block_q=block_q, interpret=False)
    return fn, [jax.ShapeDtypeStruct((8, 4096, 128), jnp.bfloat16)] * 3

A case with a parameter `devices` is given those of the topology (four chips of a TPU) to build a
mesh of; its shapes then carry shardings, and the collectives of the program are counted. A kernel
that asks which chip it runs on (`pltpu.get_tpu_info()`) is told the one that it is compiled for.

libtpu holds the whole compiler (pip install 'jax[tpu]') and touches no TPU. h100 wants Python 3.12
or later and JAX's CUDA plugin (pip install 'jax[cuda13]'), and no GPU. What libtpu yields is a
static schedule: bundles are instructions of about one cycle each where nothing waits for memory,
and a share is the part of a unit's slots that they take. It is deterministic, so two versions of a
kernel can be compared on it exactly; it is not a time. pallas_kernels/schedule.py says what each
figure means. For h100 there is no such schedule: there a case shows that a kernel lowers and
assembles, the memory of its program, and the registers and spills of Mosaic GPU kernels.

Each case is compiled for each chip in a process of its own, since libtpu reads its flags once.
Exit status: 0; 1 where a case did not compile; 2 after a mistake in the command or the case.
"""

from __future__ import annotations

import argparse
import ast
import collections
import fnmatch
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from pallas_kernels import cases, schedule

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CHIPS = [*TOPOLOGIES, "h100"]
USAGE = 2  # exit status after a mistake of the user
UNCACHED = dict(JAX_ENABLE_COMPILATION_CACHE="false", JAX_TRACEBACK_FILTERING="off")
TPU_ENVIRONMENT = UNCACHED | dict(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_ACCELERATOR_TYPE="v5litepod-4",
  TPU_WORKER_HOSTNAMES="localhost",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no TPU is opened, so compilations may run side by side
)
GPU_ENVIRONMENT = UNCACHED | dict(
  JAX_PLATFORMS="cuda,cpu",
  JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
  MOSAIC_GPU_DUMP_PTXAS="1",  # what `assembled` reads
)
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
COLLECTIVE = re.compile(
  r" (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
  r"|collective-broadcast)(?:-start)?\("
)
INSTRUCTION = re.compile(r"(%[\w.-]+) = .* stack_frame_id=\d+\}")  # HLO within a message
PTXAS = re.compile(
  r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
  r".*?Used (\d+) registers", re.S
)  # fmt: skip
CUSTOM_CALL = re.compile(r'%(\S+) = .*custom_call_target="([^"]+)"')


class UsageError(Exception):
  """A mistake of the user; its one sentence says what to do instead."""


def split(target: str) -> tuple[str, dict[str, Any]]:
  """`name(key=value)` as the name and its options; the options may be left out."""
  name, bracket, inside = target.partition("(")
  if not bracket:
    return target, {}
  try:
    written = ast.parse(f"f({inside}", mode="eval").body
    if isinstance(written, ast.Call) and not written.args:
      return name, {str(word.arg): ast.literal_eval(word.value) for word in written.keywords}
  except (SyntaxError, ValueError):
    pass
  raise UsageError(f"cannot read {target!r}; options look like 'name(block_q=512, mask=\"full\")'")


def check(name: str) -> None:
  """Raises UsageError where `name` is no registered case and its module cannot be imported."""
  if name in cases.CASES:
    return
  if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
    known = ", ".join(sorted(cases.CASES)) or "none yet"
    raise UsageError(
      f"{name!r} is no registered case (those are: {known}); name your own function as "
      "module:function"
    )
  module = name.split(":")[0]
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:
    found = None
  if found is None:
    raise UsageError(f"no module {module!r} can be imported from {os.getcwd()}")


def find(name: str) -> cases.Case:
  """The function behind a registered name or `module:function`."""
  check(name)
  if name in cases.CASES:
    return cases.CASES[name]
  module, function = name.split(":")
  make = getattr(importlib.import_module(module), function, None)
  if not callable(make):
    raise UsageError(f"the module {module!r} has no function {function!r}")
  return make


def call(target: str, devices: Sequence[Any]) -> Any:
  """What the function of the case returns."""
  name, options = split(target)
  make = find(name)
  parameters = inspect.signature(make).parameters
  if "devices" in parameters:
    options["devices"] = devices
  try:
    inspect.signature(make).bind(**options)
  except TypeError as error:
    raise UsageError(f"{target}: {error}; its parameters are: {', '.join(parameters) or 'none'}")
  return make(**options)


def build(target: str, devices: Sequence[Any]) -> tuple[Any, Any]:
  """What to compile, and its shapes; those with no sharding go on the first device."""
  import jax
  from jax.sharding import SingleDeviceSharding

  made = call(target, devices)
  if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
    raise UsageError(f"{target} returned {type(made).__name__}; expected a tuple (fn, shapes)")
  fn, shapes = made
  shapes = shapes if isinstance(shapes, list | tuple) else [shapes]
  for leaf in jax.tree.leaves(shapes):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      raise UsageError(
        f"{target} returned {type(leaf).__name__} among its shapes; expected "
        "jax.ShapeDtypeStruct only"
      )
  first = SingleDeviceSharding(devices[0])
  place = lambda shape: shape.update(sharding=shape.sharding or first)
  return fn, jax.tree.map(place, shapes)


def installed(chip: str) -> None:
  """Raises UsageError, with the way to install it, where the compiler for `chip` is missing."""
  if chip in TOPOLOGIES and importlib.util.find_spec("libtpu") is None:
    raise UsageError(
      f"compiling for {chip} needs libtpu, which is not installed here: pip install 'jax[tpu]'"
    )
  if chip == "h100":
    if sys.version_info < (3, 12):
      raise UsageError("compiling for h100 needs Python 3.12 or later, for JAX's CUDA 13 plugin")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
      raise UsageError(
        "compiling for h100 needs JAX's CUDA plugin, which is not installed here: "
        "pip install 'jax[cuda13]'"
      )


def compiled(target: str, chip: str) -> tuple[Any, float]:
  """The compiled program, and the seconds that tracing, lowering and compiling took."""
  import jax
  from jax.experimental import topologies
  from jax.sharding import AbstractDevice, AbstractMesh

  if chip == "h100":
    topology = topologies.get_topology_desc(
      platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
  else:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    one: Any = topology.devices[0]
    device = AbstractDevice(one.device_kind, one.num_cores, platform="tpu")
  fn, shapes = build(target, topology.devices)
  begin = time.perf_counter()
  # Kernels that ask which chip they are for are told by the mesh of the context.
  with jax.sharding.use_abstract_mesh(AbstractMesh((), (), (), abstract_device=device)):
    lowered = jax.jit(fn).trace(*shapes).lower()
  return lowered.compile(), time.perf_counter() - begin


def report(target: str, chip: str, dump: pathlib.Path) -> dict[str, Any]:
  """Compiles in this process; `LIBTPU_INIT_ARGS` must send the dump to `dump`."""
  program, seconds = compiled(target, chip)
  memory, text = program.memory_analysis(), program.as_text()
  calls = CUSTOM_CALL.findall(text)
  pallas = {name for name, kind in calls if kind == "tpu_custom_call"}
  kernels = schedule.read(dump)
  return dict(
    case=target,
    chip=chip,
    seconds=round(seconds, 2),
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    collectives=dict(collections.Counter(COLLECTIVE.findall(text))),
    custom_calls=dict(collections.Counter(kind for _, kind in calls)),
    kernels={name: dict(pallas=name in pallas) | kernels[name] for name in kernels},
  )


def child(target: str, chip: str, folder: str) -> None:
  """The inner process: writes its report into `folder`, where libtpu dumps as well."""
  sys.path.insert(0, os.getcwd())
  try:
    installed(chip)
    figures = report(target, chip, pathlib.Path(folder, "dump"))
  except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(USAGE)
  pathlib.Path(folder, "report.json").write_text(json.dumps(figures))


def environment(chip: str, dump: pathlib.Path) -> dict[str, str]:
  """The variables of the inner process; libtpu's flags of the user stay."""
  if chip == "h100":
    return os.environ | GPU_ENVIRONMENT
  flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
  flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
  return os.environ | TPU_ENVIRONMENT | dict(LIBTPU_INIT_ARGS=flags)


def reason(stderr: str, code: int) -> str:
  """The message that a failed inner process ended with, on one line."""
  if code < 0:
    return f"the compiler was ended by signal {-code}; --traceback shows what it wrote"
  *_, last = re.split(r"^Traceback .*\n(?: .*\n)*", stderr, flags=re.M)
  last = INSTRUCTION.sub(r"\1", " ".join(last.split()))
  if len(last) > 600:
    last = f"{last[:300]} ... {last[-300:]}"
  return last or f"the compiler ended with status {code} and no message"


def assembled(output: str) -> dict[str, dict[str, int]]:
  """Registers of a thread and spilled bytes of each Mosaic GPU kernel, as ptxas prints them."""
  return {
    name: dict(registers=int(registers), stored=int(stored), loaded=int(loaded))
    for name, stored, loaded, registers in PTXAS.findall(output)
  }


def measure(
  target: str, chip: str, folder: pathlib.Path, traceback: bool = False
) -> dict[str, Any]:
  """The report of one case on one chip, from a process of its own; an `error` where it failed."""
  dump = folder / "dump"
  if dump.exists():
    raise UsageError(f"{dump} exists already; name another folder, or remove it")
  if re.search(r"\s", str(dump)):
    raise UsageError(f"libtpu cannot dump to {str(dump)!r}: its flags end at spaces")
  dump.mkdir(parents=True)
  command = [sys.executable, "-m", "pallas_kernels.aot", "--child", target, chip, str(folder)]
  run = subprocess.run(command, env=environment(chip, dump), capture_output=True, text=True)
  if run.returncode == 0:
    figures = json.loads((folder / "report.json").read_text())
    return figures | dict(assembled=assembled(run.stdout + run.stderr))
  if run.returncode == USAGE:
    raise UsageError(run.stderr.splitlines()[-1])
  if traceback:
    print(run.stderr, file=sys.stderr)
  return dict(case=target, chip=chip, error=reason(run.stderr, run.returncode))


def size(count: int | None) -> str:
  """Bytes for people."""
  if count is None:
    return "-"
  if count < 2**10:
    return f"{count} B"
  return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def spans(kernel: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  """What the table shows of a kernel: all of it, its hot span, its regions with matrix work."""
  regions = [(f"region {region['region']}", region) for region in kernel["regions"]]
  return [("all", kernel), ("hot", kernel["hot"]), *regions]


def shown(kernels: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """The kernels that the table shows: Pallas's and those with matrix work, else the longest."""
  chosen = {name: k for name, k in kernels.items() if k["pallas"] or k["floor"]}
  longest = sorted(kernels, key=lambda name: kernels[name]["bundles"])[-1:]
  return chosen or {name: kernels[name] for name in longest}


def table(figures: dict[str, Any]) -> str:
  """One report as text."""
  title = f"{figures['case']} on {figures['chip']}"
  if "error" in figures:
    return f"{title}: failed: {figures['error']}"
  count = lambda counts: ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"
  lines = [
    f"{title}: compiled in {figures['seconds']:.1f} s",
    f"  memory: arguments {size(figures['argument_bytes'])}, outputs "
    f"{size(figures['output_bytes'])}, temporaries {size(figures['temp_bytes'])}",
    f"  collectives: {count(figures['collectives'])}; custom calls: "
    f"{count(figures['custom_calls'])}",
  ]
  lines += [
    f"  kernel {name}: {kernel['registers']} registers; spills: {size(kernel['stored'])} stored, "
    f"{size(kernel['loaded'])} loaded"
    for name, kernel in figures["assembled"].items()
  ]
  units = ("MXU", "VALU", "XLU", "EUP", "VSTORE")
  for name, kernel in shown(figures["kernels"]).items():
    vmem = f"VMEM {size(kernel['vmem'])} ({size(kernel['vmem_spilled'])} of it spilled registers)"
    head = "".join(f"{word:>9}" for word in ("bundles", "floor", *units, "spills", "fills"))
    lines += [f"  kernel {name}: {vmem}", f"    {'':12}{head}"]
    for label, span in spans(kernel):
      shares = "".join(f"{span['share'][unit]:9.3f}" for unit in units)
      lines.append(
        f"    {label:12}{span['bundles']:9}{span['floor']:9}{shares}"
        f"{span['spills']:9}{span['fills']:9}"
      )
  return "\n".join(lines)


def chosen(targets: Sequence[str]) -> list[str]:
  """The targets, with patterns replaced by the registered names that they fit."""
  names: list[str] = []
  for target in targets:
    name, _ = split(target)
    fitting = [] if "(" in target else fnmatch.filter(sorted(cases.CASES), name)
    if not fitting:
      check(name)
    names += fitting or [target]
  return list(dict.fromkeys(names))


def parser() -> argparse.ArgumentParser:
  about, _, rest = (__doc__ or "").partition("\n\n")
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.aot",
    description=about,
    epilog=rest,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "cases", nargs="*", metavar="CASE",
    help="a registered name, a pattern of names, or module:function, with options: CASE(key=value)",
  )  # fmt: skip
  parser.add_argument(
    "--chips", default=",".join(TOPOLOGIES),
    help=f"some of {','.join(CHIPS)} (default: %(default)s)",
  )  # fmt: skip
  parser.add_argument("--json", action="store_true", help="print reports, not tables")
  parser.add_argument("--list", action="store_true", help="print the registered names and stop")
  parser.add_argument("--dump", metavar="FOLDER", help="keep all that the compiler writes, here")
  parser.add_argument(
    "--traceback", action="store_true", help="show all that a failed compilation wrote"
  )
  parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
  return parser


def sweep(
  targets: Sequence[str], chips: Sequence[str], folder: str, *, traceback: bool, tables: bool
) -> list[dict[str, Any]]:
  """Measures every case on every chip, and prints each table as it comes; returns the reports."""
  reports = []
  pairs = [(target, chip) for target in targets for chip in chips]
  for n, (target, chip) in enumerate(pairs, 1):
    print(f"[{n}/{len(pairs)}] {target} on {chip} ...", file=sys.stderr, flush=True)
    place = pathlib.Path(folder, f"{re.sub(r'[^A-Za-z0-9_.-]', '-', target)}-{chip}")
    reports.append(measure(target, chip, place, traceback))
    if tables:
      print(table(reports[-1]), end="\n\n", flush=True)
  return reports


def run(options: argparse.Namespace) -> int:
  """Exit status: 0, or 1 where a case did not compile."""
  if options.list:
    print("\n".join(sorted(cases.CASES)) or "no cases are registered yet; name module:function")
    return 0
  chips = options.chips.split(",")
  if wrong := [chip for chip in chips if chip not in CHIPS]:
    raise UsageError(f"--chips {wrong[0]!r} is not one of {', '.join(CHIPS)}")
  if not options.cases:
    raise UsageError("name a case: a registered one (see --list) or your own as module:function")
  for chip in chips:
    installed(chip)
  targets = chosen(options.cases)
  with tempfile.TemporaryDirectory(prefix="aot-") as scratch:
    folder = options.dump or scratch
    reports = sweep(
      targets, chips, folder, traceback=options.traceback, tables=not options.json
    )
  if options.json:
    print(json.dumps(reports, indent=2))
  return int(any("error" in figures for figures in reports))


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line."""
  options = parser().parse_args(arguments)
  if options.child:
    child(*options.child)
    return 0
  try:
    sys.path.insert(0, os.getcwd())
    return run(options)
  except UsageError as error:
    print(f"error: {error}", file=sys.stderr)
    return USAGE


if __name__ == "__main__":
  sys.exit(main())
