"""Tree attention: keys sharded over devices, queries whole (arXiv:2408.04093)."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from attnx.attention import AttentionSpec, attend_partial
from attnx.attention.partial import Partial, merge_across
from attnx.core.tokens import Tokens


def tree_attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: AttentionSpec,
  *,
  q_tokens: Tokens,
  k_tokens: Tokens,
  axis_names: str | Sequence[str],
  implementation: str = "auto",
) -> jax.Array:
  """finish(merge over devices of attention over the keys of each): `attend` in `jax.shard_map`.

  Two all-reduces for each axis, of B T N and of B T N (V + 2) numbers, whatever the number of keys;
  each takes log2 P steps. This is what decoding wants, where T is small. Keys may lie in any order,
  and shards may be unlike: slots at negative positions hold nothing, and a shard may be empty.

  Args:
    query: (B, T, N, H), the same on every device of the axes.
    key: (B, S / P, K, H), a shard of the keys.
    value: (B, S / P, K, V).
    spec: what to compute.
    q_tokens: where the queries sit.
    k_tokens: where the keys of the shard sit: positions, and places (`index`), of the whole.
    axis_names: the mesh axes that keys are sharded over. Of several, those that come first are
      merged first: ("device", "node") merges inside of each node, then across nodes.
    implementation: as for `attend`.

  Returns:
    (B, T, N, V) in the dtype of `value`, the same on every device of the axes.

  Raises:
    NotImplementedError: the spec wants whole rows of keys, which no device has.
  """
  spec.must_merge()
  mine = attend_partial(
    query, key, value, spec, q_tokens=q_tokens, k_tokens=k_tokens, implementation=implementation
  )
  return spec.finish(merge_tree(mine, axis_names)).astype(value.dtype)


def merge_tree(p: Partial, axis_names: str | Sequence[str]) -> Partial:
  """`merge` over the devices of mesh axes, one axis after the other."""
  for axis_name in (axis_names,) if isinstance(axis_names, str) else axis_names:
    p = merge_across(p, axis_name)
  return p
