"""RG-LRU: the recurrent block of Griffin token by token, and what its gates promise."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.rg_lru import RGLRU, complement
from attnx.nn.implicit import implicit_attention

B, T, D, R, N, W = 2, 11, 8, 12, 3, 4
X = np.random.default_rng(0).normal(size=(B, T, D))
SEGMENT = np.repeat([0, 1], [6, 5])[None]
POSITION = np.r_[np.arange(6), np.arange(5)][None]
DOCUMENTS = Tokens(index=np.arange(T)[None], position=POSITION, segment=SEGMENT)


def make(**options):
  return RGLRU(D, rnn_dim=R, num_heads=N, rngs=nnx.Rngs(0), **options)


def dense(gate, u):
  """A gate as one matrix with zeros outside its blocks."""
  return 1 / (1 + jnp.exp(-u @ jax.scipy.linalg.block_diag(*gate.kernel[...]) - gate.bias[...]))


def naive(mixer, x, segment):
  raw = x @ mixer.inputs.kernel[...] + mixer.inputs.bias[...]
  h, rows = jnp.zeros((B, R)), []
  for t in range(x.shape[1]):
    seen = [i for i in range(min(W, t + 1)) if segment[t - i] == segment[t]]
    u = sum(mixer.conv.kernel[i] * raw[:, t - i] for i in seen) + mixer.conv.bias[...]
    a = (1 / (1 + jnp.exp(mixer.log_rate[...]))) ** (8 * dense(mixer.recurrence_gate, u))
    first = t == 0 or segment[t] != segment[t - 1]
    h, gain = (0 * h, 1.0) if first else (h, jnp.sqrt(1 - a**2))
    h = a * h + gain * dense(mixer.input_gate, u) * u
    rows.append(h)
  gate = jax.nn.gelu(x @ mixer.gate.kernel[...] + mixer.gate.bias[...])
  return (jnp.stack(rows, 1) * gate) @ mixer.out.kernel[...] + mixer.out.bias[...]


@pytest.mark.parametrize("tokens, segment", [(None, np.zeros(T, int)), (DOCUMENTS, SEGMENT[0])])
def test_values_and_gradients_are_those_of_the_loop(tokens, segment):
  with jax.enable_x64(True):
    graph, params = nnx.split(make())
    noise = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.3 * noise.normal(size=p.shape), params)
    merge, x = lambda p: nnx.merge(graph, p), jnp.asarray(X)
    f = lambda p, x: jnp.sum(jnp.sin(merge(p)(x, tokens=tokens)))
    g = lambda p, x: jnp.sum(jnp.sin(naive(merge(p), x, segment)))
    expected = naive(merge(params), x, segment)
    np.testing.assert_allclose(merge(params)(x, tokens=tokens), expected, rtol=1e-10, atol=1e-10)
    actual, expected = (jax.jit(jax.grad(h, argnums=(0, 1)))(params, x) for h in (f, g))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_decays_start_evenly_in_the_ring_of_the_paper():
  mixer = RGLRU(8, rnn_dim=2000, rngs=nnx.Rngs(0))
  a = np.exp(-np.asarray(jax.nn.softplus(mixer.log_rate[...]), float))
  assert 0.9 - 1e-5 < a.min() < 0.905 and 0.995 < a.max() < 0.999 + 1e-5
  quarters, _ = np.histogram(a**2, bins=4, range=(0.9**2, 0.999**2))
  assert abs(quarters / 500 - 1).max() < 0.15


@pytest.mark.parametrize("tokens", [None, DOCUMENTS])
def test_with_open_input_gates_noise_of_variance_one_stays_so(tokens):
  mixer = make()
  mixer.input_gate.bias.set_value(jnp.full(R, 100.0))
  weights = implicit_attention(mixer, jnp.asarray(X, jnp.float32), tokens=tokens)
  assert weights.shape == (B, R, T, T) and (weights >= 0).all()
  np.testing.assert_allclose((weights**2).sum(-1), 1.0, rtol=1e-5)


def test_the_complement_is_exact_near_one_and_has_a_slope_everywhere():
  log_decay = jnp.asarray([-1e-12, -1e-4, -1.0, -50.0], jnp.float32)
  expected = np.sqrt(-np.expm1(2 * np.asarray(log_decay, float)))
  np.testing.assert_allclose(complement(log_decay), expected, rtol=1e-6)
  edges = jnp.asarray([0.0, -1e-45, -1e-38, -1e4], jnp.float32)
  slopes = jax.grad(lambda x: complement(x).sum())(edges)
  assert np.isfinite(slopes).all() and np.isfinite(complement(edges)).all()


@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_shut_and_open_gates_have_finite_gradients(bias):
  graph, params = nnx.split(make())
  params["recurrence_gate"]["bias"].set_value(jnp.full(R, bias))
  loss = lambda p, x: jnp.square(nnx.merge(graph, p)(x)).sum()
  gradients = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(X, jnp.float32))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_a_shut_recurrence_gate_keeps_the_first_token_for_ever():
  mixer = make()
  mixer.recurrence_gate.bias.set_value(jnp.full(R, -200.0))
  weights = implicit_attention(mixer, jnp.asarray(X, jnp.float32))
  np.testing.assert_allclose(weights[..., 1:], 0.0, atol=1e-12)
  np.testing.assert_array_equal(weights[..., 0], weights[..., :1, 0] * np.ones(T))


def test_who_looks_sees_the_decays():
  _, seen = nnx.capture(make(), nnx.Intermediate)(jnp.asarray(X, jnp.float32))
  decays = seen["decays"].get_value()[0]
  assert decays.shape == (B, T, R) and "weights" not in seen
  assert (decays > 0.3).all() and (decays < 1).all()


def test_blocks_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="num_heads=5 must divide rnn_dim=8"):
    RGLRU(8, num_heads=5, rngs=nnx.Rngs(0))
