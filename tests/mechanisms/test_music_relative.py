"""Relative attention of the Music Transformer."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import H, K, N, inputs

from attnx.attention import AttentionSpec, attend, masks
from attnx.core import registry
from attnx.core.lookup import Table
from attnx.core.tokens import Tokens
from attnx.mechanisms.transforms.music_relative import MusicRelative
from attnx.mechanisms.transforms.shaw import RelativeKeys


def table(rows: int, seed=0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal((N, rows, H))


def skewed(q, k, v, embedding):
  """Figure 1 of the paper: Q E^T, a column of zeros on the left, a reshape, a row less."""
  B, T = q.shape[:2]
  x = jnp.einsum("btnh,nrh->bntr", q, embedding[:, -T:])
  x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(B, N, T + 1, T)[:, :, 1:]
  scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // K, 2)) + x
  weights = jax.nn.softmax(jnp.where(np.tri(T, dtype=bool), scores * H**-0.5, -jnp.inf))
  return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // K, 2))


@pytest.mark.parametrize("T", [5, 12])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_values_and_gradients_are_those_of_skewing(T, implementation):
  with jax.enable_x64(True):
    given = *inputs(T, T), jnp.asarray(table(12))

    def ours(q, k, v, embedding):
      spec = AttentionSpec(masks.Causal(), (MusicRelative(embedding),))
      return attend(q, k, v, spec, implementation=implementation)

    np.testing.assert_allclose(ours(*given), skewed(*given), rtol=1e-10)
    loss = lambda f: lambda *x: jnp.cos(f(*x)).sum()
    for a, b in zip(*(jax.jit(jax.grad(loss(f), (0, 1, 2, 3)))(*given) for f in (ours, skewed))):
      np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11)


def read(transform, T=9, offset=0):
  where = Tokens.of_length(T, offset=offset)
  spec = AttentionSpec(masks.Causal(), (transform,))
  return attend(*inputs(T, T, np.float32), spec, q_tokens=where, k_tokens=where)


def test_within_the_table_it_is_the_score_of_shaw_and_beyond_it_nothing():
  near = table(9)[0].astype(np.float32)
  ahead = np.zeros((8, H), np.float32)  # hidden by the mask
  shaw = RelativeKeys(np.concatenate([near, ahead]))
  np.testing.assert_allclose(read(MusicRelative(near)), read(shaw), rtol=1e-4, atol=1e-5)
  far = np.concatenate([np.zeros((6, H), np.float32), near[-3:]])
  short = MusicRelative(near[-3:])  # distances 0, 1 and 2
  np.testing.assert_allclose(read(short), read(MusicRelative(far)), rtol=1e-4, atol=1e-5)


def test_both_directions_have_a_row_each():
  q = jnp.zeros((1, 1, 1, H)).at[..., 0].set(1.0)
  rows = jnp.arange(5.0)[:, None] * jnp.ones(H)
  both = MusicRelative(rows, bidirectional=True)  # M = 3
  where, one = Tokens.of_length(9), Tokens.of_length(1, offset=4).rows(1, 1)
  of = dataclasses.replace(one, table=Table(both.table(q).swapaxes(1, 2)))
  scores = both(jnp.zeros((1, 1, 1, 9)), of, where.columns())[0, 0, 0]
  np.testing.assert_array_equal(scores, [0, 0, 0, 1, 2, 3, 4, 0, 0])


def test_the_entry_draws_a_table_a_head_or_one_for_all():
  build = lambda **given: registry.build(
    "transforms", dict(given, name="music_relative"), num_heads=N, head_dim=64, rngs=nnx.Rngs(0)
  )
  assert build().embedding.shape == (N, 512, 64) and build(shared=True).embedding.shape == (512, 64)
  assert build(max_distance=7, bidirectional=True).embedding.shape == (N, 13, 64)
  assert 0.12 < build().embedding.std() < 0.13
  with pytest.raises(ValueError, match="max_distance=0 must be at least 1"):
    build(max_distance=0)
