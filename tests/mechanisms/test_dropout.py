"""Dropout of weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention.transforms import Dropout
from attnx.core.tokens import Tokens

B, N, T = 3, 4, 64
KEY = jax.random.key(3)


def kept(dropout: Dropout, rows=slice(None), columns=slice(None), batch=B) -> np.ndarray:
  q, k = Tokens.of_length(T)[rows].rows(batch, N), Tokens.of_length(T)[columns].columns()
  ones = jnp.ones((batch, N, q.index.shape[2], k.index.shape[3]))
  return np.asarray(dropout(ones, q, k))


def test_as_many_weights_as_asked_for_are_dropped_and_the_rest_grow():
  out = kept(Dropout(KEY, 0.25))
  assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
  assert abs((out == 0).mean() - 0.25) < 4 * (0.25 * 0.75 / out.size) ** 0.5
  np.testing.assert_array_equal(kept(Dropout(KEY, 0.0)), 1)


def test_a_tile_drops_what_the_whole_drops_there():
  whole = kept(Dropout(KEY, 0.4))
  tile = kept(Dropout(KEY, 0.4), slice(8, 24), slice(40, 64))
  np.testing.assert_array_equal(tile, whole[:, :, 8:24, 40:64])


def test_rows_heads_batches_and_keys_drop_independently():
  x = kept(Dropout(KEY, 0.5)) > 0
  other = kept(Dropout(jax.random.key(4), 0.5)) > 0
  far = lambda a, b: abs((a == b).mean() - 0.5) < 4 * 0.5 / a.size**0.5
  assert far(x, other) and far(x[0], x[1]) and far(x[:, 0], x[:, 1])
  assert far(x[:, :, 1:], x[:, :, :-1]) and far(x[..., 1:], x[..., :-1])
  assert far(x, np.swapaxes(x, 2, 3)[:, :])


def test_shared_dropout_is_the_same_in_every_row_of_the_batch_and_every_head():
  out = kept(Dropout(KEY, 0.5, shared=True))
  assert (out == out[:1, :1]).all() and 0 < (out == 0).mean() < 1


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2])
def test_rates_that_are_none_are_refused(rate):
  with pytest.raises(ValueError, match=f"rate={rate} must be in"):
    dataclasses.replace(Dropout(KEY, 0.5), rate=rate)
