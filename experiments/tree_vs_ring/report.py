"""results.json, and the tables of README.md and the plot that are made of it.

python -m experiments.tree_vs_ring.report
"""

from __future__ import annotations

from collections.abc import Sequence
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import re
from typing import Any

from experiments import measure

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results.json"
BUTTERFLY, ALL_REDUCE, PARTIALS, KEYS = (
  "tree, butterfly", "tree, all-reduce", "ring of partials", "ring of keys"
)  # fmt: skip
FLAT = (BUTTERFLY, ALL_REDUCE, PARTIALS, KEYS)
MIB, GIB = 2**20, 2**30


def load() -> dict[str, Any]:
  return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(name: str, results: Any) -> None:
  """Puts what one script found, and where, beside what the others did."""
  versions = {}
  if name != "measured" and importlib.util.find_spec("libtpu"):
    versions["libtpu"] = importlib.metadata.version("libtpu")
  found = load() | {name: results}
  found.setdefault("machine", {})[name] = measure.machine(**versions)
  RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def wire(run: dict) -> float:
  """Seconds that a ring of keys takes at least: its bytes at the rate, a delay for each hop."""
  sent = 2 * run["keys"] * 8 * 64 * 2 * 8  # bits: keys and values, 8 heads of width 64, bfloat16
  return (run["machines"] - 1) * (sent / (run["gbit"] * 1e9) + run["delay_ms"] / 1e3)


def one(runs: list[dict], **where) -> dict:
  """The run that is so, and usual where nothing is said."""
  usual = dict(across_ms=None, query_heads=8, keys=16384, attended=64)
  found = [run for run in runs if all(run[k] == v for k, v in (usual | where).items())]
  assert len(found) == 1, (where, len(found))
  return found[0]


def milliseconds(seconds: float | None) -> str:
  if seconds is None:
    return ""
  return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def claims(found: dict) -> list[list[str]]:
  runs, exact = found["measured"], found["exact"]
  rows = [["claim", "found", "bar"]]
  for where in (name for name in exact if name != "shape"):
    held = [size[KEYS]["temporary"] / max(size[BUTTERFLY]["temporary"], 1)
            for size in exact[where].values()]  # fmt: skip
    least = f"{min(held):.3g}" if min(held) < 1e4 else "the tree holds nothing"
    rows.append([f"temporary memory, {KEYS} / tree, least of all P, {where}", least, "at least 2"])
  last = {where: exact[where]["64"] for where in exact if where != "shape"}
  steps = {size[BUTTERFLY]["steps"] for size in last.values()}
  rows.append(["steps of a butterfly, P=64", ", ".join(f"{x:g}" for x in steps), "log2 P = 6"])
  at = one(runs, machines=8, delay_ms=1, gbit=10)
  best = min(at["seconds"][name] for name in (BUTTERFLY, ALL_REDUCE))
  rows += [
    [f"8 machines, 1 ms, 10 Gbit/s: {KEYS} / tree, measured", f"{at['seconds'][KEYS] / best:.3g}",
     "at least 8"],
    ["the same, were the ring as quick as the wire allows", f"{wire(at) / best:.3g}", "at least 8"],
  ]  # fmt: skip
  whole = one(runs, machines=8, delay_ms=1, gbit=10, attended=16384)["seconds"]
  rows.append(["the same as measured, all 16k keys attended to, on 2 cores",
               f"{whole[KEYS] / whole[BUTTERFLY]:.3g}", "at least 8"])  # fmt: skip
  slow = one(runs, machines=8, delay_ms=5, gbit=10)["seconds"]
  rows.append([f"8 machines, 5 ms, 10 Gbit/s: {PARTIALS} / tree, measured",
               f"{slow[PARTIALS] / slow[BUTTERFLY]:.3g}", "at least 2"])  # fmt: skip
  return rows


def exact_table(found: dict, where: str = "v5p") -> list[list[str]]:
  names = dict(zip(FLAT, ("butterfly", "all-reduce", "partials", "keys"), strict=True))
  rows = [["P", *(f"steps, {names[n]}" for n in FLAT[:3]), *(f"sent, {names[n]}" for n in FLAT),
           "held, tree", "held, ring of keys"]]  # fmt: skip
  for size, costs in found["exact"][where].items():
    held = [f"{costs[n]['temporary'] / MIB:.3g} MiB" for n in (BUTTERFLY, KEYS)]
    sent = [human(costs[n]["sent"]) for n in FLAT]
    rows.append([size, *(f"{costs[n]['steps']:g}" for n in FLAT[:3]), *sent, *held])
  return rows


def human(size: float) -> str:
  units = ((GIB, "GiB"), (MIB, "MiB"), (2**10, "KiB"))
  unit, name = next((u for u in units if size >= u[0]), (1, "B"))
  return f"{size / unit:.4g} {name}"


def measured_table(found: dict) -> list[list[str]]:
  head = ["machines", "delay, ms", "Gbit/s", "query heads", "keys each", "attended to"]
  rows = [[*head, *FLAT, "ring of keys, wire"]]
  for run in found["measured"]:
    if run["across_ms"] is None:
      at = (run[k] for k in ("machines", "delay_ms", "gbit", "query_heads", "keys", "attended"))
      seconds = [milliseconds(run["seconds"].get(name)) for name in FLAT]
      rows.append([*(f"{x:g}" for x in at), *seconds, milliseconds(wire(run))])
  return rows


def levels_table(found: dict) -> list[list[str]]:
  runs = [run for run in found["measured"] if run["across_ms"] is not None]
  names = list(runs[0]["seconds"])
  rows = [["machines", "within, ms", "across, ms", *names]]
  for run in runs:
    at = (run[k] for k in ("machines", "delay_ms", "across_ms"))
    rows.append([*(f"{x:g}" for x in at), *(milliseconds(run["seconds"][n]) for n in names)])
  return rows


def memory_table(found: dict) -> list[list[str]]:
  rows = [["strategy", "arguments", "temporary", "share of 95 GiB"]]
  for name, parts in found["memory"].items():
    share = sum(parts.values()) / (95 * GIB)
    sizes = [f"{parts[k] / GIB:.3f} GiB" for k in ("arguments", "temporary")]
    rows.append([name, *sizes, f"{100 * share:.1f} %"])
  return rows


def put(mark: str, rows: Sequence[Sequence[str]], found: dict, text: str) -> str:
  """The text with the table, and what it was found on, between its marks."""
  head, *body = rows
  table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
  on = found["machine"].get(mark)
  note = "\n\n" + "On: " + ", ".join(f"{k} {v}" for k, v in on.items()) + "." if on else ""
  marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
  assert marks.search(text), mark
  return marks.sub(lambda m: f"{m[1]}{table}{note}\n{m[2]}", text)


def draw(found: dict) -> None:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  _, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
  colours = dict(zip(FLAT, ("#4c72b0", "#8172b3", "#dd8452", "#c44e52"), strict=True))
  runs = [one(found["measured"], machines=8, delay_ms=d, gbit=10) for d in (0.1, 1, 5)]
  delays = [run["delay_ms"] for run in runs]
  for name in FLAT:
    label = f"{name}, as measured" if name == KEYS else name
    seconds = [1e3 * run["seconds"][name] for run in runs]
    left.loglog(delays, seconds, "o-", color=colours[name], label=label)
  bound = [1e3 * wire(run) for run in runs]
  left.loglog(delays, bound, "--", color=colours[KEYS], label="ring of keys, the wire's bound")
  left.set(xlabel="one-way delay, ms", ylabel="ms for a token",
           title="8 machines, 10 Gbit/s, 16k keys each")  # fmt: skip
  left.set_xticks(delays, [f"{delay:g}" for delay in delays])
  left.minorticks_off()
  left.set_ylim(top=9e4)
  left.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
  exact = found["exact"]["v5p"]
  sizes = [int(size) for size in exact]
  for name in FLAT:
    style = dict(color=colours[name], label=name)
    steps, sent = ([costs[name][k] for costs in exact.values()] for k in ("steps", "sent"))
    middle.loglog(sizes, steps, {KEYS: "s:"}.get(name, "o-"), base=2, **style)
    right.loglog(sizes, sent, "o-", **style)
  middle.plot(sizes, [math.log2(size) for size in sizes], "k:", label="log2 P")
  middle.set(xlabel="P", title="steps one after the other, v5p")
  right.set_xscale("log", base=2)
  right.set(xlabel="P", ylabel="bytes", title="sent by a device for a token, v5p")
  middle.set_yticks([1, *sizes], [str(step) for step in (1, *sizes)])
  for ax in (middle, right):
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.legend(frameon=False, fontsize=8)
  plt.savefig(HERE / "plot.png", dpi=120)


def main() -> None:
  found = load()
  readme = HERE / "README.md"
  text = readme.read_text()
  tables = dict(claims=claims, exact=exact_table, measured=measured_table, levels=levels_table,
                memory=memory_table)  # fmt: skip
  for mark, table in tables.items():
    text = put(mark, table(found), found, text)
  readme.write_text(text)
  draw(found)


if __name__ == "__main__":
  main()
