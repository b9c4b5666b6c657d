"""Transforms: edits of a score that see nothing but the score and the two tokens."""

from __future__ import annotations

import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.masks import pick
from attnx.core import random, struct
from attnx.core.tokens import Tokens


class Transform:
  """Maps scores (B, N, T, S) to scores of the same shape; as an edit, weights to weights."""

  needs: ClassVar[frozenset[str]] = frozenset()

  def table(self, query: jax.Array) -> jax.Array | None:
    """What `__call__` looks up, (#B, #T, #N, R) of scaled queries (B, T, N, H).

    It comes back as `q.table`, a `Table`. A relative embedding multiplies its R vectors here once a
    query and only looks up in `__call__`, where keys are many; a bias that is learned for each head
    gives its rows as they are, (1, 1, N, R). None: nothing is wanted.
    """
    del query
    return None

  def widened(self, spec: Any, q: jax.Array, k: jax.Array, *tokens: Tokens, head: Any = 0) -> Any:
    """(q, k, spec) of the same attention where this transform, the first of a spec, is in q and k.

    For what adds products of a vector of the query and one of the key: they are appended to q and
    k, and kernels, which have no products but those, read wider heads. By default nothing changes.
    The heads of q are those from `head` on.
    """
    return q, k, spec

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
    return self.cap * jnp.tanh(scores * (1 / self.cap))


@struct.dataclass
class Add(Transform):
  """s + bias, an array indexed by place that broadcasts to (B, N, T, S)."""

  needs: ClassVar[frozenset[str]] = frozenset({"index", "parameters"})

  bias: jax.Array

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    return scores + pick(self.bias, q, k).astype(scores.dtype)

  @property
  def by_place(self) -> tuple[str, jax.Array]:
    """The array that is indexed by place, for `attend` to check."""
    return "bias", self.bias


@struct.dataclass
class Dropout(Transform):
  """As an edit: w / (1 - rate) where the hash of (key, batch, head, place_q, place_k) keeps it.

  Attributes:
    key: a JAX key; the same key drops the same weights in every implementation and layout.
    rate: share that is dropped, in [0, 1).
    shared: drop the same pairs of places in every row of the batch and every head.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"index"})

  key: jax.Array
  rate: float = struct.static()
  shared: bool = struct.static(False)

  def __post_init__(self):
    if not 0 <= self.rate < 1:
      raise ValueError(f"rate={self.rate} must be in [0, 1)")

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    pair = (q.index, k.index) if self.shared else (q.batch, q.head, q.index, k.index)
    kept = random.keep(self.key, self.rate, *pair)
    return jnp.where(kept, scores / (1 - self.rate), 0.0)


@struct.dataclass
class ZeroHeads(Transform):
  """0 for the chosen heads, s for all others.

  As an edit these heads are ablated: what they read is exactly zero, as if their rows of the output
  projection were removed, and nothing is normalised again. As the last transform under softmax they
  are uniform: they weigh all n keys that the row can see by 1 / n.

  Attributes:
    num_heads: N.
    heads: the chosen ones.

  Raises:
    ValueError: `heads` are not some of 0 .. N - 1.
  """

  num_heads: int = struct.static()
  heads: tuple[int, ...] = struct.static()

  def __post_init__(self):
    object.__setattr__(self, "heads", tuple(self.heads))  # a config gives a list
    if not self.heads or not set(self.heads) <= set(range(self.num_heads)):
      raise ValueError(f"heads={self.heads} must be some of 0 .. {self.num_heads - 1}")

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    chosen = functools.reduce(operator.or_, (q.head == head for head in self.heads))
    return jnp.where(chosen, 0.0, scores)
