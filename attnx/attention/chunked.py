"""Linear memory in plain XLA: scan over key chunks and merge (arXiv:2112.05682)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.attention import reference
from attnx.attention.partial import Partial, merge
from attnx.attention.spec import AttentionSpec
from attnx.core.tokens import Tokens


def partial(q, k, v, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens, *, q_chunk=512, k_chunk=1024) -> Partial:
  """`reference.partial` in O(q_chunk * k_chunk) memory, forwards and backwards."""
  return reference.partial(q, k, v, spec, q_tokens, k_tokens)  # placeholder
