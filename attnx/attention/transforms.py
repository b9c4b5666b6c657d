"""Transforms: edits of a score that see nothing but the score and the two tokens."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.core import struct
from attnx.core.tokens import Tokens


class Transform:
  """Maps scores (B, N, T, S) to scores of the same shape; as an edit, weights to weights."""

  needs: ClassVar[frozenset[str]] = frozenset()

  def table(self, query: jax.Array) -> jax.Array | None:
    """What `__call__` wants to know of each query, (B, T, N, R) of scaled queries (B, T, N, H).

    It comes back as `q.table`, (B, N, T, R). A relative embedding multiplies its R vectors here
    once a query and only gathers in `__call__`, where keys are many. None: nothing is wanted.
    """
    del query
    return None

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    raise NotImplementedError


class Readout:
  """Adds to the output what is read besides `value`: weights (B, N, T, S) to (B, N, T, V).

  Linear in the weights, so that it merges over keys like the output does. Relative values
  (arXiv:1803.02155) are one.
  """

  needs: ClassVar[frozenset[str]] = frozenset()

  def __call__(self, weights: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    raise NotImplementedError


@struct.dataclass
class SoftCap(Transform):
  """cap * tanh(s / cap)."""

  cap: float = struct.static(50.0)

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    return self.cap * jnp.tanh(scores / self.cap)


@struct.dataclass
class Add(Transform):
  """s + bias, an array indexed by place that broadcasts to (B, N, T, S)."""

  needs: ClassVar[frozenset[str]] = frozenset({"index", "parameters"})

  bias: jax.Array

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    return scores + pick(self.bias, q, k).astype(scores.dtype)


def pick(array: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
  """The entries of a dense (#B, #N, #T, #S) array that belong to a tile of tokens."""
  at = [q.batch, q.head, q.index, k.index]
  return array[tuple(0 if size == 1 else i for size, i in zip(array.shape, at, strict=True))]
