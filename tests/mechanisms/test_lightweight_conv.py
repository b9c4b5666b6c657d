"""Lightweight convolution: its loop, its edges, and taps that are something known."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.lightweight_conv import LightweightConv
from attnx.nn.implicit import implicit_attention

B, T, D, N = 2, 12, 16, 4
X = np.random.default_rng(0).normal(size=(B, T, D))


def make(width=3, **options):
  return LightweightConv(D, num_heads=N, width=width, rngs=nnx.Rngs(0), **options)


def glu(mixer, x):
  a, b = np.split(x @ np.asarray(mixer.value.kernel[...], float), 2, -1)
  return a / (1 + np.exp(-b))


def naive(mixer, x, segment, there, renormalise=False):
  """Token by token and head by head, in float64."""
  W, v = mixer.width, glu(mixer, x)
  kernel = np.asarray(mixer.kernel[...], float)
  P = W - 1 if mixer.causal else (W - 1) // 2
  y = np.zeros_like(v)
  for b, t, n in np.ndindex(B, x.shape[1], N):
    if not there[b, t]:
      continue
    at = {j: t + j - P for j in range(W) if 0 <= t + j - P < x.shape[1]}
    at = {j: s for j, s in at.items() if there[b, s] and segment[b, s] == segment[b, t]}
    e = np.exp(kernel[n])
    total = sum(e[j] for j in at) if renormalise else e.sum()
    channels = slice(n * D // N, (n + 1) * D // N)
    y[b, t, channels] = sum(e[j] / total * v[b, s, channels] for j, s in at.items())
  return y @ np.asarray(mixer.out.kernel[...], float)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("width", [1, 4, 5, 15])
def test_it_is_the_loop_with_documents_and_padding(causal, renormalise, width):
  segment = np.array([[0] * 5 + [1] * 7, [3] * 12])
  position = np.array([[*range(5), *range(7)], [-1, -1, *range(10)]])
  tokens = Tokens(index=np.arange(T)[None], position=position, segment=segment)
  with jax.enable_x64(True):
    mixer = make(width, causal=causal, renormalise=renormalise)
    actual = mixer(jnp.asarray(X), tokens=tokens)
    expected = naive(mixer, X, segment, position >= 0, renormalise)
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9)


def test_a_single_tap_on_the_token_itself_is_the_gated_unit_alone():
  for causal, tap in ((True, 2), (False, 1)):
    mixer = make(3, causal=causal)
    mixer.kernel.set_value(jnp.full((N, 3), -1e9).at[:, tap].set(0.0))
    expected = glu(mixer, X) @ np.asarray(mixer.out.kernel[...], float)
    actual = mixer(X.astype(np.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_channels_are_dealt_to_heads_in_blocks():
  mixer = make(2)
  mixer.kernel.set_value(jnp.zeros((N, 2)).at[0, 0].set(1e9))  # head 0 reads the token before
  mixer.out.kernel.set_value(jnp.eye(D))
  y, v = np.asarray(mixer(X.astype(np.float32))), glu(mixer, X)
  np.testing.assert_allclose(y[:, 1:, : D // N], v[:, :-1, : D // N], rtol=1e-4, atol=1e-5)
  mean = (v[:, 1:, D // N :] + v[:, :-1, D // N :]) / 2
  np.testing.assert_allclose(y[:, 1:, D // N :], mean, rtol=1e-4, atol=1e-5)


def test_its_matrix_is_a_band_of_the_same_taps_for_every_token():
  mixer, x = make(3), jnp.asarray(X, jnp.float32)
  taps = jax.nn.softmax(mixer.kernel[...], axis=-1)
  expected = sum(taps[:, j, None, None] * np.eye(T, k=j - 2) for j in range(3))
  np.testing.assert_allclose(implicit_attention(mixer, x)[1], expected, rtol=1e-5, atol=1e-7)


def test_taps_begin_as_those_of_the_released_code():
  mixer = LightweightConv(512, num_heads=256, width=31, rngs=nnx.Rngs(0))
  bound = (6 / (31 + 256 * 31)) ** 0.5  # Xavier's, of 31 inputs and 256 * 31 outputs
  assert 0.98 * bound < np.abs(mixer.kernel[...]).max() <= bound


def test_steps_after_a_prompt_padded_on_the_left_equal_one_call():
  mixer = make(5, renormalise=True)
  x = X.astype(np.float32)
  position = np.array([[*range(12)], [-1, -1, -1, *range(9)]])
  tokens = Tokens(index=np.arange(T)[None], position=position, segment=np.full((B, T), 7))
  whole = mixer(x, tokens=tokens)
  y, cache = mixer.step(x[:, :6], mixer.init_cache(B, T), tokens=tokens[:6])
  outs = [y]
  for t in range(6, T):
    y, cache = mixer.step(x[:, t : t + 1], cache)
    outs.append(y)
  assert cache.value.shape == (B, 4, N, D // N)
  np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, rtol=1e-5, atol=1e-6)


def test_dropped_taps_keep_their_mean_and_need_a_key():
  mixer = make(3, dropout=0.5)
  x = X.astype(np.float32)
  draw = jax.jit(jax.vmap(lambda key: mixer(x, key=key)))
  draws = draw(jax.random.split(jax.random.key(0), 600))
  np.testing.assert_allclose(draws.mean(0), mixer(x), atol=0.2)
  assert draws.std(0).min() > 0.01


def test_what_it_cannot_do_is_refused():
  with pytest.raises(NotImplementedError, match="takes no context"):
    make()(X, context=X)
  with pytest.raises(NotImplementedError, match="stepping needs causal=True"):
    make(causal=False).init_cache(B, T)
  with pytest.raises(ValueError, match="num_heads=5 must divide dim=16"):
    LightweightConv(D, num_heads=5, rngs=nnx.Rngs(0))
