"""Importance of heads, of arrays and of models."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.analysis.intervene import edited
from attnx.analysis.observe import gate_gradients
from attnx.core import registry
from attnx.mechanisms.analyses.head_importance import scaled
from attnx.mechanisms.edits.scale import Scale

B, T, D, N = 3, 5, 16, 4
X = np.random.default_rng(0).normal(size=(B, T, D))


def importance(gradients) -> np.ndarray:
  seen = {"gate_gradients": jnp.asarray(gradients)}
  return np.asarray(registry.build("analyses", "head_importance")(seen)[""])


def attention(**options):
  config = dict(name="attention", num_heads=N, num_kv_heads=2, **options)
  mixer = registry.build("mixers", config, dim=D, rngs=nnx.Rngs(0))
  wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), nnx.state(mixer, nnx.Param))
  nnx.update(mixer, wide)
  return mixer


def losses(mixer) -> jax.Array:
  return jnp.sin(3 * mixer(X)).sum((1, 2))  # one an example


def of_model(mixer) -> np.ndarray:
  return importance(gate_gradients(lambda mixer: losses(mixer).sum(), mixer)["gate_gradients"])


def test_tokens_add_up_before_the_magnitude_and_examples_after_it():
  gradients = np.array([[[1.0, -1.0], [2.0, 3.0]], [[0.0, 1.0], [-4.0, 1.0]]])  # (B, N, T)
  np.testing.assert_allclose(importance(gradients), [(0 + 1) / 2, (5 + 3) / 2])


def test_it_is_the_mean_magnitude_of_finite_differences_in_each_gate():
  with jax.enable_x64(True):
    mixer, e, expected = attention(), 1e-6, []
    gated = lambda g: losses(edited(mixer, {"": Scale(jnp.asarray(g)[None, :, None, None])}))
    for n in range(N):
      step = e * (np.arange(N) == n)
      slope = (gated(1.0 + step) - gated(1.0 - step)) / (2 * e)
      expected.append(np.abs(slope).mean())
    np.testing.assert_allclose(of_model(mixer), expected, rtol=1e-6)
    assert min(expected) > 1e-2


def test_a_head_that_nothing_reads_has_none_and_equal_heads_have_the_same():
  with jax.enable_x64(True):
    mixer = attention()
    mixer.out.kernel[...] = mixer.out.kernel[...].at[2].set(0.0)
    for linear, axis in ((mixer.query, 1), (mixer.out, 0)):
      linear.kernel[...] = jnp.take(linear.kernel[...], np.array([0, 0, 2, 3]), axis)
    found = of_model(mixer)
    assert found[2] == 0 and found[3] > 1e-2
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


def test_a_linear_loss_loses_just_what_the_head_is_worth():
  with jax.enable_x64(True):
    mixer = attention()
    loss = lambda mixer: mixer(X[:1]).sum()
    gradients = gate_gradients(loss, mixer)["gate_gradients"]
    for n in range(N):
      ablate = registry.build("edits", dict(name="ablate", num_heads=N, heads=[n]))
      off = edited(mixer, {"": ablate})
      np.testing.assert_allclose(loss(mixer) - loss(off), gradients[0, n].sum(), rtol=1e-9)


def test_scaled_layers_have_norm_one_and_keep_their_order():
  raw = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1e-3, 0.0]), "c": jnp.zeros(2)}
  found = scaled(raw)
  np.testing.assert_allclose(found["a"], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(found["b"], [1.0, 0.0], rtol=1e-6)
  np.testing.assert_array_equal(found["c"], 0.0)
