"""Why is it slow, why does it not run: every implementation, its reason and its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax

from attnx.attention import api, plan
from attnx.attention.spec import AttentionSpec
from attnx.core.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Row:
  """What one implementation says of a call.

  Attributes:
    name: of the implementation.
    verdict: "runs" for the one that "auto" takes, "could run" for others, or why not.
    flops: of the two products over the tiles that it visits, forward; None where it cannot run.
    bytes: of the arguments and the result, which have to be moved at least once.
    memory: temporary bytes of the compiled forward pass on this backend.
  """

  name: str
  verdict: str
  flops: int | None = None
  bytes: int | None = None
  memory: int | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
  """A row for each implementation, and the tiles that it visits; prints as a table."""

  call: str
  rows: tuple[Row, ...]
  tiles: Mapping[str, plan.Summary]

  @property
  def runs(self) -> str | None:
    """The implementation that `attend` takes by itself; None if none can."""
    return next((row.name for row in self.rows if row.verdict == "runs"), None)

  def __str__(self) -> str:
    head = ("implementation", "verdict", "GFLOP", "MiB moved", "MiB temporary")
    size = lambda x, unit: "" if x is None else f"{x / unit:,.3f}"
    body = [
      (r.name, r.verdict, size(r.flops, 1e9), size(r.bytes, 2**20), size(r.memory, 2**20))
      for r in self.rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
      "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
      for row in (head, tuple("-" * width for width in widths), *body)
    ]
    tiles = [f"{name}: {summary}" for name, summary in self.tiles.items()]
    return "\n".join([self.call, *tiles, *lines])


def explain(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec = AttentionSpec(),
  *,
  q_tokens: Tokens | None = None,
  k_tokens: Tokens | None = None,
) -> Explanation:
  """What `attend` would do with these arguments, and what the alternatives cost.

  Nothing runs: arrays may be `jax.ShapeDtypeStruct`. The implementations that can run are compiled
  for the present backend, to read their memory.

  Args:
    query, key, value, spec, q_tokens, k_tokens: as for `attend`.

  Returns:
    An `Explanation`; print it.

  Raises:
    TypeError, ValueError: as `attend`.
  """
  api.check(query, key, value, spec, q_tokens, k_tokens)
  (B, T, N, H), (_, S, K, V) = query.shape, value.shape
  q_tokens = Tokens.of_length(T) if q_tokens is None else q_tokens
  k_tokens = Tokens.of_length(S) if k_tokens is None else k_tokens
  q, k, v = shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]
  moved = sum(x.size * x.dtype.itemsize for x in shapes) + B * T * N * V * value.dtype.itemsize
  tiles: dict[str, plan.Summary] = {}
  rows: list[Row] = []
  taken = api.choose(q, k, v, spec, q_tokens, k_tokens)
  for name, implementation in api.IMPLEMENTATIONS.items():
    if implementation.plan is not None and spec.needs <= implementation.offers:
      told = implementation.plan(spec, q, k, v, q_tokens, k_tokens)
      tiles |= {} if told is None else {name: told}
    if (reason := implementation.why_not(q, k, v, spec, q_tokens, k_tokens)) is not None:
      rows.append(Row(name, reason))
      continue
    memory = temporary(implementation.partial, shapes, spec, q_tokens, k_tokens)
    pairs = tiles[name].pairs if name in tiles else T * S
    flops = 2 * B * N * (H + V) * pairs
    rows.append(Row(name, "runs" if name == taken else "could run", flops, moved, memory))
  call = (
    f"B={B} T={T} S={S} N={N} K={K} H={H} V={V} {value.dtype.name} on {jax.default_backend()}, "
    f"needs {sorted(map(str, spec.needs)) or 'nothing'}\nmask {spec.mask}"
  )
  return Explanation(call, tuple(rows), tiles)


def explain_first(function: Callable[..., Any], *args: Any) -> Explanation | None:
  """`explain` of the first call of `attend` that a function makes; None if it makes none.

  Nothing runs: the function is traced, and arrays may be `jax.ShapeDtypeStruct`.

  Example:
    >>> print(explain_first(model, ids))                      # doctest: +SKIP
  """
  first: list[Explanation] = []

  def listen(q, k, v, spec, q_tokens, k_tokens):
    if not first:
      first.append(explain(q, k, v, spec, q_tokens=q_tokens, k_tokens=k_tokens))

  with api.listening(listen):
    jax.eval_shape(function, *args)
  return first[0] if first else None


def temporary(partial, shapes, spec: AttentionSpec, q_tokens, k_tokens) -> int | None:
  """Bytes that the compiled forward pass wants beside its arguments; None if XLA does not tell."""
  leaves, structure = jax.tree.flatten((spec, q_tokens, k_tokens))
  traced = {
    i: jax.ShapeDtypeStruct(x.shape, x.dtype)
    for i, x in enumerate(leaves)
    if isinstance(x, jax.core.Tracer)  # of a function around; here it is an argument
  }

  def run(q, k, v, traced):
    spec, *tokens = structure.unflatten(traced.get(i, x) for i, x in enumerate(leaves))
    return spec.finish(partial(q, k, v, spec, *tokens))

  analysis = jax.jit(run).lower(*shapes, traced).compile().memory_analysis()
  return None if analysis is None else analysis.temp_size_in_bytes
