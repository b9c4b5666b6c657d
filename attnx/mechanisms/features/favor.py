"""FAVOR+: positive orthogonal random features of the softmax kernel."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.nn.feature import Feature
from attnx.nn.position import working_dtype


class Directions(nnx.Variable):
  """Random directions (M, H): drawn, never trained."""


class Favor(Feature):
  """phi(x)_i = exp(w_i . x' - |x'|^2 / 2) / sqrt(M), x' = x / H^(1/4), w_i ~ Normal(0, 1).

  The mean of phi(q) . phi(k) over draws of w is exp(q . k / sqrt(H)). Within each block of H the
  directions are orthogonal and keep the lengths of Gaussian vectors, which lowers the variance and
  leaves the mean. All heads share them, so that grouped queries meet their keys in the same ones.

  A query's exponents are measured from the largest of that query, a factor that normalising
  cancels and that carries no gradient. Those of keys are not shifted: a maximum over keys would let
  the past see the future. They are at most |w|^2 / 2, which float32 can raise e to for H up to
  about 100; keys so long that all their features underflow are as if they were not there.
  Hyperbolic features and the constant that the released code adds, a bias, are left out.
  arXiv:2009.14794.

  Args:
    head_dim: H.
    num_features: M; None means 4 H.
    rngs: draws from the stream `params`; `redraw` draws anew.
  """

  def __init__(self, head_dim: int, *, num_features: int | None = None, rngs: nnx.Rngs):
    num_features = 4 * head_dim if num_features is None else num_features
    if num_features < 1:
      raise ValueError(f"num_features={num_features} must be positive")
    self.directions = Directions(orthogonal(rngs.params(), num_features, head_dim))

  def redraw(self, key: jax.Array) -> None:
    """Replaces the directions, as the paper does now and then in training."""
    self.directions[...] = orthogonal(key, *self.directions.shape)

  def exponents(self, x: jax.Array) -> jax.Array:
    """w . x' - |x'|^2 / 2 - ln(M) / 2, (B, T, N, H) to (B, T, N, M): ln phi(x)."""
    M, H = self.directions.shape
    x = x.astype(working_dtype(x)) * H**-0.25
    products = jnp.einsum("btnh,mh->btnm", x, self.directions[...].astype(x.dtype))
    return products - (jnp.square(x).sum(-1, keepdims=True) + jnp.log(M).astype(x.dtype)) / 2

  def query(self, x):
    exponents = self.exponents(x)
    return jnp.exp(exponents - jax.lax.stop_gradient(exponents.max(-1, keepdims=True)))

  def key(self, x):
    return jnp.exp(self.exponents(x))

  def width(self, head_dim):
    del head_dim
    return self.directions.shape[0]


def orthogonal(key: jax.Array, rows: int, width: int) -> jax.Array:
  """(rows, width), each row as from Normal(0, 1), orthogonal within blocks of `width` rows."""
  blocks = -(-rows // width)
  turns, lengths = jax.random.split(key)
  gaussian = jax.random.normal(turns, (blocks, width, width), jnp.float32)
  q, r = jnp.linalg.qr(gaussian)
  q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]  # uniform over all rotations
  norms = jnp.linalg.norm(jax.random.normal(lengths, (rows, width), jnp.float32), axis=-1)
  return q.reshape(blocks * width, width)[:rows] * norms[:, None]


ENTRY = Entry(
  make=Favor,
  paper="arXiv:2009.14794",
  facts={"nonnegative", "exponential"},
  tiny=dict(num_features=24),
)
