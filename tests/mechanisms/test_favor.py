"""FAVOR+: its kernel, its orthogonality, and what orthogonality is good for."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.features.favor import Favor, orthogonal

H = 8
RNG = np.random.default_rng(0)
Q, K = 0.35 * RNG.normal(size=(2, 1, 6, 2, H))


def kernel(directions, q, k):
  """phi(q) . phi(k) by the formula, in float64, unshifted."""
  phi = lambda x: np.exp(x @ directions.T - (x**2).sum(-1, keepdims=True) / 2)
  q, k = (phi(x * H**-0.25) for x in (q, k))
  return np.einsum("btnm,bsnm->bnts", q, k) / len(directions)


def test_features_are_the_formula_up_to_a_factor_of_the_query():
  with jax.enable_x64(True):
    favor = Favor(H, num_features=24, rngs=nnx.Rngs(0))
    actual = np.einsum("btnm,bsnm->bnts", favor.query(Q), favor.key(K))
    expected = kernel(np.asarray(favor.directions[...], float), Q, K)
    ratio = actual / expected
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], ratio.shape), rtol=1e-10)
    np.testing.assert_allclose(favor.query(Q).max(-1), 1.0)


def test_directions_are_orthogonal_in_blocks_with_lengths_of_gaussians():
  w = np.asarray(orthogonal(jax.random.key(0), 3 * H + 2, H), float)
  for block in (w[:H], w[H : 2 * H], w[2 * H : 3 * H], w[3 * H :]):
    gram = block @ block.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
  lengths = np.linalg.norm(orthogonal(jax.random.key(1), 4000, H), axis=-1)
  assert abs(np.mean(lengths**2) - H) < 0.3 and abs(np.var(lengths**2) - 2 * H) < 2


def test_orthogonal_directions_vary_less_than_independent_ones():
  with_blocks, independent = [], []
  for seed in range(300):
    key = jax.random.key(seed)
    with_blocks.append(kernel(np.asarray(orthogonal(key, H, H), float), Q, K))
    independent.append(kernel(np.asarray(jax.random.normal(key, (H, H)), float), Q, K))
  assert np.var(with_blocks, 0).mean() < 0.9 * np.var(independent, 0).mean()


def test_many_features_are_softmax_attention():
  favor = Favor(H, num_features=16_384, rngs=nnx.Rngs(0))
  q, k = Q.astype(np.float32), K.astype(np.float32)
  weights = np.einsum("btnm,bsnm->bnts", favor.query(q), favor.key(k))
  weights = weights / weights.sum(-1, keepdims=True)
  expected = jax.nn.softmax(np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H), axis=-1)
  np.testing.assert_allclose(weights, expected, atol=0.02)


def test_directions_are_not_trained_and_can_be_drawn_anew():
  favor = Favor(H, num_features=12, rngs=nnx.Rngs(0))
  assert not jax.tree.leaves(nnx.state(favor, nnx.Param))
  before = np.asarray(favor.directions[...])
  favor.redraw(jax.random.key(5))
  assert favor.directions.shape == (12, H) and not np.allclose(before, favor.directions[...])


@pytest.mark.parametrize("side", ["query", "key"])
def test_features_stay_finite_for_keys_on_a_direction(side):
  favor = Favor(64, rngs=nnx.Rngs(0))
  x = favor.directions[...][None, :, None] * 64**0.25
  assert jnp.isfinite(getattr(favor, side)(x)).all()
