"""Mega: query by query, its chunks, its gates; see tests/test_moving_average.py for averages."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.mega import Mega

B, T, D, H, V, R = 2, 9, 6, 4, 5, 3
X = np.random.default_rng(0).normal(size=(B, T, D))
BIAS = dict(name="relative_bias", max_distance=T)


def make(**options):
  options = dict(key_dim=H, value_dim=V, state_dim=R, bias=BIAS) | options
  mixer = Mega(D, **options, rngs=nnx.Rngs(0))
  draw = lambda x: x + jnp.asarray(0.5 * np.random.default_rng(x.size).normal(size=x.shape), "f")
  nnx.update(mixer, jax.tree.map(draw, nnx.state(mixer, nnx.Param)))  # scores that matter
  return mixer


def naive(mixer, x, laplace=False, chunk=T):
  """Query by query in JAX, in the precision of x."""
  n = x if mixer.norm is None else mixer.norm(x)
  e = mixer.average(n)
  affine = lambda layer, x: x @ layer.kernel[...] + layer.bias[...]
  base, v = affine(mixer.shared, e), jax.nn.silu(affine(mixer.value, n))
  u, h = jax.nn.sigmoid(base[..., :D]), base[..., -D:]
  z, r = (jax.nn.silu(base[..., a:b]) for a, b in ((D, D + H), (D + H, D + H + V)))
  q, k = (z * mixer.gain[...][i] + mixer.offset[...][i] for i in range(2))
  bias, rows = mixer.spec.transforms[0].bias[...], []
  for t in range(x.shape[1]):
    seen = [s for s in range(x.shape[1]) if s // chunk == t // chunk]
    seen = jnp.array([s for s in seen if s <= t or not mixer.causal])
    products = jnp.einsum("bh,bsh->bs", q[:, t], k[:, seen])
    scores = products / (len(seen) if laplace else math.sqrt(H)) + bias[T - 1 + seen - t, 0]
    law = 0.5 * (1 + jax.scipy.special.erf((scores - 0.5**0.5) * math.sqrt(2 * math.pi)))
    rows.append(jnp.einsum("bs,bsv->bv", law if laplace else jax.nn.softmax(scores), v[:, seen]))
  heads = jnp.stack(rows, 1)
  return u * (jax.nn.silu(h + affine(mixer.out, r * heads)) - x)


@pytest.mark.parametrize("options", [
  dict(), dict(causal=False, prenorm=True), dict(normaliser="laplace"),
  dict(normaliser="laplace", causal=False, chunk=4), dict(chunk=4),
])  # fmt: skip
def test_values_and_gradients_are_those_of_the_loop(options):
  kind = dict(laplace="normaliser" in options, chunk=options.get("chunk", T))
  with jax.enable_x64(True):
    graph, params = nnx.split(make(**options))
    params = jax.tree.map(lambda x: x.astype(float), params)
    losses = (lambda m, x: m(x)), (lambda m, x: naive(m, x, **kind))
    values = [f(nnx.merge(graph, params), jnp.asarray(X)) for f in losses]
    np.testing.assert_allclose(*values, rtol=1e-9, atol=1e-10)
    grads = [
      jax.jit(jax.grad(lambda p, x: jnp.sin(f(nnx.merge(graph, p), x)).sum(), argnums=(0, 1)))(
        params, jnp.asarray(X)
      ) for f in losses
    ]  # fmt: skip
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_a_chunk_as_long_as_the_sequence_is_no_chunk_and_averages_cross_them():
  x = jnp.asarray(X, jnp.float32)
  np.testing.assert_allclose(make(chunk=T)(x), make()(x), rtol=1e-5, atol=1e-6)
  mixer = make(chunk=3)
  before, after = mixer(x), mixer(x.at[:, 0].add(3.0))
  assert np.abs(before - after)[:, 3:].max() > 1e-3
  matrix = mixer.mix(x, jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, 1, T)))[:, :, 0]
  same = np.arange(T)[:, None] // 3 == np.arange(T) // 3
  assert not matrix[:, ~same].any()


def test_a_closed_gate_is_the_identity_of_a_residual_layer():
  mixer = make()
  mixer.shared.bias.set_value(mixer.shared.bias[...].at[:D].set(-1e9))
  assert not mixer(X.astype(np.float32)).any()


@pytest.mark.parametrize("normaliser", ["softmax", "laplace"])
def test_chunked_steps_remember_one_chunk_and_go_on_with_their_document(normaliser):
  mixer, x = make(chunk=4, normaliser=normaliser), X.astype(np.float32)
  cache = mixer.init_cache(B, 1000)
  assert cache.pairs.key.shape == (B, 4, 1, H) and cache.averages.past.shape == (B, D, R)
  position = np.array([[*range(6)], [-1, -1, *range(4)]])
  tokens = Tokens(index=np.arange(6)[None], position=position, segment=np.full((B, 6), 7))
  y, cache = mixer.step(x[:, :6], cache, tokens=tokens)
  outs = [y]
  for t in range(6, T):
    y, cache = mixer.step(x[:, t : t + 1], cache)
    outs.append(y)
  out = jnp.concatenate(outs, 1)
  np.testing.assert_allclose(out[:1], mixer(x[:1]), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(out[1:, 2:], mixer(x[1:, 2:]), rtol=1e-4, atol=1e-5)
  new = dataclasses.replace(Tokens.of_length(2), segment=np.full((1, 2), 8))
  y, _ = mixer.step(x[:, :2], cache, tokens=new)
  np.testing.assert_allclose(y, mixer(x[:, :2]), rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_refused():
  with pytest.raises(NotImplementedError, match="takes no context"):
    make()(X, context=X)
  with pytest.raises(NotImplementedError, match="use causal=True"):
    make(causal=False).init_cache(B, T)
