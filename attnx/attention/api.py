"""`attend`: one entry point, many implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import chunked, cudnn, mosaic_gpu, pallas_tpu, reference
from attnx.attention import plan as plans
from attnx.attention.partial import Partial
from attnx.attention.spec import AttentionSpec, Need
from attnx.core.instead import replaceable
from attnx.core.tokens import Tokens
from attnx.core.varying import together


class UnsupportedError(NotImplementedError):
  """An implementation was asked for something that it does not offer."""


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute an `AttentionSpec`.

  Attributes:
    partial: (q, k, v, spec, q_tokens, k_tokens) -> Partial.
    offers: the needs that it can meet; see `AttentionSpec.needs`.
    refusal: (q, k, v, spec, q_tokens, k_tokens) -> why a call cannot run here, None when it can.
    plan: (spec, q, k, v, q_tokens, k_tokens) -> which tiles it visits, None if it
      cannot run the call; None: it knows no tiles.
    slower: (q, k, v, spec, q_tokens, k_tokens) -> the name of an implementation that was measured
      to be faster where both can run the call, None where none was.
  """

  partial: Callable[..., Partial]
  offers: frozenset[str] = frozenset()
  refusal: Callable[..., str | None] = lambda *call: None
  plan: Callable[..., plans.Summary | None] | None = None
  slower: Callable[..., str | None] = lambda *call: None

  def why_not(self, q, k, v, spec: AttentionSpec, *tokens: Tokens) -> str | None:
    if missing := spec.needs - self.offers:
      return f"does not offer {sorted(map(str, missing))}"
    return self.refusal(q, k, v, spec, *tokens)


TILES = frozenset(Need) - {Need.ROW}
IMPLEMENTATIONS = {  # in order of preference
  "pallas_tpu": Implementation(pallas_tpu.partial, TILES, pallas_tpu.refusal, pallas_tpu.summary),
  "cudnn": Implementation(
    cudnn.partial, frozenset({Need.INDEX, Need.PARAMETERS}), cudnn.refusal, slower=cudnn.slower
  ),
  "mosaic_gpu": Implementation(mosaic_gpu.partial, TILES, mosaic_gpu.refusal, mosaic_gpu.summary),
  "chunked": Implementation(chunked.partial, frozenset(Need), plan=plans.summary),
  "reference": Implementation(reference.partial, offers=frozenset(Need)),
}


LISTENER: contextvars.ContextVar = contextvars.ContextVar("listener", default=lambda *call: None)


@contextlib.contextmanager
def listening(listener: Callable[..., None]) -> Iterator[None]:
  """Tells `listener` the arguments (q, k, v, spec, q_tokens, k_tokens) of every call inside.

  Arguments may be traced. What was compiled before makes no calls.
  """
  token = LISTENER.set(listener)
  try:
    yield
  finally:
    LISTENER.reset(token)


def choose(q, k, v, spec: AttentionSpec, *tokens: Tokens, implementation: str = "auto") -> str:
  """The name of the implementation that will run.

  Raises:
    UnsupportedError: none can, with the reason of each refusal.
    ValueError: there is no implementation of that name.
  """
  call, refusals = (q, k, v, spec, *tokens), {}
  for name in IMPLEMENTATIONS if implementation == "auto" else [implementation]:
    if name not in IMPLEMENTATIONS:
      raise ValueError(f"implementation={name!r} is not one of {['auto', *IMPLEMENTATIONS]}")
    other = IMPLEMENTATIONS[name].slower(*call) if implementation == "auto" else None
    if other is not None and IMPLEMENTATIONS[other].why_not(*call) is None:
      return other  # before `name` is asked, which for cuDNN means to build the call
    if (reason := IMPLEMENTATIONS[name].why_not(*call)) is None:
      return name
    refusals[name] = reason
  raise UnsupportedError(
    "no implementation can run this call:\n"
    + "\n".join(f"  {name}: {reason}" for name, reason in refusals.items())
  )


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec = AttentionSpec(),
  *,
  q_tokens: Tokens | None = None,
  k_tokens: Tokens | None = None,
  implementation: str = "auto",
) -> jax.Array:
  """normaliser(mask(transforms(scale * q k^T))) v, for everything that a spec can say.

  Args:
    query: (B, T, N, H).
    key: (B, S, K, H); K divides N, and N / K query heads share a key head.
    value: (B, S, K, V).
    spec: what to compute.
    q_tokens: where the queries sit; default: positions 0 .. T-1 of one document.
    k_tokens: where the keys sit; default: positions 0 .. S-1 of one document.
    implementation: a name, or "auto" for the first that can run the call.

  Returns:
    (B, T, N, V) in the dtype of `value`. Rows with no visible key are zero.

  Raises:
    TypeError, ValueError: an argument is of the wrong kind, or shapes do not fit each other.
    UnsupportedError: no implementation can run the call.
  """
  p = attend_partial(
    query, key, value, spec, q_tokens=q_tokens, k_tokens=k_tokens, implementation=implementation
  )
  return spec.finish(p).astype(value.dtype)


@replaceable
def attend_partial(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec,
  *,
  q_tokens: Tokens | None = None,
  k_tokens: Tokens | None = None,
  implementation: str = "auto",
) -> Partial:
  """`attend` over some of the keys; `merge` the partials of all keys, then `spec.finish`."""
  check(query, key, value, spec, q_tokens, k_tokens)
  q_tokens = Tokens.of_length(query.shape[1]) if q_tokens is None else q_tokens
  k_tokens = Tokens.of_length(key.shape[1]) if k_tokens is None else k_tokens
  query, key, value = (jnp.asarray(x) for x in (query, key, value))
  if jax.sharding.get_abstract_mesh().manual_axes:  # tiles are skipped on each device by itself
    parts = together((query, key, value, spec, q_tokens, k_tokens))
    query, key, value, spec, q_tokens, k_tokens = parts
  LISTENER.get()(query, key, value, spec, q_tokens, k_tokens)
  name = choose(query, key, value, spec, q_tokens, k_tokens, implementation=implementation)
  return IMPLEMENTATIONS[name].partial(query, key, value, spec, q_tokens, k_tokens)


def check(q, k, v, spec, q_tokens: Tokens | None = None, k_tokens: Tokens | None = None) -> None:
  """Raises unless the arguments of `attend` are of the right kinds and fit each other."""
  for name, x, axes in (("query", q, "BTNH"), ("key", k, "BSKH"), ("value", v, "BSKV")):
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
      raise TypeError(f"{name} is a {type(x).__name__}; expected an array ({', '.join(axes)})")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f"{name} has dtype {x.dtype}; expected a floating one: cast it first")
    if len(x.shape) != 4 or 0 in x.shape:
      raise ValueError(f"{name} has shape {x.shape}; expected ({', '.join(axes)}), none of them 0")
  if not isinstance(spec, AttentionSpec):
    raise TypeError(f"spec is a {type(spec).__name__}; expected an AttentionSpec")
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  if k.shape[0] != B or k.shape[3] != H:
    raise ValueError(f"key has shape {k.shape}; expected ({B}, S, K, {H}) beside query {q.shape}")
  if v.shape[:3] != k.shape[:3]:
    raise ValueError(f"value has shape {v.shape}; expected ({B}, {S}, {K}, V) beside key {k.shape}")
  if N % K:
    raise ValueError(f"key has {K} heads, which must divide the {N} heads of query")
  for name, tokens, length in (("q_tokens", q_tokens, T), ("k_tokens", k_tokens, S)):
    if tokens is None:
      continue
    if not isinstance(tokens, Tokens):
      raise TypeError(f"{name} is a {type(tokens).__name__}; expected Tokens")
    for field in ("index", "position", "segment"):
      shape = getattr(tokens, field).shape
      if shape not in ((1, length), (B, length)):
        expected = f"(1, {length}) or ({B}, {length})"
        raise ValueError(f"{name}.{field} has shape {shape}; expected {expected}")
  has_array = lambda part: hasattr(part, "by_place")
  for part in filter(has_array, jax.tree.leaves(spec, is_leaf=has_array)):
    if part.by_place is None:  # numbered as of a larger call, which was checked
      continue
    name, array = part.by_place
    sizes = ((B,), (N,), places(q_tokens, T), places(k_tokens, S))
    if len(array.shape) != 4 or any(n != 1 and n not in m for n, m in zip(array.shape, sizes)):
      expected = f"(1 or {B}, 1 or {N}, 1 or {T}, 1 or {S})"  # a gather would not complain
      raise ValueError(f"a dense {name} has shape {array.shape}; expected {expected}")


def places(tokens: Tokens | None, length: int) -> range:
  """How many places an array may have for all of these tokens to have theirs in it."""
  if tokens is None:
    return range(length, length + 1)
  traced = isinstance(tokens.index, jax.core.Tracer)
  return range(length if traced else int(np.asarray(tokens.index).max()) + 1, sys.maxsize)
