"""Entmax15."""

import jax
import numpy as np
import pytest
from specs import instance, weights_of

NORMALISER = instance("normalisers", "entmax15")


@pytest.mark.parametrize(
  "scores, expected",
  [
    ([1.0, 0.5, -1.0], [0.67399264, 0.32600736, 0.0]),
    ([0.1, 0.0, -0.1], [0.39175718, 0.33166667, 0.27657616]),
    ([2.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ([0.4, 0.4, 0.4, 0.4], [0.25, 0.25, 0.25, 0.25]),
  ],
)
def test_weights_are_those_of_the_closed_form(scores, expected):
  with jax.enable_x64(True):
    np.testing.assert_allclose(weights_of(NORMALISER, np.array(scores)), expected, atol=1e-7)


def test_weights_maximise_the_scores_with_the_entropy_of_the_paper():
  """<p, s> + (1 - sum_j p_j^1.5) / (1.5 * 0.5) over the simplex."""
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    scores = 2 * rng.standard_normal(6)
    found = weights_of(NORMALISER, scores)
    others = rng.dirichlet(np.ones(6), 2000)
    others = np.concatenate([others, found + 1e-3 * (others - found)])  # near ones too
    worth = lambda points: points @ scores + (1 - (points**1.5).sum(-1)) / 0.75
    assert (worth(others) <= worth(found)).all() and 0 < (found > 0).sum() < 6
