"""Gated DeltaNet: the gated delta rule token by token, and what its gates promise."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.gated_delta_net import GatedDeltaNet
from attnx.nn.implicit import implicit_attention

B, T, D, N, K, H, V, W = 2, 11, 8, 4, 2, 3, 5, 4
X = np.random.default_rng(0).normal(size=(B, T, D))
SEGMENT = np.repeat([0, 1], [6, 5])[None]
POSITION = np.r_[np.arange(6), np.arange(5)][None]
DOCUMENTS = Tokens(index=np.arange(T)[None], position=POSITION, segment=SEGMENT)


def make(**options):
  sizes = dict(num_heads=N, num_key_heads=K, head_dim=H, value_dim=V)
  return GatedDeltaNet(D, **sizes | options, rngs=nnx.Rngs(0))


def convolved(part, x, segment):
  raw, rows = x @ part.project.kernel[...], []
  for t in range(x.shape[1]):
    seen = [i for i in range(min(W, t + 1)) if segment[t - i] == segment[t]]
    rows.append(sum(part.conv.kernel[i] * raw[:, t - i] for i in seen))
  y = jnp.stack(rows, 1)
  return (y / (1 + jnp.exp(-y))).reshape(*y.shape[:2], *part.heads)


def naive(mixer, x, segment, most=1.0):
  q, k, v = (convolved(part, x, segment) for part in (mixer.query, mixer.key, mixer.value))
  q, k = (jnp.repeat(y, N // K, axis=2) for y in (q, k))
  q, k = (y / jnp.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
  beta = most / (1 + jnp.exp(-x @ mixer.beta.kernel[...]))
  step = jnp.log1p(jnp.exp(x @ mixer.rate.kernel[...] + mixer.time_step.bias[...]))
  decay = jnp.exp(-jnp.exp(mixer.time_step.log_rate[...]) * step)
  state, rows = jnp.zeros((B, N, H, V)), []
  for t in range(x.shape[1]):
    if t and segment[t] != segment[t - 1]:
      state = 0 * state
    state = decay[:, t, :, None, None] * state
    wrong = v[:, t] - jnp.einsum("bnh,bnhv->bnv", k[:, t], state)
    state += jnp.einsum("bn,bnh,bnv->bnhv", beta[:, t], k[:, t], wrong)
    rows.append(jnp.einsum("bnh,bnhv->bnv", q[:, t], state) / H**0.5)
  heads, gate = jnp.stack(rows, 1), jnp.einsum("btd,dnv->btnv", x, mixer.gate.kernel[...])
  heads /= jnp.sqrt((heads**2).mean(-1, keepdims=True) + mixer.norm.epsilon)
  heads *= mixer.norm.scale[...] * gate / (1 + jnp.exp(-gate))
  return jnp.einsum("btnv,nvd->btd", heads, mixer.out.kernel[...])


@pytest.mark.parametrize("tokens, segment, reflect", [
  (None, np.zeros(T, int), False), (DOCUMENTS, SEGMENT[0], True),
])  # fmt: skip
def test_values_and_gradients_are_those_of_the_loop(tokens, segment, reflect):
  with jax.enable_x64(True):
    graph, params = nnx.split(make(allow_neg_eigval=reflect))
    noise, most = np.random.default_rng(1), 2.0 if reflect else 1.0
    params = jax.tree.map(lambda p: p + 0.3 * noise.normal(size=p.shape), params)
    merge, x = lambda p: nnx.merge(graph, p), jnp.asarray(X)
    f = lambda p, x: jnp.sum(jnp.sin(merge(p)(x, tokens=tokens)))
    g = lambda p, x: jnp.sum(jnp.sin(naive(merge(p), x, segment, most)))
    expected = naive(merge(params), x, segment, most)
    np.testing.assert_allclose(merge(params)(x, tokens=tokens), expected, rtol=1e-9, atol=1e-9)
    actual, expected = (jax.jit(jax.grad(h, argnums=(0, 1)))(params, x) for h in (f, g))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8)


def with_strength(beta_logit, log_rate=None, **options):
  """A mixer that asks for the key it writes, and whose first input says how strongly."""
  mixer = make(**options)
  mixer.query.project.kernel.set_value(mixer.key.project.kernel[...])
  mixer.query.conv.kernel.set_value(mixer.key.conv.kernel[...])
  mixer.beta.kernel.set_value(jnp.zeros((D, N)).at[0].set(beta_logit))
  if log_rate is not None:
    mixer.time_step.log_rate.set_value(jnp.full(N, log_rate))
  return mixer, jnp.asarray(X, jnp.float32).at[..., 0].set(1.0)


def test_at_full_strength_a_key_reads_what_was_written_last_whatever_came_before():
  mixer, x = with_strength(50.0)
  values = mixer.values(x)
  np.testing.assert_allclose(mixer.mix(x, values), values / H**0.5, rtol=1e-3, atol=1e-4)


def test_with_negative_eigenvalues_a_key_that_comes_again_turns_the_memory_around():
  mixer, x = with_strength(50.0, log_rate=-50.0, allow_neg_eigval=True, width=1)
  weights = implicit_attention(mixer, jnp.broadcast_to(x[:, :1], x.shape))
  turns = np.tril((-1.0) ** np.subtract.outer(np.arange(T), np.arange(T)))
  expected = np.broadcast_to(2 * turns / H**0.5, weights.shape)
  np.testing.assert_allclose(weights, expected, atol=1e-3)


def test_it_has_six_d_squared_parameters_and_the_decays_of_the_paper():
  large = nnx.eval_shape(lambda: GatedDeltaNet(2048, rngs=nnx.Rngs(0)))
  count = sum(p.size for p in jax.tree.leaves(nnx.state(large, nnx.Param)))
  assert 6 <= count / 2048**2 < 6.03 and large.value.heads == (6, 512)
  mixer = make(num_heads=500, num_key_heads=1, value_dim=1)
  rate, step = np.exp(mixer.time_step.log_rate[...]), jax.nn.softplus(mixer.time_step.bias[...])
  assert 0 < rate.min() < 0.2 and 15.8 < rate.max() <= 16
  assert 0.000999 < step.min() and step.max() < 0.1001


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="num_key_heads=3 must divide num_heads=4"):
    make(num_key_heads=3)
