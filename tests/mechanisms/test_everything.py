"""No mask."""

import numpy as np
from specs import inputs, pairs, visited

from attnx.attention import AttentionSpec, attend
from attnx.attention.masks import FULL
from attnx.core import registry

EVERYTHING = registry.build("masks", "everything")


def test_every_pair_meets_and_every_tile_is_full():
  assert pairs(EVERYTHING, 4, 6).all() and visited(EVERYTHING, 32, 8) == 16
  assert EVERYTHING.block(None, None) == FULL


def test_the_order_of_keys_does_not_matter():
  q, k, v = inputs(dtype=np.float32)
  order, spec = np.random.default_rng(0).permutation(k.shape[1]), AttentionSpec(mask=EVERYTHING)
  one, other = attend(q, k, v, spec), attend(q, k[:, order], v[:, order], spec)
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_it_is_one_with_and_and_nothing_with_not():
  causal = registry.build("masks", "causal")
  np.testing.assert_array_equal(pairs(causal & EVERYTHING, 5), pairs(causal, 5))
  assert not pairs(~EVERYTHING, 5).any() and visited(~EVERYTHING, 32, 8) == 0
