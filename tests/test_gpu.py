"""The contract of the GPU's implementations on the GPU itself: `make test-gpu`.

Everything here runs compiled kernels and is skipped elsewhere. Expected are values and gradients
of `chunked`, in float32 and full precision.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import SAME, assert_near
from test_gpu_streaming import CAUSAL, FAR, SPECS

from attnx.attention import AttentionSpec, attend, attend_partial, masks, transforms
from attnx.core.tokens import Tokens
from attnx.recurrence import kernels
from attnx.recurrence.delta import delta_rule
from attnx.recurrence.linear import linear_attention

pytestmark = pytest.mark.gpu
T, S = 1000, 1300  # no tile divides them
WIDTHS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
CUDNN = {
  "full": AttentionSpec(),
  "causal": AttentionSpec(mask=CAUSAL),
  "window": AttentionSpec(mask=CAUSAL & masks.Window(200)),
}
SPECIAL = SPECS | {
  "both": AttentionSpec(mask=CAUSAL & masks.Window(200) & SAME,
                        transforms=(transforms.SoftCap(5.0), *FAR)),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def hopper():
  if jax.default_backend() != "gpu" or jax.devices()[0].compute_capability != "9.0":
    pytest.skip("no Hopper GPU here")


def arguments(H, V, dtype, heads=(4, 2), lengths=(T, S)):
  rng = np.random.default_rng(3)
  (t, s), (n, k) = lengths, heads
  shapes = ((2, t, n, H), (2, s, k, H), (2, s, k, V))
  return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def run(spec, qkv, tokens, implementation):
  """Output and mass, and the gradients of a loss that both have a share in."""

  @jax.jit
  def loss(qkv):
    how = dict(q_tokens=tokens[0], k_tokens=tokens[1], implementation=implementation)
    p = attend_partial(*qkv, spec, **how)
    mass = p.mass * jnp.exp(jnp.where(jnp.isneginf(p.peak), 0.0, p.peak - 3))
    return jnp.sin(spec.finish(p)).sum() + jnp.log1p(mass).sum(), (spec.finish(p), mass)

  return jax.grad(loss, has_aux=True)(qkv)


def assert_contract(name, spec, qkv, tokens):
  """Within a few roundings of the weights, which are in the dtype of the inputs."""
  wide = tuple(x.astype(jnp.float32) for x in qkv)
  with jax.default_matmul_precision("highest"):
    expected = run(spec, wide, tokens, "chunked")
  actual = run(spec, qkv, tokens, name)
  close = 2**-6 if qkv[0].dtype == jnp.bfloat16 else 2**-9
  assert_near(actual, expected, close)


def packed(length: int, documents: int) -> Tokens:
  tokens = Tokens.of_length(length)
  return dataclasses.replace(tokens, segment=(tokens.index * documents // length).astype(np.int32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_heads_of_any_width_share_keys(widths, dtype):
  qkv = arguments(*widths, dtype)
  assert_contract("mosaic_gpu", SPECS["causal"], qkv, (packed(T, 1), packed(S, 1)))


@pytest.mark.parametrize("name", SPECIAL)
def test_every_spec_is_the_reference(name):
  qkv = arguments(128, 128, jnp.bfloat16)
  assert_contract("mosaic_gpu", SPECIAL[name], qkv, (packed(T, 3), packed(S, 3)))


def test_biases_have_gradients():
  qkv = arguments(64, 64, jnp.bfloat16)
  bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, T, S)), jnp.float32)

  def pull(implementation, qkv):
    def loss(bias):
      spec = AttentionSpec(mask=CAUSAL, transforms=(transforms.Add(bias),))
      return jnp.sin(attend(*qkv, spec, implementation=implementation)).sum()

    return jax.jit(jax.grad(loss))(bias)

  wide = tuple(x.astype(jnp.float32) for x in qkv)
  with jax.default_matmul_precision("highest"):
    expected = pull("chunked", wide)
  assert_near(pull("mosaic_gpu", qkv), expected, 2**-6)


@pytest.mark.parametrize("name", CUDNN)
@pytest.mark.parametrize("length", [T, 1024])
def test_cudnn_is_the_reference(name, length):
  qkv = arguments(128, 128, jnp.bfloat16, lengths=(length, length))
  assert_contract("cudnn", CUDNN[name], qkv, (packed(length, 1), packed(length, 1)))


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_few_queries_over_a_long_cache(tokens):
  qkv = arguments(128, 128, jnp.bfloat16, heads=(16, 2), lengths=(tokens, 9000))
  places = Tokens.of_length(tokens, offset=9000 - tokens), Tokens.of_length(9000)
  assert_contract("mosaic_gpu", SPECS["causal"], qkv, places)


@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("decay", ["scalar", "vector", "delta"])
def test_recurrences_are_products(decay, H):
  rng = np.random.default_rng(5)
  x = lambda *shape: jnp.asarray(rng.standard_normal((2, 500, 4, *shape)), jnp.bfloat16)
  q, k, v = x(H) / H**0.5, x(H), x(H)
  k = (k / jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True)).astype(k.dtype)
  fall = -jax.nn.softplus(x(H if decay == "vector" else 1).astype(jnp.float32))
  beta = jax.nn.sigmoid(x().astype(jnp.float32))

  def pull(implementation, dtype):
    call = functools.partial(delta_rule, beta=beta) if decay == "delta" else linear_attention

    def loss(q, k, v, fall):
      out, _ = call(q, k, v, log_decay=fall)
      return jnp.sin(out.astype(jnp.float32)).sum(), out

    with kernels.asking(implementation), jax.default_matmul_precision("highest"):
      gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
      return gradient(*(y.astype(dtype) for y in (q, k, v)), fall)

  assert_near(pull("mosaic_gpu", jnp.bfloat16), pull("chunked", jnp.float32), 2**-5)
