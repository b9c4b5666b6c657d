"""The series: attnx's implementations, cuDNN through JAX, tokamax, PyTorch; each as a `Run`.

What is not installed raises `Absent`; what cannot do a case raises NotImplementedError. Neither is
a mistake: the results keep the sentence.
"""

from __future__ import annotations

from collections.abc import Callable
import importlib.metadata
import importlib.util
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, api
from attnx.attention import attend as attnx_attend
from attnx.recurrence import kernels
from attnx.recurrence.delta import delta_rule
from attnx.recurrence.linear import linear_attention
from experiments.gpu_attention import cases
from experiments.gpu_attention.cases import Case

AUTO, OWN, CUDNN, CHUNKED = (f"attnx {name}" for name in ("auto", "mosaic_gpu", "cudnn", "chunked"))
RAW, XLA, TOKAMAX, SDPA, FLEX = (
  "JAX cuDNN", "JAX XLA", "tokamax Mosaic", "PyTorch FlashAttention", "FlexAttention"
)  # fmt: skip
PLAIN, COPY, RECURRENT = "attnx mosaic_gpu, full mask", "device copy", "attnx recurrence"
CHUNK = 64  # tokens, as the kernels take them


class Absent(Exception):
  """A peer that is not installed here, or has no device."""


class Run:
  """A compiled series: `__call__` does it some times over and waits; `results` are arrays."""

  def __init__(self, call: Callable[[], Any], wait: Callable[[Any], Any], results: Callable):
    self.call, self.wait, self.results = call, wait, results

  def __call__(self, times: int = 1) -> None:
    for _ in range(times):
      last = self.call()  # enqueued: the device is never waiting for the next one
    self.wait(last)


def compiled(case: Case, given: tuple[jax.Array, ...], forward: Callable) -> Run:
  """A JAX function of q, k, v, .. or the pull-back of its gradients of q, k and v alone."""
  if case.direction == "forward":
    program = jax.jit(forward).lower(*given).compile()
    call = lambda: program(*given)
    named = lambda: {"out": program(*given)}
  else:
    make = jax.jit(lambda q, k, v, *rest: jax.vjp(lambda *qkv: forward(*qkv, *rest), q, k, v)[1])
    pull, dout = make(*given), cases.cotangent(case)
    program = jax.jit(lambda pull, dout: pull(dout)).lower(pull, dout).compile()
    call = lambda: program(pull, dout)
    named = lambda: dict(zip("qkv", call(), strict=True))
  corner = lambda: {name: cases.corner(case, name, x) for name, x in named().items()}
  return Run(call, jax.block_until_ready, corner)


def attend(implementation: str, full: bool = False) -> Callable[[Case, tuple], Run]:
  """attnx's `attend`; `full` leaves the mask and the edits of scores out."""

  def make(case: Case, given: tuple) -> Run:
    spec, q_tokens, k_tokens = cases.described(case)
    if implementation not in ("auto", *api.IMPLEMENTATIONS):
      raise Absent(f"attnx has no implementation {implementation!r} yet")
    if implementation == "chunked" and case.slow:
      raise NotImplementedError(f"left out above T={case.sizes.chunked}")
    spec = AttentionSpec() if full else spec
    where = dict(q_tokens=q_tokens, k_tokens=k_tokens, implementation=implementation)
    return compiled(case, given[:3], lambda q, k, v: attnx_attend(q, k, v, spec, **where))

  return make


def jax_nn(implementation: str) -> Callable[[Case, tuple], Run]:
  def make(case: Case, given: tuple) -> Run:
    if implementation == "xla" and case.T * case.S > case.sizes.xla**2:
      raise NotImplementedError(f"left out above T={case.sizes.xla}")
    if implementation == "cudnn" and jax.default_backend() != "gpu":
      raise Absent(f"cuDNN runs on NVIDIA GPUs, not on {jax.default_backend()}")
    call = lambda q, k, v: jax.nn.dot_product_attention(
      q, k, v, is_causal=case.mask != "full", implementation=implementation
    )
    return compiled(case, given[:3], call)

  return make


def tokamax(case: Case, given: tuple) -> Run:
  installed("tokamax", "tokamax==0.0.12")
  if jax.default_backend() != "gpu":
    raise Absent(f"its Mosaic kernel runs on NVIDIA GPUs, not on {jax.default_backend()}")
  import tokamax as library

  call = lambda q, k, v: library.dot_product_attention(
    q, k, v, is_causal=case.mask != "full", implementation="mosaic"
  )
  return compiled(case, given[:3], call)


def recurrent(case: Case, given: tuple) -> Run:
  """attnx's recurrences, on a GPU in its kernels."""
  chunk = min(CHUNK, case.T)
  if case.mask == "gated_delta":
    call = lambda q, k, v, decay, beta: delta_rule(q, k, v, beta, decay, chunk=chunk)[0]
  else:
    call = lambda q, k, v, decay: linear_attention(q, k, v, decay, chunk=chunk)[0]
  with kernels.asking("mosaic_gpu" if jax.default_backend() == "gpu" else "auto"):
    return compiled(case, given, call)


def copy(case: Case, given: tuple) -> Run:
  """Keys, negated: reads and writes as many bytes as decoding reads of keys and values."""
  program = jax.jit(jnp.negative).lower(given[1]).compile()
  return Run(lambda: program(given[1]), jax.block_until_ready, dict)


def installed(name: str, wanted: str = "") -> None:
  if not importlib.util.find_spec(name):
    raise Absent(f"{name} is not installed: pip install {wanted or name}")


def pytorch(case: Case, given: tuple, attention: Callable) -> Run:
  """A PyTorch function of q, k, v (B, N, T, H), which are views of JAX's arrays."""
  import torch

  dlpack = lambda x: torch.from_dlpack(x).transpose(1, 2)
  q, k, v = (dlpack(x).requires_grad_(case.direction == "backward") for x in given[:3])
  wait = lambda _: torch.cuda.synchronize()
  numpy = lambda x: x.detach().transpose(1, 2).float().cpu().numpy()
  call: Callable[[], Any]
  if case.direction == "forward":
    call = torch.no_grad()(lambda: attention(q, k, v))
    named = lambda: {"out": numpy(call())}
  else:
    out, dout = attention(q, k, v), dlpack(cases.cotangent(case))
    call = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    named = lambda: {name: numpy(x) for name, x in zip("qkv", call(), strict=True)}
  corner = lambda: {name: cases.corner(case, name, x) for name, x in named().items()}
  return Run(call, wait, corner)


def with_cuda() -> Any:
  installed("torch")
  import torch

  if not torch.cuda.is_available():
    raise Absent("PyTorch sees no GPU")
  return torch


def sdpa(case: Case, given: tuple) -> Run:
  torch = with_cuda()
  from torch.nn import attention

  def call(q, k, v):
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
      return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=case.mask != "full", enable_gqa=case.N != case.K
      )

  return pytorch(case, given, call)


def flex(case: Case, given: tuple) -> Run:
  torch = with_cuda()
  from torch.nn.attention import flex_attention

  score_mod, mask_mod = cases.flex(case, torch)
  tiles = flex_attention.create_block_mask(mask_mod, None, None, case.T, case.S, device="cuda")
  fast = torch.compile(flex_attention.flex_attention, dynamic=False)
  return pytorch(
    case, given, lambda q, k, v: fast(q, k, v, score_mod=score_mod, block_mask=tiles)
  )


SERIES: dict[str, Callable[[Case, tuple], Run]] = {
  AUTO: attend("auto"), OWN: attend("mosaic_gpu"), CUDNN: attend("cudnn"),
  CHUNKED: attend("chunked"), PLAIN: attend("mosaic_gpu", full=True), RAW: jax_nn("cudnn"),
  XLA: jax_nn("xla"), TOKAMAX: tokamax, SDPA: sdpa, FLEX: flex, RECURRENT: recurrent, COPY: copy,
}  # fmt: skip
OF_KIND = {
  "plain": (AUTO, OWN, CUDNN, CHUNKED, RAW, XLA, TOKAMAX, SDPA),
  "special": (AUTO, OWN, CHUNKED, PLAIN, FLEX),
  "decode": (AUTO, OWN, CHUNKED, RAW, TOKAMAX, SDPA, COPY),
  "recurrence": (RECURRENT, AUTO, OWN, RAW, TOKAMAX, SDPA),
}
IN_TORCH = (SDPA, FLEX)  # compile one after the other
UNCHECKED = (PLAIN, COPY)  # and, beside recurrences, all of attention: another kind checks it


def versions() -> dict[str, str]:
  """Of the device, its driver and the libraries."""
  device: Any = jax.devices()[0]
  found = dict(device=device.device_kind, platform=device.client.platform_version.split("\n")[0])
  for name in ("jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "tokamax", "torch"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "absent"
  try:
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm",
             "--format=csv,noheader"]
    found["driver"] = subprocess.check_output(query, text=True, timeout=20).strip()
  except (OSError, subprocess.SubprocessError):
    found["driver"] = "no nvidia-smi"
  return found


def relative_error(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
  """The largest |a - b| / |b| of any result, in the Euclidean norm."""
  return max(
    float(np.linalg.norm(actual[name] - wanted) / np.linalg.norm(wanted))
    for name, wanted in expected.items()
  )
