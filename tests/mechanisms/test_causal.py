"""The causal mask."""

import numpy as np
from specs import inputs, pairs, visited

from attnx.attention import AttentionSpec, attend
from attnx.core import registry
from attnx.core.tokens import Tokens

CAUSAL = registry.build("masks", "causal")


def test_a_query_sees_itself_and_what_came_before():
  np.testing.assert_array_equal(pairs(CAUSAL, 6)[0, 0], np.tri(6, dtype=bool))


def test_the_first_token_reads_its_own_value():
  q, k, v = inputs(5, 5, np.float32)
  out = attend(q, k, v, AttentionSpec(mask=CAUSAL))
  np.testing.assert_allclose(out[:, 0], np.repeat(v[:, 0], 2, axis=1), rtol=1e-6)


def test_a_query_placed_last_sees_every_key():
  q, k, v = inputs(1, 11, np.float32)
  last = attend(q, k, v, AttentionSpec(mask=CAUSAL), q_tokens=Tokens.of_length(1, offset=10))
  np.testing.assert_allclose(last, attend(q, k, v), rtol=1e-6)


def test_half_of_the_tiles_are_visited():
  assert visited(CAUSAL, 64, 8) == 8 * 9 / 2
