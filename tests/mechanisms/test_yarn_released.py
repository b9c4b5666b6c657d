"""YaRN as released: the ends of its ramp, and where it meets the paper."""

import numpy as np
import pytest

from attnx.core import registry
from attnx.mechanisms.positions.yarn_released import YarnReleased


@pytest.mark.parametrize(
  "R, L, ends", [(128, 2048, (16, 41)), (128, 4096, (20, 46)), (64, 4096, (10, 23))]
)
def test_the_ramp_ends_where_the_released_code_ends_it(R, L, ends):
  low, high = YarnReleased(8.0, L).ends(R)
  assert (low, high) == ends
  w, mixed = registry.build("positions", "rope").frequencies(R), YarnReleased(8.0, L).frequencies(R)
  np.testing.assert_array_equal(mixed[: low + 1], w[: low + 1])
  np.testing.assert_allclose(mixed[high:], w[high:] / 8, rtol=1e-14)


def test_the_ramp_is_linear_in_the_index_of_the_pair():
  w, mixed = (
    registry.build("positions", config).frequencies(128)
    for config in ("rope", dict(name="yarn_released", factor=8.0, original_length=2048))
  )
  share = (1 - mixed / w)[16:42] / (1 - 1 / 8)
  np.testing.assert_allclose(share, np.arange(26) / 25, rtol=1e-12, atol=1e-12)


def test_it_agrees_with_the_paper_off_the_ramp_and_has_its_temperature():
  options = dict(factor=8.0, original_length=2048)
  paper = registry.build("positions", dict(name="yarn", **options))
  released = YarnReleased(**options)
  same = released.frequencies(128) == paper.frequencies(128)
  assert same[:15].all() and same[42:].all() and not same[20:36].any()
  assert released.gain == paper.gain


def test_an_empty_ramp_is_a_step():
  yarn = YarnReleased(4.0, 7, slow=1.0, fast=1.0001)
  assert yarn.ends(8) == (0, 1)
  assert np.isfinite(yarn.frequencies(2)).all()
  tiny = YarnReleased(4.0, 3)  # no pair ever completes a turn: low and high are both 0
  assert tiny.ends(8) == (0, 0)
  w = registry.build("positions", "rope").frequencies(8)
  np.testing.assert_allclose(tiny.frequencies(8)[1:], w[1:] / 4, rtol=1e-12)
