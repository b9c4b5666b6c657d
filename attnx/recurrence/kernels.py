"""Which kernels compute recurrences, and a way to ask for others."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import contextvars
from typing import Any

import jax

from attnx.recurrence import mosaic_gpu, pallas_tpu

KERNELS: dict[str, Any] = {"pallas_tpu": pallas_tpu, "mosaic_gpu": mosaic_gpu}
NAMES = ("auto", *KERNELS, "chunked")
ASKED: contextvars.ContextVar[str] = contextvars.ContextVar("asked", default="auto")


@contextlib.contextmanager
def asking(implementation: str) -> Iterator[None]:
  """Recurrences that are traced inside run by one implementation.

  Args:
    implementation: "pallas_tpu" or "mosaic_gpu", which raise NotImplementedError where they cannot
      run; "chunked" for matrix products that XLA compiles; or "auto", which takes the kernels that
      can run, and else the products.

  Raises:
    ValueError: there is none of that name.
  """
  if implementation not in NAMES:
    raise ValueError(f"implementation={implementation!r} is not one of {', '.join(NAMES)}")
  token = ASKED.set(implementation)
  try:
    yield
  finally:
    ASKED.reset(token)


def chosen(xs: dict[str, jax.Array], chunk: int) -> Any:
  """The module whose `run` computes a call; None where products do. Arguments as for `refusal`.

  Raises:
    NotImplementedError: kernels were asked for that cannot run it.
  """
  asked = ASKED.get()
  if asked in KERNELS and (reason := KERNELS[asked].refusal(xs, chunk)) is not None:
    raise NotImplementedError(f"implementation={asked!r} {reason}")
  names = KERNELS if asked == "auto" else [asked]
  runs = lambda name: name in KERNELS and KERNELS[name].refusal(xs, chunk) is None
  return next((KERNELS[name] for name in names if runs(name)), None)
