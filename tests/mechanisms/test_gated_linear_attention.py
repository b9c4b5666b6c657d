"""Gated linear attention: its gates, and the recurrence they rule."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.analysis.observe import observe
from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.gated_linear_attention import GatedLinearAttention
from attnx.nn.implicit import implicit_attention

B, T, D, N = 2, 21, 16, 2
X = np.random.default_rng(0).normal(size=(B, T, D))


def make(**options):
  return GatedLinearAttention(D, num_heads=N, gate_rank=3, rngs=nnx.Rngs(0), **options)


def naive(mixer, x):
  """Token by token, in the precision of x."""
  heads = lambda p: jnp.einsum("btd,dnh->tbnh", x, p.kernel[...].astype(x.dtype))
  q, k, v, g = map(heads, (mixer.query, mixer.key, mixer.value, mixer.gate))
  low = x @ mixer.narrow.kernel[...].astype(x.dtype)
  gate = jnp.einsum("btr,rnh->tbnh", low, mixer.decay.kernel[...].astype(x.dtype))
  a = jax.nn.sigmoid(gate + mixer.decay.bias[...].astype(x.dtype)) ** (1 / 16)
  state, rows = jnp.zeros((B, N, 4, 8), x.dtype), []
  for t in range(x.shape[1]):
    state = a[t][..., None] * state + k[t][..., None] * v[t][..., None, :]
    o = jnp.einsum("bnh,bnhv->bnv", q[t], state) / 4**0.5
    o = o / jnp.sqrt(jnp.mean(o * o, -1, keepdims=True) + 1e-5) * mixer.norm.scale[...]
    out = mixer.out.kernel[...].astype(x.dtype)
    rows.append(jnp.einsum("bnv,nvd->bd", o * jax.nn.silu(g[t]), out))
  return jnp.stack(rows, 1)


def test_values_and_gradients_are_those_of_the_recurrence():
  with jax.enable_x64(True):
    graph, params, rest = nnx.split(make(), nnx.Param, ...)
    f = lambda p, x: jnp.cos(nnx.merge(graph, p, rest)(x)).sum()
    g = lambda p, x: jnp.cos(naive(nnx.merge(graph, p, rest), x)).sum()
    x = jnp.asarray(X)
    np.testing.assert_allclose(make()(x), naive(make(), x), rtol=1e-9, atol=1e-11)
    actual, expected = (jax.jit(jax.grad(h, (0, 1)))(params, x) for h in (f, g))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_recurrent_chunkwise_and_parallel_forms_and_steps_agree():
  with jax.enable_x64(True):
    x, length = jnp.asarray(np.random.default_rng(1).normal(size=(B, 37, D))), 37
    place = np.r_[:9, : length - 9][None]  # two documents
    index = np.arange(length)[None]
    tokens = Tokens(index=index, position=place, segment=(index >= 9) + 0)
    mixers = [make(temperature=0.5, chunk=chunk) for chunk in (1, 4, 16, length)]
    expected, *others = (mixer(x, tokens=tokens) for mixer in mixers)
    for other in others:
      np.testing.assert_allclose(other, expected, rtol=1e-9, atol=1e-12)
    cache = mixers[1].init_cache(B, length)
    for a, b in ((0, 1), (1, 8), (8, 15), (15, length)):
      y, cache = mixers[1].step(x[:, a:b], cache, tokens=tokens[a:b])
      np.testing.assert_allclose(y, expected[:, a:b], rtol=1e-9, atol=1e-12)


def test_gates_that_never_change_fade_by_distance_and_this_is_what_is_observed():
  mixer, x = make(), jnp.asarray(X, jnp.float32)
  mixer.decay.kernel.set_value(jnp.zeros_like(mixer.decay.kernel[...]))
  heads = lambda p: np.asarray(p(x), float)
  scores = np.einsum("btnh,bsnh->bnts", heads(mixer.query), heads(mixer.key)) / 4**0.5
  far = np.arange(T)[:, None] - np.arange(T)
  weights = scores * np.tri(T) * 0.5 ** (np.maximum(far, 0) / 16)
  _, seen = observe(mixer, x)
  np.testing.assert_allclose(seen["weights"], weights, rtol=1e-4, atol=1e-6)
  read = np.einsum("bnts,bsnv->btnv", weights, heads(mixer.value))
  np.testing.assert_allclose(seen["heads"], read, rtol=1e-4, atol=1e-6)


def test_a_gate_of_one_half_keeps_0_958_of_a_state():
  mixer = make()
  mixer.decay.kernel.set_value(jnp.zeros_like(mixer.decay.kernel[...]))
  np.testing.assert_allclose(jnp.exp(mixer.log_decay(jnp.asarray(X))), 0.5 ** (1 / 16), rtol=1e-6)


def test_gates_that_forget_all_leave_each_token_alone_and_finite():
  mixer = make(temperature=1.0)
  mixer.decay.bias.set_value(jnp.full_like(mixer.decay.bias[...], -1e4))
  x = jnp.asarray(X, jnp.float32)
  matrix = implicit_attention(mixer, x)
  off = ~np.eye(T, dtype=bool)
  assert np.isfinite(matrix).all() and not matrix[..., off].any() and matrix[..., ~off].all()
  assert np.isfinite(jax.grad(lambda x: jnp.sum(mixer(x)))(x)).all()


def test_widths_are_half_for_keys_and_whole_for_values():
  mixer = GatedLinearAttention(64, rngs=nnx.Rngs(0))
  assert mixer.init_cache(1, 9).past.shape == (1, 4, 8, 16)
  spread = float(jnp.std(mixer.query.kernel[...]))
  np.testing.assert_allclose(spread, 2**-2.5 * np.sqrt(2 / (64 + 32)), rtol=0.05)
