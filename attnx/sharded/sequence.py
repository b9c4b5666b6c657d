"""Models whose sequences are shared by devices: what mixes tokens goes over a mesh, unseen by it.

Inside of `over(mesh)` arrays are whole, as everywhere outside of `jax.shard_map`, and XLA splits
what works on each token alone. Attention and recurrences, which XLA would gather, run by the
functions of this package instead: attention as a ring, as a tree where that sends less, with halos
where a mask keeps apart what is far; where a normaliser wants whole rows by heads, or over keys
that are gathered; recurrences by a scan over devices.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, attend_partial
from attnx.attention.api import check, listening
from attnx.attention.masks import Range, Span
from attnx.attention.partial import Partial
from attnx.attention.spec import Need
from attnx.core.instead import replacing
from attnx.core.tokens import Tokens
from attnx.sharded.halo import halo_attend, reach
from attnx.sharded.recurrent import RECURRENCES, recurrence
from attnx.sharded.ring import ring_partial, to_zigzag
from attnx.sharded.rules import ROWS, SEQ, TENSOR, rows
from attnx.sharded.tree import merge_tree
from attnx.sharded.ulysses import numbered, ulysses_attend


def over(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
  """Attention and recurrences that are traced inside run over the axes of a mesh of `rules`.

  Values are those of one device but for rounding. Rows are split over "data" and "fsdp", tokens
  over "seq", heads over "tensor", each where it divides them; tokens of attention always. A
  recurrence over tokens that "seq" does not divide is left to XLA.

  Example:
    >>> with over(make_mesh(seq=8)):                          # doctest: +SKIP
    ...   logits = jax.jit(model)(ids)
  """
  if not shared(mesh) and (mesh.size == 1 or jax.default_backend() != "tpu"):
    return contextlib.nullcontext()  # XLA splits rows by itself, but no kernel for TPUs
  table: dict[Any, Callable] = {attend_partial: functools.partial(attention, mesh)}
  for function, how in RECURRENCES.items():
    table[function] = functools.partial(recurrence, mesh, function, how)
  return replacing(table)


def shared(mesh: Mesh) -> bool:
  """Whether devices share the tokens or the heads of the same rows."""
  return mesh.shape[SEQ] * mesh.shape[TENSOR] > 1


class Way(NamedTuple):
  """How attention goes over the devices that share a sequence.

  Attributes:
    name: "alone", "halo", "heads", "gather", "tree", "zigzag" or "ring".
    before, after: of a halo.
  """

  name: str
  before: int = 0
  after: int = 0

  def __str__(self) -> str:
    return {
      "alone": "each device has all tokens",
      "halo": f"devices exchange {self.before} keys before and {self.after} after their own",
      "heads": "tokens are exchanged for heads, since the normaliser wants whole rows",
      "gather": "each device gathers the keys, since the normaliser wants whole rows and all heads",
      "tree": "queries are everywhere, and what devices see of their keys is merged in a tree",
      "zigzag": "keys go round a ring, early and late tokens together on each device",
      "ring": "keys go round a ring",
    }[self.name]


def way(
  query: Any,
  key: Any,
  value: Any,
  spec: AttentionSpec,
  q_tokens: Tokens | None,
  k_tokens: Tokens | None,
  *,
  mesh: Mesh,
) -> Way:
  """How attention goes over a mesh: by what sends least, and is able to.

  A tree sends what is read, in float32, twice; a ring the keys and values; halos less, where the
  mask keeps apart what is far in a sequence of one document. Where queries see no later keys, the
  first devices of a ring would have next to nothing to do: tokens are dealt out anew, in zigzag,
  while it goes round. Whole rows of keys meet in halos, or where heads are dealt out, or else where
  every device gathers the keys.
  """
  (_, T, N, H), (_, S, K, V) = query.shape, value.shape
  size, parts = mesh.shape[SEQ], mesh.shape[TENSOR]
  if size == 1:
    return Way("alone")
  if T == S and T % size == 0 and in_order(q_tokens, T) and in_order(k_tokens, S):
    far = reach(spec.mask, T, size)
    if far is not None and 2 * sum(far) <= (size - 1) * (T // size):
      return Way("halo", *far)
  if Need.ROW in spec.needs:
    if split_heads(N, K, spec, parts):
      N, K = N // parts, max(K // parts, 1)
    dealt = N % size == 0 and (K % size == 0 or size % K == 0) and Need.HEADS not in spec.needs
    return Way("heads" if dealt else "gather")
  tree, ring = 2 * T * N * (V + 3) * 4, S * K * (H + V) * value.dtype.itemsize
  if T < size or tree <= ring:
    return Way("tree")
  early, late = (Span(at := Range(n, n), at, Range(0, 0)) for n in (0, 1))
  looks = spec.mask.block(early, late).empty, spec.mask.block(late, early).empty
  causal = T == S and T % (2 * size) == 0 and looks[0] is True and looks[1] is False
  return Way("zigzag" if causal else "ring")


def in_order(tokens: Tokens | None, length: int) -> bool:
  """Whether tokens are known to be one document from its beginning."""
  if tokens is None:
    return True
  leaves = (tokens.index, tokens.position, tokens.segment)
  if not all(isinstance(x, np.ndarray) and len(x) == 1 for x in leaves):
    return False
  index, position, segment = (x[0] for x in leaves)
  place = np.arange(length)
  return bool(np.all(index == place) and np.all(position == place) and not np.any(segment))


def split_heads(N: int, K: int, spec: AttentionSpec, parts: int) -> bool:
  """Whether `parts` devices can have heads of their own, perhaps with key heads that they share."""
  return N % parts == 0 and (K % parts == 0 or parts % K == 0) and Need.HEADS not in spec.needs


def first_way(function: Callable[..., Any], mesh: Mesh, *args: Any) -> str:
  """How the first call of attention in a function goes over a mesh, in words; nothing runs."""
  found: list[Way] = []
  with listening(lambda *call: found.append(way(*call, mesh=mesh))):
    jax.eval_shape(lambda *args: function(*args), *args)  # traced anew, whatever was traced before
  return f"{SEQ}={mesh.shape[SEQ]}, {found[0]}" if found else "no call of attention"


def attention(
  mesh: Mesh,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec,
  *,
  q_tokens: Tokens | None = None,
  k_tokens: Tokens | None = None,
  implementation: str = "auto",
) -> Partial:
  """`attend_partial` of whole arrays, over a mesh."""
  check(query, key, value, spec, q_tokens, k_tokens)
  (B, T, N, _), K = query.shape, key.shape[2]
  size, parts = mesh.shape[SEQ], mesh.shape[TENSOR]
  batch = ROWS if B % rows(mesh) == 0 else None
  heads = None
  how = way(query, key, value, spec, q_tokens, k_tokens, mesh=mesh)
  if split_heads(N, K, spec, parts):
    heads, (key, value) = TENSOR, (jnp.repeat(x, max(parts // K, 1), axis=2) for x in (key, value))
  whole = (("alone", "tree"), ("alone", "gather"))
  q_axis, k_axis = (None if how.name in ways else SEQ for ways in whole)
  query, q_tokens = filled(query, q_tokens, size if q_axis else 1)
  (key, value), k_tokens = filled((key, value), k_tokens, size if k_axis else 1)
  places = lambda tokens, axis: jax.tree.map(
    lambda x: PartitionSpec(batch if x.shape[0] > 1 else None, axis), tokens
  )

  def body(query, key, value, spec, q_tokens, k_tokens):
    first = lambda axis, count: jax.lax.axis_index(axis) * count if axis is not None else 0
    spec = numbered(
      spec, batch=first(batch, query.shape[0]), head=first(heads, query.shape[2])
    )
    run = dict(q_tokens=q_tokens, k_tokens=k_tokens)
    inside = functools.partial(attend_partial, implementation=implementation)
    match how:
      case Way("ring"):
        return ring_partial(query, key, value, spec, **run, axis_name=SEQ)
      case Way("zigzag"):
        here = to_zigzag((query, key, value, run), SEQ)
        p = ring_partial(*here[:3], spec, **here[3], axis_name=SEQ)
        return to_zigzag(p, SEQ, back=True)
      case Way("heads"):
        return ulysses_attend(query, key, value, spec, **run, axis_name=SEQ, inside=inside)
      case Way("halo", before, after):
        run |= dict(before=before, after=after)
        return halo_attend(query, key, value, spec, **run, axis_name=SEQ, inside=inside)
      case Way("tree"):
        return merge_tree(inside(query, key, value, spec, **run), SEQ, reduction)
    return inside(query, key, value, spec, **run)

  # Between processes on CPUs an all-reduce takes 2 (P - 1) steps; see experiments/tree_vs_ring.
  reduction = "butterfly" if jax.default_backend() == "cpu" else "all_reduce"
  q_place, k_place = (PartitionSpec(batch, axis, heads) for axis in (q_axis, k_axis))
  p = jax.shard_map(
    body,
    mesh=mesh,
    in_specs=(
      q_place, k_place, k_place, PartitionSpec(),
      places(q_tokens, q_axis), places(k_tokens, k_axis),
    ),
    out_specs=q_place,
    check_vma=how.name != "tree" or reduction != "butterfly",
  )(query, key, value, spec, q_tokens, k_tokens)  # fmt: skip
  return jax.tree.map(lambda x: x[:, :T], p)


def filled(arrays: Any, tokens: Tokens | None, size: int) -> tuple[Any, Tokens]:
  """Arrays (B, L, ...) and their tokens, with places that hold nothing up to a multiple of size."""
  length = jax.tree.leaves(arrays)[0].shape[1]
  tokens = Tokens.of_length(length) if tokens is None else tokens
  if more := -length % size:
    fill = lambda x: jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)])
    # XLA before JAX 0.12 confuses sharded pads of one array with two constants: the others repeat.
    np_of = lambda x: np if isinstance(x, np.ndarray) else jnp
    repeat = lambda x: np_of(x).pad(x, [(0, 0), (0, more)], mode="edge")
    empty = lambda x: np_of(x).pad(x, [(0, 0), (0, more)], constant_values=-1)
    arrays = jax.tree.map(fill, arrays)
    tokens = Tokens(repeat(tokens.index), empty(tokens.position), repeat(tokens.segment))
  return arrays, jax.tree.map(jnp.asarray, tokens)
