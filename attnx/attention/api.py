"""`attend`: one entry point, many implementations."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax

from attnx.attention import chunked, reference
from attnx.attention.partial import Partial
from attnx.attention.spec import AttentionSpec, Need
from attnx.core.tokens import Tokens


class UnsupportedError(NotImplementedError):
  """An implementation was asked for something that it does not offer."""


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute an `AttentionSpec`.

  Attributes:
    partial: (q, k, v, spec, q_tokens, k_tokens) -> Partial.
    offers: the needs that it can meet; see `AttentionSpec.needs`.
    refusal: says why a call cannot run here, or None when it can.
  """

  partial: Callable[..., Partial]
  offers: frozenset[str] = frozenset()
  refusal: Callable[..., str | None] = lambda q, k, v, spec: None

  def why_not(self, q, k, v, spec: AttentionSpec) -> str | None:
    if missing := spec.needs - self.offers:
      return f"does not offer {sorted(missing)}"
    return self.refusal(q, k, v, spec)


IMPLEMENTATIONS = {  # in order of preference
  "chunked": Implementation(chunked.partial, offers=frozenset(Need)),
  "reference": Implementation(reference.partial, offers=frozenset(Need)),
}


def choose(q, k, v, spec: AttentionSpec, implementation: str = "auto") -> Implementation:
  """The implementation that will run; raises `UnsupportedError` with the reason of each refusal."""
  names = list(IMPLEMENTATIONS) if implementation == "auto" else [implementation]
  refusals = {}
  for name in names:
    if name not in IMPLEMENTATIONS:
      raise ValueError(f"implementation={name!r} is not one of {list(IMPLEMENTATIONS)}")
    if (reason := IMPLEMENTATIONS[name].why_not(q, k, v, spec)) is None:
      return IMPLEMENTATIONS[name]
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
  """Attention.

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
  """
  q_tokens = Tokens.of_length(query.shape[1]) if q_tokens is None else q_tokens
  k_tokens = Tokens.of_length(key.shape[1]) if k_tokens is None else k_tokens
  impl = choose(query, key, value, spec, implementation)
  p = impl.partial(query, key, value, spec, q_tokens, k_tokens)
  return spec.finish(p).astype(value.dtype)


def attend_partial(
  query, key, value, spec, *, q_tokens, k_tokens, implementation="auto"
) -> Partial:
  """`attend` over some of the keys; `merge` partials, then `spec.finish`."""
  return choose(query, key, value, spec, implementation).partial(
    query, key, value, spec, q_tokens, k_tokens
  )
