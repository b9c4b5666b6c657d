"""Mamba-2: the state space token by token, and what it reduces to."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.mamba2 import Mamba2
from attnx.nn.implicit import implicit_attention

B, T, D, N, V, G, H, W = 2, 11, 8, 4, 4, 2, 3, 4
X = np.random.default_rng(0).normal(size=(B, T, D))
SEGMENT = np.repeat([0, 1], [6, 5])[None]
POSITION = np.r_[np.arange(6), np.arange(5)][None]
DOCUMENTS = Tokens(index=np.arange(T)[None], position=POSITION, segment=SEGMENT)


def make(**options):
  return Mamba2(D, head_dim=V, state_dim=H, num_groups=G, rngs=nnx.Rngs(0), **options)


def parts(mixer, x, segment):
  """z, x, B, C of all heads and the steps, token by token."""
  joined, cut = x @ mixer.project.kernel[...], N * V + 2 * G * H
  z, raw, dt = joined[..., : N * V], joined[..., N * V : N * V + cut], joined[..., N * V + cut :]
  rows = []
  for t in range(x.shape[1]):
    seen = [i for i in range(min(W, t + 1)) if segment[t - i] == segment[t]]
    rows.append(sum(mixer.conv.kernel[i] * raw[:, t - i] for i in seen) + mixer.conv.bias[...])
  mixed = jax.nn.silu(jnp.stack(rows, 1))
  x, keys, queries = mixed[..., : N * V], mixed[..., N * V : -G * H], mixed[..., -G * H :]
  wide = lambda y: jnp.repeat(y.reshape(*y.shape[:2], G, H), N // G, axis=2)
  dt = jnp.log1p(jnp.exp(dt + mixer.time_step.bias[...]))
  return z, x.reshape(*x.shape[:2], N, V), wide(keys), wide(queries), dt


def naive(mixer, x, segment):
  z, v, k, q, dt = parts(mixer, x, segment)
  state, rows = jnp.zeros((B, N, H, V)), []
  for t in range(x.shape[1]):
    if t and segment[t] != segment[t - 1]:
      state = 0 * state
    decay = jnp.exp(-jnp.exp(mixer.time_step.log_rate[...]) * dt[:, t])
    written = k[:, t, :, :, None] * (dt[:, t, :, None] * v[:, t])[:, :, None]
    state = decay[..., None, None] * state + written
    read = jnp.einsum("bnh,bnhv->bnv", q[:, t], state)
    rows.append(read + mixer.skip[...][:, None] * v[:, t])
  y = jnp.stack(rows, 1).reshape(B, -1, N * V)
  y = y * z / (1 + jnp.exp(-z))
  y = y.reshape(*y.shape[:2], G, -1)
  y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
  return y.reshape(*y.shape[:2], N * V) * mixer.gain[...] @ mixer.out.kernel[...]


@pytest.mark.parametrize("tokens, segment", [(None, np.zeros(T, int)), (DOCUMENTS, SEGMENT[0])])
def test_values_and_gradients_are_those_of_the_loop(tokens, segment):
  with jax.enable_x64(True):
    graph, params = nnx.split(make())
    params = jax.tree.map(lambda p: p.astype(float), params)
    params["skip"].set_value(jnp.linspace(-1.0, 2.0, N))
    params["gain"].set_value(jnp.linspace(0.5, 2.0, N * V))
    params["conv"]["bias"].set_value(jnp.linspace(-1.0, 1.0, N * V + 2 * G * H))
    merge, x = lambda p: nnx.merge(graph, p), jnp.asarray(X)
    f = lambda p, x: jnp.sum(jnp.sin(merge(p)(x, tokens=tokens)))
    g = lambda p, x: jnp.sum(jnp.sin(naive(merge(p), x, segment)))
    expected = naive(merge(params), x, segment)
    np.testing.assert_allclose(merge(params)(x, tokens=tokens), expected, rtol=1e-10, atol=1e-10)
    actual, expected = (jax.jit(jax.grad(h, argnums=(0, 1)))(params, x) for h in (f, g))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def with_constant_steps(step, rate):
  """A mixer whose tokens all take the same step, and decay by exp(-rate step) over it."""
  mixer = make()
  mixer.project.kernel.set_value(mixer.project.kernel[...].at[:, -N:].set(0.0))
  mixer.time_step.bias.set_value(jnp.full(N, np.log(np.expm1(step)), jnp.float32))
  mixer.time_step.log_rate.set_value(jnp.full(N, np.log(rate), jnp.float32))
  return mixer


@pytest.mark.parametrize("step, rate", [(0.5, 1e-9), (0.5, 0.3), (2.0, 100.0)])
def test_with_constant_steps_it_is_retention_with_a_skip(step, rate):
  mixer, x = with_constant_steps(step, rate), jnp.asarray(X, jnp.float32)
  mixer.skip.set_value(jnp.arange(1.0, N + 1))
  _, _, k, q, _ = parts(mixer, x, np.zeros(T, int))
  apart = np.maximum(np.subtract.outer(np.arange(T), np.arange(T)), 0)
  decay = np.tril(np.exp(-step * rate * apart))
  expected = step * decay * jnp.einsum("btnh,bsnh->bnts", q, k)
  expected += np.eye(T) * np.arange(1.0, N + 1)[:, None, None]
  np.testing.assert_allclose(implicit_attention(mixer, x), expected, rtol=1e-4, atol=1e-5)


def test_it_starts_with_the_rates_steps_and_skips_of_the_paper():
  mixer = Mamba2(512, head_dim=4, rngs=nnx.Rngs(0))
  rate, step = np.exp(mixer.time_step.log_rate[...]), jax.nn.softplus(mixer.time_step.bias[...])
  assert 1 <= rate.min() < 1.5 and 15.5 < rate.max() <= 16 and abs(rate.mean() - 8.5) < 0.7
  octaves = np.log10(step)
  assert -3.001 < octaves.min() and octaves.max() < -0.999 and abs(octaves.mean() + 2) < 0.1
  assert (mixer.skip[...] == 1).all()


def test_who_looks_sees_the_matrices_of_the_documents():
  x, mixer = jnp.asarray(X, jnp.float32), make()
  _, seen = nnx.capture(mixer, nnx.Intermediate)(x, tokens=DOCUMENTS)
  weights = seen["weights"].get_value()[0]
  np.testing.assert_array_equal(weights[..., 6:, :6], 0.0)
  for where in (slice(0, 6), slice(6, T)):
    alone = implicit_attention(mixer, x[:, where])
    np.testing.assert_allclose(weights[..., where, where], alone, rtol=1e-4, atol=1e-6)


def test_sizes_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="head_dim=5 must divide 16"):
    Mamba2(8, head_dim=5, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="num_groups=3 must divide the 4 heads"):
    Mamba2(8, head_dim=4, num_groups=3, rngs=nnx.Rngs(0))
