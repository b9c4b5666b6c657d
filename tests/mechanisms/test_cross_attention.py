"""Cross attention."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import wide

from attnx.core.tokens import Tokens
from attnx.mechanisms.mixers.cross_attention import CrossAttention

B, T, S, D, N, K, H, C = 2, 6, 9, 12, 4, 2, 3, 10
rng = np.random.default_rng(0)
X, CONTEXT = rng.standard_normal((B, T, D)), rng.standard_normal((B, S, C))
CLOSE = dict(rtol=1e-5, atol=1e-6)


@functools.cache
def make(mask="everything"):
  attention = dict(num_heads=N, num_kv_heads=K, context_dim=C, use_bias=True)
  with jax.ensure_compile_time_eval():
    return CrossAttention(D, mask=mask, attention=attention, rngs=nnx.Rngs(0))


def naive(mixer, x, context, visible):
  """The formula, in the dtype of its arguments."""
  w = {name: [layer.kernel[...], layer.bias[...]] for name, layer in vars(mixer.attention).items()
       if name in ("query", "key", "value", "out")}  # fmt: skip
  q = jnp.einsum("btd,dnh->btnh", x, w["query"][0]) + w["query"][1]
  k, v = (jnp.einsum("bsc,cnh->bsnh", context, w[n][0]) + w[n][1] for n in ("key", "value"))
  k, v = (jnp.repeat(y, N // K, axis=2) for y in (k, v))
  scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
  weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
  heads = jnp.einsum("bnts,bsnh->btnh", weights, v)
  return jnp.einsum("btnh,nhd->btd", heads, w["out"][0]) + w["out"][1]


@pytest.mark.parametrize("mask", ["everything", "causal"])
def test_values_and_gradients_are_those_of_the_formula(mask):
  visible = np.tri(T, S, dtype=bool) if mask == "causal" else np.ones((T, S), bool)
  with jax.enable_x64(True):
    mixer = nnx.merge(nnx.split(make(mask))[0], wide(nnx.split(make(mask))[1]))
    given = jnp.asarray(X), jnp.asarray(CONTEXT)
    ours = lambda x, context: mixer(x, context=context)
    theirs = lambda x, context: naive(mixer, x, context, visible)
    np.testing.assert_allclose(ours(*given), theirs(*given), rtol=1e-9)
    grads = [jax.grad(lambda *g: jnp.cos(f(*g)).sum(), (0, 1))(*given) for f in (ours, theirs)]
    for a, b in zip(*grads):
      np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mask", ["everything", "causal"])
def test_decoding_over_what_is_remembered_is_one_call(mask):
  mixer = make(mask)
  x, context = (jnp.asarray(y, jnp.float32) for y in (X, CONTEXT))
  where = Tokens.of_lengths(jnp.array([S, 4]), S)
  whole = mixer(x, context=context, context_tokens=where)
  memory, out = mixer.remember(context, context_tokens=where), []
  for a, b in ((0, 3), (3, 4), (4, T)):
    y, memory = mixer.step(x[:, a:b], memory)
    out.append(y)
  np.testing.assert_allclose(jnp.concatenate(out, 1), whole, **CLOSE)
  np.testing.assert_array_equal(memory.seen, T)


def test_it_asks_for_what_it_wants():
  x = jnp.asarray(X, jnp.float32)
  with pytest.raises(ValueError, match="wants a context; for one sequence take 'attention'"):
    make()(x)
  with pytest.raises(ValueError, match="call `remember"):
    make().init_cache(B, T)
