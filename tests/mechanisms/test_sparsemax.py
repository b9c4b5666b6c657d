"""Sparsemax."""

import jax
import numpy as np
import pytest
from specs import instance, weights_of

NORMALISER = instance("normalisers", "sparsemax")


@pytest.mark.parametrize(
  "scores, expected",
  [
    ([1.0, 0.5, -1.0], [0.75, 0.25, 0.0]),
    ([0.1, 0.0, -0.1], [0.43333333, 0.33333333, 0.23333333]),
    ([2.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ([0.4, 0.4, 0.4, 0.4], [0.25, 0.25, 0.25, 0.25]),
  ],
)
def test_weights_are_the_published_ones(scores, expected):
  with jax.enable_x64(True):
    np.testing.assert_allclose(weights_of(NORMALISER, np.array(scores)), expected, atol=1e-7)


def test_weights_are_the_nearest_point_of_the_simplex():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    scores = rng.standard_normal(6)
    found = weights_of(NORMALISER, scores)
    others = rng.dirichlet(np.ones(6), 2000)
    others = np.concatenate([others, found + 1e-3 * (others - found)])  # near ones too
    far = lambda points: ((points - scores) ** 2).sum(-1)
    assert (far(others) >= far(found)).all() and 0 < (found > 0).sum() < 6
