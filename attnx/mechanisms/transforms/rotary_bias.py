"""Rotary bias: what two learned vectors, turned by their positions, have in common (Mega)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.attention.transforms import Transform
from attnx.core import struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.rotary import angles, frequencies


@struct.dataclass
class RotaryBias(Transform):
  """s + <R(position_q) alpha_n, R(position_k) beta_n>, R the rotations of RoPE (arXiv:2209.10655).

  The product depends on the distance alone, without a table and so without a longest one: it is
  sum_j u_j cos(w_j d) - v_j sin(w_j d), d = position_q - position_k. A tile wants the cosines and
  sines of its rows and columns, never of its pairs.

  Attributes:
    alpha, beta: (N, R), float32, R even.
    base: w_j = base^(-2 j / R).
  """

  needs: ClassVar[frozenset[str]] = frozenset({"parameters"})

  alpha: jax.Array
  beta: jax.Array
  base: float = struct.static(10_000.0)

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    at, of = self._turned(q, k, scores.dtype)
    return scores + jnp.einsum("bntr,bnsr->bnts", at, of, precision="highest")

  def widened(self, spec, q, k, *tokens, head=0):
    """scale * [q, at / scale] [k, of]^T, with at (#B, T, N, R) and of (#B, S, 1, R), rounded as q.

    In bfloat16 that costs what the rounding of q and k costs: 2^-8 of a product. Where a later
    transform has a table, which it makes of queries, or the scale is zero or traced, nothing
    changes.
    """
    N, scale = q.shape[2], spec.factor(q.shape[3])
    rest = spec.transforms[1:]
    looks = any(type(transform).table is not Transform.table for transform in rest)
    known = not isinstance(scale, jax.core.Tracer)
    if looks or not known or scale == 0:
      return q, k, spec
    dtype, rows = jnp.promote_types(q.dtype, jnp.float32), tokens[0].rows(1, N)
    rows = dataclasses.replace(rows, head=rows.head + head)
    at, of = self._turned(rows, tokens[1].columns(), dtype)

    def join(x, y):
      y = jnp.broadcast_to(jnp.swapaxes(y, 1, 2), (*x.shape[:3], y.shape[3]))
      return jnp.concatenate([x, y.astype(x.dtype)], axis=-1)

    return join(q, at / scale), join(k, of), dataclasses.replace(spec, scale=scale, transforms=rest)

  def _turned(self, q: Tokens, k: Tokens, dtype) -> tuple[jax.Array, jax.Array]:
    """Vectors (#B, N, T, R) and (#B, 1, S, R) whose products are added to scores."""
    origin = q.position[:, :, :1]  # small angles are exact ones, and only differences count
    frequency = frequencies(self.alpha.shape[-1], self.base)
    turn = lambda x: angles(x, frequency, dtype)
    at, of = turn((q.position - origin)[..., 0]), turn((k.position - origin)[..., 0, :])
    u, v = (x.astype(dtype)[jnp.asarray(q.head)[..., 0]] for x in self._products())
    cos, sin = jnp.cos(at), jnp.sin(at)  # (#B, 1, T, R/2)
    at = jnp.concatenate([u * cos - v * sin, u * sin + v * cos], axis=-1)
    return at, jnp.concatenate([jnp.cos(of), jnp.sin(of)], axis=-1)

  def _products(self) -> tuple[jax.Array, jax.Array]:
    """The real and the imaginary part of alpha_j conj(beta_j), (N, R/2)."""
    (a, b), (c, d) = (jnp.split(jnp.asarray(x), 2, axis=-1) for x in (self.alpha, self.beta))
    return a * c + b * d, b * c - a * d


def rotary_bias(
  num_heads: int, head_dim: int, base: float = 10_000.0, *, rngs: nnx.Rngs
) -> RotaryBias:
  """`RotaryBias` of vectors as wide as a head, drawn with deviation 0.02.

  Raises:
    ValueError: `head_dim` is odd.
  """
  frequencies(head_dim, base)  # refuses odd widths here, and not in the first call
  alpha, beta = (0.02 * jax.random.normal(rngs.params(), (num_heads, head_dim)) for _ in range(2))
  return RotaryBias(alpha, beta, base)


ENTRY = Entry(make=rotary_bias, paper="arXiv:2209.10655", facts={"relative"})
