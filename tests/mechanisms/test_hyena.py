"""Hyena: its sums, its filters, its matrix, and what a step remembers."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.hyena import Hyena, ImplicitFilter
from attnx.nn.implicit import implicit_attention

B, T, D, L = 2, 11, 4, 16
X = np.random.default_rng(0).normal(size=(B, T, D))


def make(order=2, **options):
  kinds = dict(max_length=L, filter_width=8, frequency=3.0)
  return Hyena(D, order=order, **kinds, **options, rngs=nnx.Rngs(0))


def taps_of(filter, length, bands):
  """The constants of the released code: fast_decay_pct 0.3, slow_decay_pct 1.5, target 1e-2."""
  t = jnp.linspace(0.0, 1.0, filter.max_length)[:length, None]
  w = 2 * math.pi * jnp.arange(length)[:, None] / filter.max_length
  z = jnp.exp(-1j * jnp.linspace(1e-4, bands - 1, bands) * w)
  y = jnp.concatenate([t, z.real, z.imag], axis=1)
  for layer in filter.hidden:
    y = jnp.sin(filter.frequency[...] * (y @ layer.kernel[...] + layer.bias[...]))
  y = y @ filter.out.kernel[...]
  decay = jnp.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, y.shape[1])
  return (y * jnp.exp(-t * jnp.abs(decay))).reshape(length, D, -1)


def naive(mixer, x, bands):
  """Sum by sum, in the precision of x."""
  u = x @ mixer.project.kernel[...] + mixer.project.bias[...]
  w = mixer.conv.kernel[...]
  u = jnp.stack([
    mixer.conv.bias[...] + sum(w[i] * u[:, t - i] for i in range(min(3, t + 1))) for t in range(T)
  ], axis=1)  # fmt: skip
  (x0, *gates, v), h = jnp.split(u, mixer.skip.shape[1] + 2, -1), taps_of(mixer.filter, T, bands)
  for i, gate in enumerate(gates[::-1]):
    z = gate * v
    sums = [sum(h[t - s, :, i] * z[:, s] for s in range(t + 1)) for t in range(T)]
    v = jnp.stack(sums, axis=1) + mixer.skip[...][:, i] * z
  return (x0 * v) @ mixer.out.kernel[...] + mixer.out.bias[...]


@pytest.mark.parametrize("order, bands", [(2, 1), (4, 3)])
def test_values_and_gradients_are_those_of_the_sums(order, bands):
  with jax.enable_x64(True):
    graph, params = nnx.split(make(order, bands=bands))
    params = jax.tree.map(lambda x: x.astype(float), params)
    run = lambda f: jax.jit(jax.value_and_grad(
      lambda p, x: jnp.sin(3 * f(nnx.merge(graph, p), x)).sum(), argnums=(0, 1)
    ))(params, jnp.asarray(X))  # fmt: skip
    values = run(lambda m, x: m(x)), run(lambda m, x: naive(m, x, bands))
    for a, b in zip(*map(jax.tree.leaves, values), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_filters_are_of_the_longest_sequence_whatever_the_length():
  filter = ImplicitFilter(D, 2, max_length=64, bands=2, shift=0.05, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(filter(64)[:9], filter(9), rtol=1e-5, atol=1e-8)
  filter.out.kernel.set_value(jnp.zeros_like(filter.out.kernel[...]).at[0].set(1.0))
  ratio = filter(64) / filter(64)[:, :1, :1]  # the windows are left, over that of the slowest
  far = [math.exp(math.log(0.01) / part) + 0.05 for part in (1.5, 0.3)]
  np.testing.assert_allclose(ratio[-1, -1, -1], far[1] / far[0], rtol=1e-4)


def test_without_filters_it_is_gates_alone():
  mixer, x = make(3), jnp.asarray(X, jnp.float32)
  mixer.filter.out.kernel.set_value(jnp.zeros_like(mixer.filter.out.kernel[...]))
  mixer.skip.set_value(jnp.ones_like(mixer.skip[...]))
  gates = jnp.prod(jnp.stack(jnp.split(mixer.conv(mixer.project(x)), 4, -1)), axis=0)
  np.testing.assert_allclose(mixer(x), mixer.out(gates), rtol=1e-5, atol=1e-6)


def test_its_matrix_is_a_toeplitz_one_between_two_gates():
  mixer, x = make(), jnp.asarray(X, jnp.float32)
  x0, gate, _ = jnp.split(mixer.conv(mixer.project(x)), 3, -1)
  lag = np.arange(T)[:, None] - np.arange(T)
  h = np.where(lag[..., None] >= 0, mixer.filter(T)[np.maximum(lag, 0), :, 0], 0.0)
  h = h + np.eye(T)[..., None] * mixer.skip[...][:, 0]
  expected = jnp.einsum("btd,tsd,bsd->bdts", x0, h, gate)
  np.testing.assert_allclose(implicit_attention(mixer, x), expected, rtol=1e-4, atol=1e-6)


def packed(*lengths) -> Tokens:
  position = np.concatenate([np.arange(n) for n in lengths])[None]
  segment = np.repeat(np.arange(len(lengths)), lengths)[None]
  return dataclasses.replace(Tokens.of_length(sum(lengths)), position=position, segment=segment)


def test_packed_prompts_and_later_documents_step_as_if_alone():
  mixer, x = make(3), X.astype(np.float32)
  tokens = packed(2, 5, 4)
  expected = jnp.concatenate([mixer(x[:, a:b]) for a, b in ((0, 2), (2, 7), (7, 11))], axis=1)
  np.testing.assert_allclose(mixer(x, tokens=tokens), expected, rtol=1e-4, atol=1e-5)
  for cuts in ((0, 6, 7, 10, 11), (0, 1, 2, 3, 11)):
    cache, outs = mixer.init_cache(B, 5), []
    for a, b in zip(cuts, cuts[1:]):
      y, cache = mixer.step(x[:, a:b], cache, tokens=tokens[a:b])
      outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_seen_and_is_over_with_its_document():
  mixer, x = make(), X.astype(np.float32)
  five, cache = mixer.step(x[:, :5], mixer.init_cache(B, 5))
  six, cache = mixer.step(x[:, 5:6], cache)
  assert np.isfinite(five).all() and np.isnan(six).all()
  y = mixer.step(x[:, :3], cache, tokens=packed(1, 3)[1:])[0]
  np.testing.assert_allclose(y, mixer(x[:, :3]), rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match="17 tokens exceed max_length=16"):
    mixer.init_cache(B, 17)
