"""Heads that read nothing."""

import jax
import numpy as np
import pytest
from specs import N, T, inputs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry

QKV = inputs(T, T, np.float32)
OFF, REST = np.array([0, 3]), np.array([1, 2])


def ablated(heads=(0, 3)) -> AttentionSpec:
  edit = registry.build("edits", dict(name="ablate", heads=heads), num_heads=N)
  return AttentionSpec(mask=masks.Causal(), edits=(edit,))


def test_ablated_heads_read_exactly_nothing_and_the_others_what_they_did():
  out, plain = attend(*QKV, ablated()), attend(*QKV, AttentionSpec(mask=masks.Causal()))
  assert not out[:, :, OFF].any() and np.abs(plain[:, :, OFF]).min() > 0
  np.testing.assert_array_equal(out[:, :, REST], plain[:, :, REST])


def test_heads_that_share_a_key_head_are_ablated_one_by_one():
  out = attend(*QKV, ablated([0]))
  assert not out[:, :, 0].any() and np.abs(out[:, :, 1]).min() > 0


def test_no_gradient_passes_an_ablated_head():
  q, k, v = QKV
  slope = jax.grad(lambda q: attend(q, k, v, ablated()).sum())(q)
  assert not slope[:, :, OFF].any() and np.abs(slope[:, :, REST]).max() > 0


@pytest.mark.parametrize("heads", [(), (4,), (-1,), (0, 7)])
def test_heads_that_do_not_exist_are_refused(heads):
  with pytest.raises(ValueError, match="must be some of 0 .. 3"):
    ablated(heads)
