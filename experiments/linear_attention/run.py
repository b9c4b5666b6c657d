"""Linear attention with a decay beside chunked softmax attention: time and memory of gradients.

pip install -e . && python -m experiments.linear_attention.run
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from attnx.attention import AttentionSpec, attend
from attnx.attention.masks import Causal
from attnx.recurrence.linear import linear_attention
from experiments import measure

HERE = pathlib.Path(__file__).parent
N, H, LENGTHS = 8, 64, (1024, 2048, 4096, 8192)


def linear(q, k, v, log_decay):
  return linear_attention(q, k, v, log_decay)[0]


def softmax(q, k, v, log_decay):
  return attend(q, k, v, AttentionSpec(mask=Causal()), implementation="chunked")


def gradient(f):
  return jax.grad(lambda *args: jnp.cos(f(*args)).sum(), (0, 1, 2, 3))


RUNS = {
  "linear, forward": linear,
  "softmax, forward": softmax,
  "linear, gradient": gradient(linear),
  "softmax, gradient": gradient(softmax),
}


def times(length: int, repeats: int) -> dict[str, float]:
  """Median seconds, float32, B = 1; a scalar decay for every step and head."""
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v = (jax.random.normal(key, (1, length, N, H)) for key in keys[:3])
  log_decay = -jax.nn.softplus(jax.random.normal(keys[3], (1, length, N, 1)) - 3)
  args = q, k, v, log_decay
  runs = {name: jax.jit(f) for name, f in RUNS.items()}
  return measure.interleaved(
    {name: lambda f=f: jax.block_until_ready(f(*args)) for name, f in runs.items()},
    repeats=repeats,
  )


def memory(length: int) -> tuple[int, int]:
  """Temporary bytes of the gradient of linear attention, and bytes of its inputs."""
  shapes = [jax.ShapeDtypeStruct((1, length, N, width), jnp.float32) for width in (H, H, H, 1)]
  return measure.temporary(gradient(linear), *shapes), sum(4 * s.size for s in shapes)


def draw(seconds: dict[int, dict[str, float]]) -> None:
  matplotlib.use("Agg")
  _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  for name in RUNS:
    style = ("-" if "forward" in name else "--", "#4c72b0" if "linear" in name else "#dd8452")
    axes.loglog(
      LENGTHS, [seconds[t][name] for t in LENGTHS], style[0], marker="o", color=style[1],
      label=name, base=2,
    )  # fmt: skip
  axes.set(xlabel="T", ylabel="seconds", title=f"B=1 N={N} H=V={H}, float32, causal")
  axes.legend(frameon=False)
  plt.savefig(HERE / "plot.png", dpi=120)


def main() -> None:
  seconds = {length: times(length, repeats=7) for length in LENGTHS}
  temporary, inputs = np.array([memory(length) for length in LENGTHS]).T
  slope = np.polyfit(inputs, temporary, 1)[0]
  at = seconds[LENGTHS[-1]]
  ratio = lambda kind: at[f"softmax, {kind}"] / at[f"linear, {kind}"]
  claims = [
    ("softmax / linear, time of the forward pass, T=8192", ratio("forward"), "at least 4"),
    ("softmax / linear, time of the gradient, T=8192", ratio("gradient"), "at least 4"),
    ("temporary memory of the gradient, slope over that of the inputs", slope, "at most 3"),
  ]
  table = [["claim", "measured", "bar"], *([a, f"{b:.3g}", c] for a, b, c in claims)]
  results = dict(
    machine=measure.machine(),
    seconds=seconds,
    bytes=dict(lengths=LENGTHS, temporary=temporary.tolist(), inputs=inputs.tolist()),
    claims={name: value for name, value, _ in claims},
  )
  measure.write(HERE, results, table)
  draw(seconds)


if __name__ == "__main__":
  main()
