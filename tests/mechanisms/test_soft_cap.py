"""Soft cap."""

import jax
import jax.numpy as jnp
import numpy as np
from specs import inputs, packed

from attnx.attention import AttentionSpec, attend, masks
from attnx.attention.transforms import SoftCap
from attnx.core.tokens import Tokens

SIDES = Tokens.of_length(1), Tokens.of_length(1)


def cap(scores, size: float):
  return SoftCap(size)(jnp.asarray(scores), *SIDES)


def test_scores_stay_below_the_cap_in_their_order():
  scores = np.linspace(-30, 30, 201).astype(np.float32)
  capped = cap(scores, 5.0)
  assert np.abs(capped).max() <= 5 and (np.diff(capped[80:121]) > 0).all()
  np.testing.assert_allclose(capped, 5 * np.tanh(scores / 5), rtol=1e-6)
  np.testing.assert_allclose(cap(scores, 1e6), scores, rtol=1e-5)


def test_the_slope_is_one_less_the_square_of_what_is_capped_and_zero_far_out():
  slope = jax.vmap(jax.grad(lambda s: cap(s, 5.0)))
  scores = jnp.array([0.0, 3.0, -8.0, 1e3, -1e30])
  expected = 1 - (np.asarray(cap(scores, 5.0)) / 5) ** 2
  np.testing.assert_allclose(slope(scores), expected, rtol=1e-5, atol=1e-7)
  assert (slope(scores)[3:] == 0).all()


def test_masked_keys_weigh_nothing_though_caps_are_finite():
  with jax.enable_x64(True):
    q, k, v = inputs(11, 11)
    spec, where = AttentionSpec(masks.Causal(), (SoftCap(0.01),)), packed(11)
    out = attend(q, k, v, spec, q_tokens=where, k_tokens=where)
    hidden = attend(q, k, v.at[1, -2:].set(1e9), spec, q_tokens=where, k_tokens=where)
    np.testing.assert_array_equal(out[:, :-2], hidden[:, :-2])
    assert not out[1, -2:].any()
    # Scores that are all but equal: the mean of what is seen.
    mean = np.cumsum(np.repeat(v, 2, axis=2)[0], 0) / np.arange(1, 12)[:, None, None]
    np.testing.assert_allclose(out[0], mean, atol=0.05)
