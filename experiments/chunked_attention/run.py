"""Chunked attention on a CPU: speed beside PyTorch's, and memory beside the definition's.

pip install -e . torch==2.13.0 && python -m experiments.chunked_attention.run
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

from attnx.attention import AttentionSpec, attend
from attnx.attention.masks import Causal, Window
from experiments import measure

HERE = pathlib.Path(__file__).parent
T, N, H, WINDOW = 8192, 8, 64, 512
SPECS = {
  "full": AttentionSpec(),
  "causal": AttentionSpec(mask=Causal()),
  "window": AttentionSpec(mask=Causal() & Window(before=WINDOW - 1)),
}
LENGTHS = (4096, 8192, 16384, 32768, 65536)


def times(repeats: int = 15) -> dict[str, float]:
  """Median seconds of a forward pass, float32, B = 1."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, T, N, H))
  ours = {
    f"attnx {name}": lambda f=jax.jit(lambda q, k, v, s=spec: attend(
      q, k, v, s, implementation="chunked"
    )): f(q, k, v).block_until_ready()
    for name, spec in SPECS.items()
  }  # fmt: skip
  tensors = [torch.from_numpy(np.array(jnp.swapaxes(x, 1, 2))) for x in (q, k, v)]
  theirs = torch.nn.functional.scaled_dot_product_attention
  with torch.inference_mode():
    np.testing.assert_allclose(
      attend(q, k, v, SPECS["causal"])[0, -1], theirs(*tensors, is_causal=True)[0, :, -1], atol=1e-5
    )
    return measure.interleaved(
      ours
      | {
        "torch full": lambda: theirs(*tensors),
        "torch causal": lambda: theirs(*tensors, is_causal=True),
      },
      repeats=repeats,
    )


def memory(length: int, implementation: str, *, gradient: bool) -> int:
  """Temporary bytes at T = S = length, N = 1."""
  shape = jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32)
  f = lambda q, k, v: attend(q, k, v, implementation=implementation)
  if gradient:
    return measure.temporary(jax.grad(lambda *qkv: f(*qkv).sum(), (0, 1, 2)), *(shape,) * 3)
  return measure.temporary(f, *(shape,) * 3)


def draw(seconds: dict[str, float], bytes_: dict[str, list[int]]) -> None:
  matplotlib.use("Agg")
  _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
  names = list(seconds)
  colours = ["#4c72b0" if name.startswith("attnx") else "#dd8452" for name in names]
  left.barh(names, [seconds[name] for name in names], color=colours)
  left.invert_yaxis()
  left.set(xlabel="seconds", title=f"forward, B=1 T=S={T} N={N} H={H}, float32")
  for name, values in bytes_.items():
    right.loglog(LENGTHS, np.array(values) / 2**20, "o-", label=name, base=2)
  square = 4 * np.square(np.array(LENGTHS, float)) / 2**20
  right.loglog(LENGTHS, square, "k:", label="one (T, T) array", base=2)
  right.set(xlabel="T = S", ylabel="MiB", title="compiled temporary memory, N=1 H=64")
  right.legend(frameon=False)
  plt.savefig(HERE / "plot.png", dpi=120)


def main() -> None:
  bytes_ = {
    name: [memory(length, "chunked", gradient=gradient) for length in LENGTHS]
    for name, gradient in (("forward", False), ("gradient", True))
  }
  at = LENGTHS.index(16384)
  saved = {
    name: memory(16384, "reference", gradient=name == "gradient") / values[at]
    for name, values in bytes_.items()
  }
  slopes = {k: np.polyfit(np.log(LENGTHS), np.log(v), 1)[0] for k, v in bytes_.items()}
  seconds = times()
  share = lambda a, b: seconds[a] / seconds[b]
  rate = 4 * T * T * N * H / 1e9
  claims = [
    ("FLOP rate of PyTorch's, full", 1 / share("attnx full", "torch full"), "at least 0.6"),
    ("FLOP rate of PyTorch's, causal", 1 / share("attnx causal", "torch causal"), "at least 0.6"),
    ("time, causal / full", share("attnx causal", "attnx full"), "at most 0.6"),
    (f"time, window of {WINDOW} / full", share("attnx window", "attnx full"), "at most 0.15"),
    ("memory, reference / chunked, forward, T=16384", saved["forward"], "at least 59"),
    ("memory, reference / chunked, gradient, T=16384", saved["gradient"], "at least 32"),
    ("exponent of memory in T, 4k to 64k, forward", slopes["forward"], "at most 1"),
    ("exponent of memory in T, 4k to 64k, gradient", slopes["gradient"], "at most 1"),
  ]
  table = [["claim", "measured", "bar"], *([a, f"{b:.3g}", c] for a, b, c in claims)]
  results = dict(
    machine=measure.machine(torch=torch.__version__),
    seconds=seconds,
    gflops={name: rate / value for name, value in seconds.items() if "full" in name},
    bytes=dict(lengths=LENGTHS, **bytes_),
    claims={name: value for name, value, _ in claims},
  )
  measure.write(HERE, results, table)
  draw(seconds, bytes_)


if __name__ == "__main__":
  main()
