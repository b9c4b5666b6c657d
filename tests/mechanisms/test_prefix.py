"""Prefix language models."""

import jax
import numpy as np
import pytest
from specs import inputs, pairs, visited

from attnx.attention import AttentionSpec, attend
from attnx.core import registry


def build(length):
  return registry.build("masks", dict(name="prefix", length=length))


def test_all_see_the_prefix_and_the_rest_is_causal():
  i, j = np.ogrid[:8, :8]
  np.testing.assert_array_equal(pairs(build(3), 8)[0, 0], (j <= i) | (j < 3))


def test_no_prefix_is_causal_and_a_prefix_of_all_is_everything():
  np.testing.assert_array_equal(pairs(build(0), 8), pairs(registry.build("masks", "causal"), 8))
  assert pairs(build(8), 8).all()


def test_every_row_of_the_batch_may_have_its_own_prefix():
  each = pairs(build(np.array([2, 5])), 8, batch=2)
  np.testing.assert_array_equal(each[:, 0], [pairs(build(n), 8)[0, 0] for n in (2, 5)])


def test_lengths_may_be_known_at_run_time_only():
  q, k, v = inputs(8, 8, np.float32)
  run = lambda n, how: attend(q, k, v, AttentionSpec(mask=build(n)), implementation=how)
  lengths = np.array([2, 5])
  late = jax.jit(lambda n: run(n, "chunked"))(lengths)
  np.testing.assert_allclose(late, run(lengths, "reference"), rtol=1e-5, atol=1e-6)
  for row, n in enumerate((2, 5)):
    np.testing.assert_allclose(late[row], run(n, "reference")[row], rtol=1e-5, atol=1e-6)


def test_the_tiles_of_the_prefix_are_visited_besides_the_causal_ones():
  assert visited(build(16), 64, 8) == 8 * 9 / 2 + 1


def test_a_negative_length_raises():
  with pytest.raises(ValueError, match="length=-1 must not be negative"):
    build(-1)
