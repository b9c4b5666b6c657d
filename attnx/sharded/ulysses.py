"""Ulysses: tokens sharded outside of attention, heads inside (arXiv:2309.14509)."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnx.attention import AttentionSpec, attend
from attnx.attention.masks import Block, Mask, Span
from attnx.attention.spec import Need
from attnx.attention.transforms import Readout, Transform
from attnx.core import struct
from attnx.core.tokens import Tokens


def ulysses_attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec,
  *,
  q_tokens: Tokens,
  k_tokens: Tokens,
  axis_name: str,
  inside: Callable[..., Any] = attend,
) -> Any:
  """`attend` of N / P heads over all tokens on each device, inside `jax.shard_map`.

  Four exchanges, all to all, of B T N H / P numbers or fewer: queries, keys and values to heads,
  the output back to tokens. Whole rows of keys meet on one device, so that every normaliser will
  do.

  Args:
    query: (B, T / P, N, H), a shard of the queries; P divides N.
    key: (B, S / P, K, H), a shard of the keys. P divides K; or K divides P, and P / K devices get
      the same key head.
    value: (B, S / P, K, V).
    spec: what to compute; parameters are whole.
    q_tokens: where the queries of the shard sit: positions, and places (`index`), of the whole.
    k_tokens: where the keys of the shard sit, likewise.
    axis_name: the mesh axis of the exchange.
    inside: what attends once tokens are together. `ring_attend` over another axis of the mesh, with
      its `axis_name` given, is the hybrid in which tokens are sharded over both axes;
      `attend_partial` makes a `Partial` of the result.

  Returns:
    (B, T / P, N, V) in the dtype of `value`, sharded as the queries are.

  Raises:
    ValueError: heads cannot be dealt out to the devices.
    NotImplementedError: the spec wants all heads of a score at once.
  """
  size, (N, K) = jax.lax.axis_size(axis_name), (query.shape[2], key.shape[2])
  if N % size or (K % size and size % K):
    raise ValueError(f"{N} heads and {K} key heads cannot be dealt out to {size} devices evenly")
  if Need.HEADS in spec.needs:
    raise NotImplementedError("the spec sees all heads at once, which are split here; use a ring")
  key, value = (jnp.repeat(x, max(size // K, 1), axis=2) for x in (key, value))
  exchange = lambda x, split, join: jax.lax.all_to_all(x, axis_name, split, join, tiled=True)
  query, key, value = (exchange(x, 2, 1) for x in (query, key, value))
  first = jax.lax.axis_index(axis_name) * (N // size)
  together = lambda tokens: jax.tree.map(
    lambda x: jax.lax.all_gather(jnp.asarray(x), axis_name, axis=1, tiled=True), tokens
  )
  out = inside(
    query, key, value, numbered(spec, head=first),
    q_tokens=together(q_tokens), k_tokens=together(k_tokens),
  )  # fmt: skip
  return jax.tree.map(lambda x: exchange(x, 1, 2), out)


def numbered(
  spec: AttentionSpec, *, batch: jax.Array | int = 0, head: jax.Array | int = 0
) -> AttentionSpec:
  """The spec for rows and heads of which the first are number `batch` and `head` of all."""
  first = jnp.asarray(batch, jnp.int32), jnp.asarray(head, jnp.int32)
  wrap = lambda kind, parts: tuple(kind(part, *first) for part in parts)
  return dataclasses.replace(
    spec,
    mask=NumberedMask(spec.mask, *first),
    transforms=wrap(NumberedTransform, spec.transforms),
    edits=wrap(NumberedTransform, spec.edits),
    readouts=wrap(NumberedReadout, spec.readouts),
  )


class Numbered:
  """A part of a spec, `inner`, that sees rows and heads from these numbers on."""

  by_place = None  # arrays of places belong to the larger call
  inner: Any
  batch: jax.Array
  head: jax.Array

  @property
  def needs(self) -> frozenset[str]:
    return self.inner.needs

  def __call__(self, *given: Any) -> jax.Array:
    *read, q, k = given  # scores, weights or nothing comes before the tokens
    q = dataclasses.replace(q, batch=q.batch + self.batch, head=q.head + self.head)
    return self.inner(*read, q, k)


@struct.dataclass
class NumberedMask(Numbered, Mask):
  """`inner`, a mask."""

  inner: Mask
  batch: jax.Array
  head: jax.Array

  def block(self, q: Span, k: Span) -> Block:
    return self.inner.block(q, k)


@struct.dataclass
class NumberedTransform(Numbered, Transform):
  """`inner`, a transform."""

  inner: Transform
  batch: jax.Array
  head: jax.Array

  def table(self, query: jax.Array) -> jax.Array | None:
    table, N = self.inner.table(query), query.shape[2]
    if table is None or table.shape[2] in (1, N):
      return table
    return jax.lax.dynamic_slice_in_dim(table, self.head, N, axis=2)  # of all heads, those here

  def widened(self, spec, q, k, *tokens, head=0):
    return self.inner.widened(spec, q, k, *tokens, head=self.head + head)


@struct.dataclass
class NumberedReadout(Numbered, Readout):
  """`inner`, a readout."""

  inner: Readout
  batch: jax.Array
  head: jax.Array
