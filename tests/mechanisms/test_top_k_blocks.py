"""Blocks chosen by content."""

import dataclasses

import jax
import numpy as np
import pytest
from specs import inputs, pairs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core.tokens import Tokens
from attnx.mechanisms.masks.top_k_blocks import select, top_k_blocks


def moba(q, k, block: int, top_k: int) -> np.ndarray:
  """Which pairs the published rule lets meet, one query at a time, (B, N, T, S)."""
  (B, T, N, _), K = q.shape, k.shape[2]
  visible = np.zeros((B, N, T, T), bool)
  for b, n, t in np.ndindex(B, N, T):
    keys, own = k[b, :, n // (N // K)], t // block
    gate = [keys[i * block : (i + 1) * block].mean(0) @ q[b, t, n] for i in range(own)]
    chosen = {own, *np.argsort(-np.array(gate), kind="stable")[: top_k - 1].tolist()}
    visible[b, n, t] = [j <= t and j // block in chosen for j in range(T)]
  return visible


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_selection_is_mixture_of_block_attention(top_k):
  q, k, _ = inputs(13, 13, np.float32)
  mask = select(q, k, top_k=top_k, k_block=3) & masks.Causal()
  np.testing.assert_array_equal(
    pairs(mask, 13, heads=4, batch=2), moba(*map(np.asarray, (q, k)), 3, top_k)
  )


def test_one_block_is_the_own_one_and_enough_blocks_are_causal_attention():
  q, k, _ = inputs(12, 12, np.float32)
  own = pairs(select(q, k, top_k=1, k_block=4), 12, heads=4, batch=2)
  np.testing.assert_array_equal(own[0, 0], np.kron(np.eye(3), np.ones((4, 4))))
  every = select(q, k, top_k=3, k_block=4) & masks.Causal()
  np.testing.assert_array_equal(pairs(every, 12, heads=4)[0, 0], np.tri(12))


@pytest.mark.parametrize("q_block", [1, 4])
def test_later_tokens_choose_nothing_for_earlier_ones(q_block):
  q, k, v = inputs(12, 12, np.float32)

  @jax.jit
  def run(q, k, v):
    chosen = select(q, k, top_k=2, k_block=3, q_block=q_block)
    return attend(q, k, v, AttentionSpec(mask=chosen & masks.Causal()))

  for t in (2, 5, 9):
    later = (np.arange(12) > t)[None, :, None, None]
    moved = run(*(np.where(later, -2.0 * x[:, ::-1], x) for x in (q, k, v)))
    np.testing.assert_array_equal(moved[:, : t + 1], run(q, k, v)[:, : t + 1])


def test_without_order_the_means_of_both_blocks_decide_and_padding_has_no_part():
  q, k, _ = map(np.asarray, inputs(6, 8, np.float32))
  position = np.array([[0, 1, 2, 3, 4, -1, 6, 7]])
  k_tokens = dataclasses.replace(Tokens.of_length(8), position=position)
  mask = select(q, k, None, k_tokens, top_k=1, k_block=2, q_block=3, causal=False)
  kept = [[0, 1], [2, 3], [4], [6, 7]]
  for b, n, i in np.ndindex(2, 4, 2):
    query = q[b, 3 * i : 3 * i + 3, n].mean(0)
    best = np.argmax([k[b, block, n // 2].mean(0) @ query for block in kept])
    np.testing.assert_array_equal(np.flatnonzero(mask.selected[b, n, i]), [best])


def test_blocks_of_other_documents_do_not_compete():
  q, k, _ = inputs(12, 12, np.float32)
  where = dataclasses.replace(Tokens.of_length(12), segment=(np.arange(12) >= 6)[None].astype(int))
  chosen = select(q, k, where, where, top_k=2, k_block=3).selected
  assert not chosen[:, :, 6:, :2].any() and (chosen[:, :, 9:, 2:].sum(-1) == 2).all()


def test_ties_go_to_the_first_and_blocks_without_a_score_are_never_chosen():
  scores = np.array([[[[1.0, 1.0, 0.0], [-np.inf, -np.inf, 2.0]]]])
  chosen = top_k_blocks(scores, 1, 2, 2).selected[0, 0]
  np.testing.assert_array_equal(chosen, [[True, False, False], [False, False, True]])
  assert top_k_blocks(scores, 2, 2, 2).selected[0, 0, 1].sum() == 1
