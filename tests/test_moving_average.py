"""The damped moving averages of Mega, against their recurrence."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.nn.moving_average import MovingAverage

B, T, D, R = 2, 23, 6, 3
X = np.random.default_rng(0).normal(size=(B, T, D))


def one_way(average, i, x):
  a, d, b, c = (p[...][i] for p in (average.alpha, average.delta, average.beta, average.gamma))
  a, d = jax.nn.sigmoid(a), jax.nn.sigmoid(d)
  h, out = jnp.zeros((B, D, R)), []
  for t in range(x.shape[1]):
    h = (1 - a * d) * h + a * b * x[:, t, :, None]
    out.append((c * h).sum(-1) / math.sqrt(R))
  return jnp.stack(out, 1)


def naive(average, x):
  y = one_way(average, 0, x)
  if average.alpha.shape[0] == 2:
    y += one_way(average, 1, x[:, ::-1])[:, ::-1]
  return jax.nn.silu(y + average.omega[...] * x)


@pytest.mark.parametrize("both", [False, True])
def test_values_and_gradients_are_those_of_the_loop_whether_packed_or_not(both):
  tokens = Tokens.of_length(T)
  with jax.enable_x64(True):
    graph, params = nnx.split(MovingAverage(D, R, both=both, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x.astype(float), params)
    run = lambda f: jax.jit(jax.value_and_grad(
      lambda p, x: jnp.sin(3 * f(nnx.merge(graph, p), x)).sum(), argnums=(0, 1)
    ))(params, jnp.asarray(X))  # fmt: skip
    expected = jax.tree.leaves(run(naive))
    for f in (lambda m, x: m(x), lambda m, x: m(x, tokens=tokens)):
      for a, b in zip(jax.tree.leaves(run(f)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_documents_and_padding_are_kept_apart_in_both_directions():
  average, x = MovingAverage(D, R, both=True, rngs=nnx.Rngs(0)), jnp.asarray(X, jnp.float32)
  position = np.r_[np.arange(9), np.arange(11), -np.ones(3, int)][None]
  tokens = dataclasses.replace(
    Tokens.of_length(T), position=position, segment=(np.arange(T) >= 9)[None] + 0
  )
  out = average(x, tokens=tokens)
  for cut in (slice(0, 9), slice(9, 20)):
    np.testing.assert_allclose(out[:, cut], average(x[:, cut]), rtol=1e-4, atol=1e-5)


def test_reversing_the_sequence_swaps_the_directions():
  average, x = MovingAverage(D, R, both=True, rngs=nnx.Rngs(0)), jnp.asarray(X, jnp.float32)
  expected = average(x)[:, ::-1]
  for p in (average.alpha, average.beta, average.gamma, average.delta):
    p.set_value(p[...][::-1])
  np.testing.assert_allclose(average(x[:, ::-1]), expected, rtol=1e-4, atol=1e-5)


def test_initial_values_are_those_of_the_paper():
  average = MovingAverage(256, 4, both=False, rngs=nnx.Rngs(0))
  deviations = dict(alpha=0.2, delta=0.2, gamma=1.0, omega=1.0)
  for name, deviation in deviations.items():
    np.testing.assert_allclose(getattr(average, name)[...].std(), deviation, rtol=0.2)
  np.testing.assert_allclose(average.beta[...][0].mean(0), [1, -1, 1, -1], atol=0.01)


def test_decays_at_their_ends_are_a_classical_average_and_no_memory():
  average, x = MovingAverage(D, 1, both=False, rngs=nnx.Rngs(0)), jnp.asarray(X, jnp.float32)
  fill = lambda p, value: p.set_value(jnp.full_like(p[...], value))
  for p, value in ((average.beta, 1), (average.gamma, 1), (average.omega, 0), (average.delta, 40)):
    fill(p, value)
  a, h, expected = jax.nn.sigmoid(average.alpha[...][0, :, 0]), jnp.zeros((B, D)), []
  for t in range(T):
    h = a * x[:, t] + (1 - a) * h
    expected.append(jax.nn.silu(h))
  np.testing.assert_allclose(average(x), jnp.stack(expected, 1), rtol=1e-4, atol=1e-5)
  fill(average.alpha, 40)
  np.testing.assert_allclose(average(x), jax.nn.silu(x), rtol=1e-4, atol=1e-5)
  assert np.isfinite(jax.grad(lambda x: average(x).sum())(x)).all()
