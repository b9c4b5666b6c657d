"""Rectified linear attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import H, N, inputs, instance, wide

from attnx.attention import AttentionSpec, attend, reference
from attnx.core.tokens import Tokens

RELA = instance("normalisers", "rela")


def test_it_is_the_gated_norm_of_rectified_linear_attention():
  with jax.enable_x64(True):
    (q, k, v), rela = inputs(), wide(RELA)
    spread = lambda x: np.repeat(x, 2, axis=2)
    weights = np.maximum(np.einsum("btnh,bsnh->bnts", q, spread(k)) * H**-0.5, 0)
    out = np.einsum("bnts,bsnv->btnv", weights, spread(v)).reshape(2, -1, N * H)
    norm = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-8)
    gate = 1 / (1 + np.exp(-np.reshape(rela.gate, -1) * out))
    expected = (np.reshape(rela.scale, -1) * norm * gate).reshape(2, -1, N, H)
    np.testing.assert_allclose(attend(q, k, v, AttentionSpec(normaliser=rela)), expected, rtol=1e-9)


def test_about_half_of_the_weights_are_zero():
  q, k, _ = inputs(64, 64, np.float32)
  where = Tokens.of_length(64)
  weights = reference.unnormalised(q, k, AttentionSpec(normaliser=RELA), where, where)[0]
  assert 0.45 < (weights == 0).mean() < 0.55


def test_without_a_gate_the_size_of_queries_does_not_matter():
  q, k, v = inputs(dtype=np.float32)
  spec = AttentionSpec(normaliser=dataclasses.replace(RELA, gate=jnp.zeros((N, H))))
  np.testing.assert_allclose(
    attend(3 * q, k, v, spec), attend(q, k, v, spec), rtol=1e-4, atol=1e-5
  )


def test_the_norm_couples_heads():
  q, k, v = inputs(dtype=np.float32)
  spec = AttentionSpec(normaliser=RELA)
  moved = attend(q.at[:, :, 0].multiply(4.0), k, v, spec) - attend(q, k, v, spec)
  assert np.abs(moved[:, :, 1:]).max() > 1e-2


def test_it_has_no_finished_weights():
  q, k, _ = inputs(dtype=np.float32)
  with pytest.raises(NotImplementedError, match="has no finished weights"):
    reference.weights(
      q, k, AttentionSpec(normaliser=RELA), Tokens.of_length(7), Tokens.of_length(11)
    )
