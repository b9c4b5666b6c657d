"""Length scaled softplus attention."""

import jax
import jax.numpy as jnp
import numpy as np
from specs import inputs, instance, weights_of

from attnx.attention import AttentionSpec, attend, masks

LSSA = instance("normalisers", "lssa")
unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def test_with_unit_queries_and_keys_it_is_the_formula_of_the_paper():
  with jax.enable_x64(True):
    q, k, v = inputs(9, 9)
    spec = AttentionSpec(masks.Causal(), normaliser=LSSA, scale=float(np.log(8)))
    actual = attend(unit(q), unit(k), v, spec)
    q, k, v = np.asarray(unit(q)), *(np.repeat(x, 2, axis=2) for x in (unit(k), v))
    for i in range(9):
      s = np.log(8) * np.log(i + 1) * np.einsum("bnh,bsnh->bns", q[:, i], k[:, : i + 1])
      f = np.log1p(np.exp(s))
      expected = np.einsum("bns,bsnv->bnv", f / (f.sum(-1, keepdims=True) + 1e-8), v[:, : i + 1])
      np.testing.assert_allclose(actual[:, i], expected, rtol=1e-6)


def test_a_row_of_one_key_is_its_value_whatever_the_score():
  for score in (-50.0, 0.0, 3.0):
    np.testing.assert_allclose(weights_of(LSSA, np.array([score])), [1.0], rtol=1e-6)


def test_equal_scores_are_a_mean():
  np.testing.assert_allclose(weights_of(LSSA, np.full(6, 0.7)), 1 / 6, rtol=1e-6)


def test_more_keys_sharpen_the_same_scores():
  ratio = lambda n: (w := weights_of(LSSA, np.resize([1.0, -1.0], n)))[0] / w[1]
  assert ratio(4) < ratio(16) < ratio(64)
