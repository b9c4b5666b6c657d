"""Disjoint chunks."""

import numpy as np
import pytest
from specs import inputs, pairs, visited

from attnx.attention import AttentionSpec, attend
from attnx.core import registry
from attnx.core.tokens import Tokens


def build(size):
  return registry.build("masks", dict(name="same_chunk", size=size))


def test_chunks_are_attended_as_if_alone():
  q, k, v = inputs(11, 11, np.float32)
  out = attend(q, k, v, AttentionSpec(mask=build(4)))
  for cut in (slice(0, 4), slice(4, 8), slice(8, 11)):
    alone = attend(q[:, cut], k[:, cut], v[:, cut])
    np.testing.assert_allclose(out[:, cut], alone, rtol=1e-5, atol=1e-6)


def test_the_chunk_is_that_of_the_position_and_not_of_the_place():
  moved = Tokens.of_length(6, offset=3)
  visible = build(4)(moved.rows(1, 1), moved.columns())[0, 0]
  chunk = np.array([0, 1, 1, 1, 1, 2])
  np.testing.assert_array_equal(visible, chunk[:, None] == chunk)


def test_a_chunk_as_long_as_the_sequence_hides_nothing_and_one_of_a_token_all_but_it():
  assert pairs(build(9), 9).all()
  np.testing.assert_array_equal(pairs(build(1), 9)[0, 0], np.eye(9, dtype=bool))


def test_tiles_that_are_visited_grow_with_the_length_and_not_with_its_square():
  assert [visited(build(16), length, 8) for length in (64, 128, 256)] == [16, 32, 64]


def test_a_chunk_of_nothing_is_refused():
  with pytest.raises(ValueError, match="size=0 must be at least 1"):
    build(0)
