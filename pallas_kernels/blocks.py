"""Block sizes of the kernels, per chip and shape, as data: `blocks/*.json`."""

from __future__ import annotations

from pallas_kernels.tpu.streaming import Blocks


def choose(kernel: str, T: int, S: int, H: int, V: int, dtype) -> Blocks:
  """How a kernel cuts the work of a shape on the present chip."""
  fit = lambda length, size: min(size, -(-length // 128) * 128)
  q, k = fit(T, 512), fit(S, 1024)
  rows, columns = (next(s for s in (most, 256, 128) if n % s == 0) for n, most in ((q, 256), (k, 512)))
  return Blocks(q, k, rows, columns, 1)
