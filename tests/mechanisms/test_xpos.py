"""xPos: rope whose scores fade with distance."""

import jax
import numpy as np
import pytest

from attnx.core import registry
from attnx.mechanisms.positions.xpos import XPos

T, N, H = 7, 2, 8
RNG = np.random.default_rng(0)
Q, K = RNG.normal(size=(2, 1, T, N, H))


def pairwise(q, k, at, gamma=0.4, scale=512.0):
  """Scores summed plane by plane in complex numbers: each fades and turns with n - m."""
  j = np.arange(H // 2)
  zeta = (2 * j / H + gamma) / (1 + gamma)
  w = 10_000.0 ** (-2 * j / H)
  a, b = (x[0, :, :, : H // 2] + 1j * x[0, :, :, H // 2 :] for x in (q, k))
  far = (at[:, None] - at[None])[..., None, None]
  planes = a[:, None] * b[None].conj() * np.exp(1j * far * w) * zeta ** (far / scale)
  return planes.real.sum(-1)


@pytest.mark.parametrize("centre", [0, 1000])
def test_each_plane_fades_and_turns_with_distance(centre):
  at = np.array([0, 3, 5, 200, 900, 1500, 2048])
  with jax.enable_x64(True):
    xpos = XPos(centre=centre)
    q, k = xpos.query(Q, at[None]), xpos.key(K, at[None])
    np.testing.assert_allclose(
      np.einsum("btnh,bsnh->tsn", q, k), pairwise(Q, K, at), rtol=1e-8, atol=1e-8
    )


def test_a_plane_fades_to_its_zeta_at_the_scale_base():
  at = np.array([[0, 512, 1024, 2048, 4096]])
  x = np.ones((1, 5, 1, 2))  # one plane, that turns: look at its length alone
  q = np.linalg.norm(XPos().query(x.astype(np.float32), at)[0, :, 0], axis=-1)
  np.testing.assert_allclose(q / q[0], (0.4 / 1.4) ** (at[0] / 512), rtol=1e-5)


def test_what_does_not_turn_does_not_fade():
  x, at = Q.astype(np.float32), np.arange(T)[None] + 400
  np.testing.assert_array_equal(XPos(rotary_dim=4).query(x, at)[..., 4:], x[..., 4:])


def test_a_huge_scale_is_rope():
  rope, x, at = registry.build("positions", "rope"), Q.astype(np.float32), np.arange(T)[None]
  np.testing.assert_allclose(XPos(scale_base=1e9).key(x, at), rope.key(x, at), rtol=1e-5, atol=1e-6)


def test_a_fading_that_is_not_one_is_refused():
  with pytest.raises(ValueError, match="gamma=0 and scale_base=512.0 must be positive"):
    XPos(gamma=0)
