"""Windows over sharded sequences: only the keys at the borders travel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, attend
from attnx.attention.masks import Mask, Range, Span
from attnx.core.tokens import Tokens


def halo_attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec,
  *,
  q_tokens: Tokens,
  k_tokens: Tokens,
  axis_name: str,
  before: int,
  after: int = 0,
  inside: Callable[..., Any] = attend,
) -> Any:
  """`attend` where no query meets keys further away than its halo, inside `jax.shard_map`.

  Each device receives the last `before` keys of the devices before it and the first `after` keys of
  those after it, ceil(before / c) + ceil(after / c) sends for shards of c keys, and attends once.
  The mask must keep apart what is further away, as `Window(before, after)` does and a neighborhood
  of K rows of a grid, whose halo is (K - 1) rows at the most.

  Args:
    query: (B, c, N, H), a shard of the queries; shards are in the order of the tokens.
    key: (B, c, K, H), a shard of the keys.
    value: (B, c, K, V).
    spec: what to compute. Whole rows are here, so that every normaliser will do.
    q_tokens: where the queries of the shard sit: positions, and places (`index`), of the whole.
    k_tokens: where the keys of the shard sit, likewise.
    axis_name: the mesh axis that both are sharded over.
    before, after: how many places back and ahead a query may see; see `reach`.
    inside: what attends once the keys are there; `attend_partial` makes a `Partial` of the result.

  Returns:
    (B, c, N, V) in the dtype of `value`, sharded as the queries are.

  Raises:
    ValueError: the halo is negative, or wider than all other shards.
  """
  size, length = jax.lax.axis_size(axis_name), key.shape[1]
  if not (0 <= before <= (size - 1) * length and 0 <= after <= (size - 1) * length):
    raise ValueError(
      f"before={before} and after={after} must be in 0 .. {(size - 1) * length}, the keys of the"
      f" other {size - 1} devices"
    )
  tokens = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), key.shape[:2]), k_tokens)
  own = (key, value, tokens)
  around = [
    *(received(own, axis_name, hop, before - (hop - 1) * length)
      for hop in range(-(-before // length), 0, -1)),
    own,
    *(received(own, axis_name, -hop, after - (hop - 1) * length)
      for hop in range(1, -(-after // length) + 1)),
  ]  # fmt: skip
  key, value, k_tokens = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *around)
  return inside(query, key, value, spec, q_tokens=q_tokens, k_tokens=k_tokens)


def received(keys: Any, axis_name: str, hops: int, count: int) -> Any:
  """The last `count` keys of the device `hops` before, or the first of the one -`hops` after.

  Where there is no such device, as many places that hold nothing.
  """
  size = jax.lax.axis_size(axis_name)
  count = min(count, keys[0].shape[1])
  cut = slice(-count, None) if hops > 0 else slice(None, count)
  step = [(i, i + hops) for i in range(size) if 0 <= i + hops < size]
  key, value, tokens = jax.lax.ppermute(
    jax.tree.map(lambda x: x[:, cut], keys), axis_name, step
  )
  sender = jax.lax.axis_index(axis_name) - hops
  there = (sender >= 0) & (sender < size)
  position = jnp.where(there, tokens.position, -1)
  return key, value, Tokens(tokens.index, position, tokens.segment)


def reach(mask: Mask, length: int, size: int) -> tuple[int, int] | None:
  """How many places back and ahead of its shard a query may see, of a document over `size` shards.

  What the mask says about tiles decides: before and after are the fewest places such that no shard
  may meet any key further away. None where that is not known while a function is traced.
  """
  shard = length // size
  span = lambda first, last: Span(Range(first, last), Range(first, last), Range(0, 0))

  def apart(back: int, ahead: int) -> bool:
    for first in range(0, length, shard):
      q, last = span(first, first + shard - 1), first + shard - 1
      for k in ((0, first - back - 1), (last + ahead + 1, length - 1)):
        if k[0] <= k[1]:
          with jax.ensure_compile_time_eval():
            empty = mask.block(q, span(*k)).empty
          if not np.all(empty):
            return False
    return True

  def least(enough: Callable[[int], bool]) -> int:
    low, high = 0, length
    while low < high:
      middle = (low + high) // 2
      low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low

  try:
    return least(lambda n: apart(n, length)), least(lambda n: apart(length, n))
  except jax.errors.TracerArrayConversionError:
    return None
