"""Packed documents."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from specs import inputs

from attnx.attention import AttentionSpec, attend, plan
from attnx.core import registry
from attnx.core.tokens import Tokens

SAME = registry.build("masks", "same_segment")


def packed(*lengths: int) -> Tokens:
  where = Tokens.of_length(sum(lengths))
  segment = np.repeat(np.arange(len(lengths), dtype=np.int32) * 7, lengths)[None]
  return dataclasses.replace(where, segment=segment)


def test_documents_of_one_row_are_attended_as_if_alone():
  q, k, v = inputs(11, 11, np.float32)
  where = packed(4, 1, 6)
  out = attend(q, k, v, AttentionSpec(mask=SAME), q_tokens=where, k_tokens=where)
  alone = [attend(*(x[:, a:b] for x in (q, k, v))) for a, b in ((0, 4), (4, 5), (5, 11))]
  np.testing.assert_allclose(out, jnp.concatenate(alone, axis=1), rtol=1e-5, atol=1e-6)


def test_a_document_may_lie_in_pieces():
  q, k, v = inputs(8, 8, np.float32)
  where = packed(2, 3, 3)
  where = dataclasses.replace(where, segment=where.segment % 2)  # 0 0 1 1 1 0 0 0
  first = np.flatnonzero(where.segment[0] == 0)
  out = attend(q, k, v, AttentionSpec(mask=SAME), q_tokens=where, k_tokens=where)
  alone = attend(*(x[:, first] for x in (q, k, v)))
  np.testing.assert_allclose(out[:, first], alone, rtol=1e-5, atol=1e-6)


def test_tiles_between_documents_are_skipped_and_tiles_within_need_no_mask():
  where = packed(16, 32, 16)
  found = plan.tiles(SAME, where, where, 8, 8)
  assert (~found.empty).sum() == 2 * 2 + 4 * 4 + 2 * 2
  np.testing.assert_array_equal(found.full, ~found.empty)
