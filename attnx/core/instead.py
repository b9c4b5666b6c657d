"""Functions that somebody above may run in another way: over the devices of a mesh, for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import functools
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])
INSTEAD: contextvars.ContextVar[Mapping[Callable, Callable]] = contextvars.ContextVar(
  "instead", default={}
)


def replaceable(function: Function) -> Function:
  """`function`, or what `replacing` has put in its place.

  Inside of `jax.shard_map` it is always the function itself: there, arrays are what a device has.
  """

  @functools.wraps(function)
  def run(*args, **kwargs):
    instead = INSTEAD.get().get(run)
    if instead is None or jax.sharding.get_abstract_mesh().manual_axes:
      return function(*args, **kwargs)
    return instead(*args, **kwargs)

  return run  # type: ignore[return-value]


@contextlib.contextmanager
def replacing(table: Mapping[Callable, Callable]) -> Iterator[None]:
  """Calls of functions that are keys of the table, while something is traced, go to its values.

  What was compiled before stays as it was compiled.
  """
  token = INSTEAD.set(table)
  try:
    yield
  finally:
    INSTEAD.reset(token)
