"""ALiBi: scores fall with distance, at a rate fixed per head (Press et al., 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.attention.transforms import Transform
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens


@struct.dataclass
class Alibi(Transform):
  """s - m_n |position_q - position_k|, with m_n = 2^(-8 (n + 1) / N) for head n of N.

  Where N is no power of two, the first P heads (P the largest power of two below N) have the slopes
  of P heads, and the others the slopes 2^(-8 (2 j + 1) / 2P), j = 0, 1, .., of every other one of
  2P heads. Slopes belong to query heads. Without a causal mask the bias is symmetric. Scores
  (B, N, T, S); nothing is trained, and the bias is computed where it is used, in the dtype of the
  scores (arXiv:2108.12409).

  Attributes:
    num_heads: N.
  """

  num_heads: int = struct.static()

  def __post_init__(self):
    if self.num_heads < 1:
      raise ValueError(f"num_heads={self.num_heads} must be at least 1")

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    power = 2 ** (self.num_heads.bit_length() - 1)
    head = jnp.asarray(q.head).astype(scores.dtype)
    rank = jnp.where(head < power, head + 1, head - power + 0.5)
    slope = jnp.exp2(-8 * rank / power)
    # Positions are exact in floats near to the origin, and a pair costs no conversion.
    origin = q.position[..., :1, :1] if q.origin is None else q.origin
    at, of = (slope * (x - origin).astype(scores.dtype) for x in (q.position, k.position))
    return scores - jnp.abs(at - of)


ENTRY = Entry(
  make=Alibi, paper="arXiv:2108.12409", facts={"relative"}, tiny=dict(num_heads=4)
)
