"""Rotary bias."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import CLOSE, SAME, assert_close, inputs, instance, packed, wide

from attnx.attention import AttentionSpec, masks, reference, transforms
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.nn.rotary import angles, frequencies, rotate
from attnx.sharded.ulysses import numbered

N, R, NAME = 3, 8, "rotary_bias"


def build(width=R):
  return registry.build("transforms", "rotary_bias", num_heads=N, head_dim=width, rngs=nnx.Rngs(0))


def scores_of(bias, q: Tokens, k: Tokens, dtype=jnp.float32):
  shape = (1, N, q.position.shape[1], k.position.shape[1])
  return np.asarray(bias(jnp.zeros(shape, dtype), q.rows(1, N), k.columns())[0])


def test_it_is_the_product_of_two_vectors_that_rope_has_turned():
  with jax.enable_x64(True):
    bias, q, k = build(), Tokens.of_length(5, offset=9), Tokens.of_length(12)
    turn = lambda x, at: rotate(
      jnp.broadcast_to(x, (1, at.shape[1], N, R)).astype(float),
      angles(at, frequencies(R), float),
    )
    a, b = turn(bias.alpha, q.position), turn(bias.beta, k.position)
    expected = jnp.einsum("btnr,bsnr->nts", a, b)
    np.testing.assert_allclose(scores_of(bias, q, k, float), expected, rtol=1e-9, atol=1e-12)


def test_a_query_upon_itself_gets_the_plain_product_and_so_does_no_turn():
  bias, where = build(), Tokens.of_length(4)
  plain = jnp.einsum("nr,nr->n", bias.alpha, bias.beta)
  diagonal = np.diagonal(scores_of(bias, where, where), axis1=1, axis2=2)
  np.testing.assert_allclose(diagonal, np.repeat(plain[:, None], 4, 1), rtol=1e-5, atol=1e-8)


def test_far_from_the_beginning_it_is_as_exact_as_near():
  bias = build()
  near, far = (Tokens.of_length(6, offset=o) for o in (0, 10_000_000))
  np.testing.assert_array_equal(scores_of(bias, far, far), scores_of(bias, near, near))


def test_odd_widths_are_refused():
  with pytest.raises(ValueError, match="7 channels has no pairs"):
    build(7)


@pytest.mark.parametrize("seed", [None, 1])
def test_packed_rows_padding_and_shared_keys_are_widened_exactly(seed):
  both = instance("transforms", NAME), transforms.SoftCap(3.0)
  spec = AttentionSpec(mask=masks.Causal() & SAME, transforms=both, scale=0.3)
  tokens = packed(5, seed), packed(7, seed)  # in order, and shuffled
  assert (tokens[0].position < 0).any()

  def wider(q, k, v, spec, *tokens):
    q, k, spec = spec.transforms[0].widened(spec, q, k, *tokens)
    assert spec.transforms == both[1:]
    return reference.partial(q, k, v, spec, *tokens)

  def pulled(partial):
    loss = lambda qkv, s: jnp.sin(s.finish(partial(*qkv, s, *tokens))).sum()
    return jax.value_and_grad(loss, (0, 1))(inputs(5, 7), wide(spec))

  with jax.enable_x64(True):
    assert_close(pulled(wider), pulled(reference.partial), **CLOSE)


def test_a_scale_that_nothing_can_be_divided_by_leaves_it():
  q, tokens = jnp.ones((1, 4, N, 6)), [Tokens.of_length(4)] * 2
  width = lambda scale: build().widened(
    AttentionSpec(transforms=(build(),), scale=scale), q, q, *tokens
  )[0].shape[-1]  # fmt: skip
  traced = []
  jax.jit(lambda scale: traced.append(width(scale)))(0.3)
  assert [width(0.3), width(0.0), *traced] == [6 + R, 6, 6]


def test_heads_of_a_larger_call_are_widened_by_vectors_of_their_own():
  bias, tokens = build(), [Tokens.of_length(4)] * 2
  q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, N, 6)), jnp.float32)
  spec = AttentionSpec(transforms=(bias,))
  whole, _, _ = bias.widened(spec, q, q[:, :, :1], *tokens)
  part = numbered(spec, head=1)
  some, _, rest = part.transforms[0].widened(part, q[:, :, 1:], q[:, :, :1], *tokens)
  np.testing.assert_array_equal(some, whole[:, :, 1:])
  assert not rest.transforms


def test_it_stays_where_another_transform_multiplies_queries():
  q = k = jnp.ones((1, 4, N, 6))
  shaw = registry.build(
    "transforms", dict(name="shaw", values=False), num_heads=N, head_dim=6, rngs=nnx.Rngs(0)
  )
  spec = AttentionSpec(transforms=(build(), shaw))
  assert spec.transforms[0].widened(spec, q, k, *[Tokens.of_length(4)] * 2) == (q, k, spec)
