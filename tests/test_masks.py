"""Every mask: what it says of tiles, what attention makes of it, and what it declares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import B, CLOSE, H, K, N, assert_close, evaluate, inputs, instance, packed

from attnx.attention import AttentionSpec, attend, masks
from attnx.attention.masks import Range, Span
from attnx.core import registry
from attnx.core.tokens import Tokens

NAMES = registry.names("masks")


def dense(mask, q: Tokens, k: Tokens) -> np.ndarray:
  """Which pairs may meet, with padding left out, (B, N, T, S)."""
  rows, columns = q.rows(B, N), k.columns()
  visible = mask(rows, columns) & (rows.position >= 0) & (columns.position >= 0)
  shape = (B, N, q.index.shape[1], k.index.shape[1])
  return np.asarray(jnp.broadcast_to(visible, shape))


def span(tokens: Tokens, row: int, tile: slice) -> Span | None:
  """The ranges of the tokens of a tile that exist."""
  pick = lambda x: np.broadcast_to(x, (B, x.shape[1]))[row, tile]
  exists = pick(tokens.position) >= 0
  if not exists.any():
    return None
  whole = lambda x: Range(int(pick(x)[exists].min()), int(pick(x)[exists].max()))
  return Span(whole(tokens.index), whole(tokens.position), whole(tokens.segment))


def tiles(mask, q: Tokens, k: Tokens, bq: int, bk: int):
  """(what the mask says of it, the pairs of the tile that exist) for every tile and batch row."""
  visible = dense(mask, q, k)
  for row in range(B):
    for i in range(0, q.index.shape[1], bq):
      for j in range(0, k.index.shape[1], bk):
        at, of = slice(i, i + bq), slice(j, j + bk)
        sides = span(q, row, at), span(k, row, of)
        if None not in sides:
          there = [np.broadcast_to(x.position, (B, x.index.shape[1]))[row] >= 0 for x in (q, k)]
          yield sides, visible[row, :, at, of][:, there[0][at]][..., there[1][of]]


def assert_tiles_agree(mask, q: Tokens, k: Tokens, bq: int, bk: int):
  found = list(tiles(mask, q, k, bq, bk))
  stacked = [jax.tree.map(lambda *x: np.array(x), *side) for side in zip(*(s for s, _ in found))]
  empty, full = mask.block(*stacked)  # all at once, as plans ask
  for (sides, pairs), empty, full in zip(
    found, *(np.broadcast_to(x, len(found)) for x in (empty, full))
  ):
    assert not (empty and pairs.any()), f"{sides} is called empty"
    assert not full or pairs.all(), f"{sides} is called full"
  one = mask.block(*found[0][0])  # one with numbers
  first = tuple(bool(np.broadcast_to(x, len(found))[0]) for x in mask.block(*stacked))
  assert (bool(one.empty), bool(one.full)) == first


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_tiles_is_true_of_every_pair(name, seed):
  mask = instance("masks", name)
  q, k = packed(12, seed), packed(12, None if seed is None else seed + 1)
  same = registry.build("masks", "same_segment")
  for algebra in (mask, ~mask, mask & same, (mask | ~masks.Causal()) & ~same):
    for bq, bk in ((1, 1), (2, 3), (4, 4), (5, 2)):
      assert_tiles_agree(algebra, q, k, bq, bk)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_through_the_mask_is_softmax_over_the_pairs_that_meet(name, implementation):
  mask = instance("masks", name)
  q_tokens, k_tokens = packed(12), packed(12, seed=5)
  visible = dense(mask, q_tokens, k_tokens)

  def oracle(q, k, v):
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    weights = jnp.where(visible, jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5), 0.0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(total > 0, total, 1.0), v)
    return jnp.cos(out).sum(), out

  with jax.enable_x64(True):
    qkv = inputs(12, 12)
    out, grads = evaluate(AttentionSpec(mask=mask), qkv, q_tokens, k_tokens, implementation)
    expected, value = jax.grad(oracle, (0, 1, 2), has_aux=True)(*qkv)
    assert_close(out, value, **CLOSE)
    assert_close(tuple(grads[:3]), expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_causal_is_declared_exactly_where_later_keys_change_nothing(name):
  q, k, v = inputs(12, 12, np.float32)
  spec = AttentionSpec(mask=instance("masks", name))
  before, same = attend(q, k, v, spec), True
  for t in (0, 4, 10):
    later = jnp.arange(12)[:, None, None] > t
    after = attend(q, jnp.where(later, 3.0, k), jnp.where(later, -5.0, v), spec)
    same &= bool((after[:, : t + 1] == before[:, : t + 1]).all())
  assert same == ("causal" in registry.get("masks", name).facts)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_is_one_value_that_jit_takes_and_gives_back(name):
  mask = instance("masks", name)
  again = jax.jit(lambda mask: mask)(mask)
  assert type(again) is type(mask)
  q, k = packed(12), packed(12, seed=2)
  np.testing.assert_array_equal(dense(again, q, k), dense(mask, q, k))
