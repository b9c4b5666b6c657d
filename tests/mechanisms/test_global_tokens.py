"""Global tokens."""

import numpy as np
import pytest
from specs import inputs, pairs, visited

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry


def build(**kwargs):
  return registry.build("masks", dict(name="global_tokens", **kwargs))


def test_global_tokens_have_their_rows_and_their_columns():
  expected = np.zeros((6, 6), bool)
  expected[:2] = expected[:, :2] = True
  np.testing.assert_array_equal(pairs(build(first=2), 6)[0, 0], expected)


def test_each_row_of_the_batch_may_choose_its_own():
  chosen = np.zeros((2, 6), bool)
  chosen[0, 3] = chosen[1, [0, 5]] = True
  expected = chosen[:, :, None] | chosen[:, None, :]
  np.testing.assert_array_equal(pairs(build(chosen=chosen), 6, batch=2)[:, 0], expected)
  assert not pairs(build(chosen=chosen[:1, :3]), 6).any()  # later positions are not chosen


def test_a_global_token_far_away_reaches_every_row():
  q, k, v = inputs(9, 9, np.float32)
  near = masks.Window(1, 1)
  spec = AttentionSpec(mask=near | build(first=1))
  moved = attend(q, k, v.at[:, 0].add(1.0), spec) - attend(q, k, v, spec)
  assert (np.abs(moved).max((0, 2, 3)) > 1e-4).all()
  alone = AttentionSpec(mask=near)
  moved = attend(q, k, v.at[:, 0].add(1.0), alone) - attend(q, k, v, alone)
  assert not moved[:, 2:].any()


def test_visited_tiles_grow_with_the_length():
  assert visited(build(first=4), 64, 8) == 15


def test_first_and_chosen_exclude_each_other():
  with pytest.raises(ValueError, match="exclude each other"):
    build(first=1, chosen=np.zeros((1, 3), bool))
