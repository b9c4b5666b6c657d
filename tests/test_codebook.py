"""Codebooks: which codeword is nearest, what moves it, and what vectors learn."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.nn.codebook import Codebook

X = jnp.array([[[[1.0, 0]], [[3, 0]], [[0, -2]], [[9, 9]]]])
THERE = jnp.array([[True, True, True, False]])
BOOK = Codebook(sum=jnp.array([[[0.5, 0], [0, -0.5]]]), count=jnp.ones((1, 2)))


def test_a_batch_s_codewords_are_the_means_of_the_vectors_that_are_there():
  batch = BOOK.of(X, THERE)
  np.testing.assert_array_equal(batch.sum, [[[4, 0], [0, -2]]])
  np.testing.assert_array_equal(batch.count, [[2, 1]])
  np.testing.assert_array_equal(batch.codewords(), [[[2, 0], [0, -2]]])


def test_a_code_that_is_never_used_keeps_a_finite_codeword():
  book = Codebook(sum=jnp.array([[[1e-9, 0], [0, -0.5]]]), count=jnp.array([[1e-9, 1]]))
  np.testing.assert_allclose(book.codewords(), [[[1e-7, 0], [0, -0.5]]], rtol=1e-5)


def test_quantised_vectors_pass_their_gradient_on_and_commitment_pulls_them():
  code = BOOK.nearest(X)
  np.testing.assert_array_equal(code[..., 0], [[0, 0, 1, 0]])
  np.testing.assert_array_equal(BOOK.quantise(X, code)[0, 2, 0], [0, -0.5])
  through = jax.grad(lambda x: (3 * BOOK.quantise(x, BOOK.nearest(x))).sum())(X)
  np.testing.assert_array_equal(through, 3.0)
  loss, pull = jax.value_and_grad(BOOK.commitment)(X, THERE)
  np.testing.assert_allclose(loss, (0.5**2 + 2.5**2 + 1.5**2) / 3, rtol=1e-6)
  expected = np.array([[0.5, 0], [2.5, 0], [0, -1.5], [0, 0]]) * 2 / 3
  np.testing.assert_allclose(pull[0, :, 0], expected, rtol=1e-6)
  flat = jax.grad(lambda book: book.commitment(X, THERE))(BOOK)
  assert all((g == 0).all() for g in jax.tree.leaves(flat))
