"""Rotary bias."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.nn.rotary import angles, frequencies, rotate

N, R = 3, 8


def build(width=R):
  return registry.build("transforms", "rotary_bias", num_heads=N, head_dim=width, rngs=nnx.Rngs(0))


def scores_of(bias, q: Tokens, k: Tokens, dtype=jnp.float32):
  shape = (1, N, q.position.shape[1], k.position.shape[1])
  return np.asarray(bias(jnp.zeros(shape, dtype), q.rows(1, N), k.columns())[0])


def test_it_is_the_product_of_two_vectors_that_rope_has_turned():
  with jax.enable_x64(True):
    bias, q, k = build(), Tokens.of_length(5, offset=9), Tokens.of_length(12)
    turn = lambda x, at: rotate(
      jnp.broadcast_to(x, (1, at.shape[1], N, R)).astype(float),
      angles(at, frequencies(R), float),
    )
    a, b = turn(bias.alpha, q.position), turn(bias.beta, k.position)
    expected = jnp.einsum("btnr,bsnr->nts", a, b)
    np.testing.assert_allclose(scores_of(bias, q, k, float), expected, rtol=1e-9, atol=1e-12)


def test_a_query_upon_itself_gets_the_plain_product_and_so_does_no_turn():
  bias, where = build(), Tokens.of_length(4)
  plain = jnp.einsum("nr,nr->n", bias.alpha, bias.beta)
  diagonal = np.diagonal(scores_of(bias, where, where), axis1=1, axis2=2)
  np.testing.assert_allclose(diagonal, np.repeat(plain[:, None], 4, 1), rtol=1e-5, atol=1e-8)


def test_far_from_the_beginning_it_is_as_exact_as_near():
  bias = build()
  near, far = (Tokens.of_length(6, offset=o) for o in (0, 10_000_000))
  np.testing.assert_array_equal(scores_of(bias, far, far), scores_of(bias, near, near))


def test_odd_widths_are_refused():
  with pytest.raises(ValueError, match="7 channels has no pairs"):
    build(7)
