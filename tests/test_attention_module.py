"""The attention module: projections, norms and combiners around `attend`."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import AttentionSpec, attend, masks, reference
from attnx.attention.transforms import Dropout
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.mechanisms.positions.rope import Rope
from attnx.nn.attention import Attention, value_of

B, T, S, D, N = 2, 9, 7, 16, 4
CLOSE = dict(rtol=1e-4, atol=1e-5)
X = np.random.default_rng(0).normal(size=(B, T, D))
CONTEXT = np.random.default_rng(1).normal(size=(B, S, 6))
x32, context32 = (functools.partial(jnp.asarray, a, jnp.float32) for a in (X, CONTEXT))


def make(seed=0, **options):
  """An instance with every parameter off its initial value: biases, gains and tables too."""
  attention = Attention(D, num_heads=N, rngs=nnx.Rngs(seed), **options)
  graph, params, rest = nnx.split(attention, nnx.Param, ...)
  rng = np.random.default_rng(seed)
  move = lambda p: jnp.asarray(p + 0.2 * rng.normal(size=p.shape), p.dtype)
  return nnx.merge(graph, jax.tree.map(move, params), rest)


def run(attention, x, **options):
  return jax.jit(lambda x, options: attention(x, **options))(x, options)


def naive(m, x, rope=None):
  """Causal attention, one query of one head after the other, with repeated keys and values."""

  def project(layer, norm=None):
    y = jnp.einsum("btd,dnh->btnh", x, layer.kernel[...])
    y = y if layer.bias is None else y + layer.bias[...]
    if norm is not None:
      y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6) * norm.scale[...]
    return jnp.repeat(y, N // y.shape[2], axis=2)

  q, k, v = project(m.query, m.query_norm), project(m.key, m.key_norm), project(m.value)
  if rope is not None:
    q, k = rope.query(q, np.arange(T)[None]), rope.key(k, np.arange(T)[None])
  heads = []
  for n in range(N):
    rows = []
    for t in range(T):
      scores = jnp.einsum("bh,bsh->bs", q[:, t, n], k[:, : t + 1, n]) / q.shape[-1] ** 0.5
      rows.append(jnp.einsum("bs,bsv->bv", jax.nn.softmax(scores), v[:, : t + 1, n]))
    heads.append(jnp.stack(rows, 1))
  out = jnp.einsum("btnv,nvd->btd", jnp.stack(heads, 2), m.out.kernel[...])
  return out if m.out.bias is None else out + m.out.bias[...]


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(num_kv_heads=2, position="rope", qk_norm=True),
    dict(num_kv_heads=1, use_bias=True, head_dim=6, position="rope"),
  ],
  ids=str,
)
def test_values_and_gradients_are_those_of_each_head_alone(options):
  rope = Rope() if "position" in options else None
  graph, params = nnx.split(make(**options))
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    f, g = lambda m, x: m(x), functools.partial(naive, rope=rope)
    loss = lambda h: lambda p, x: jnp.sin(h(nnx.merge(graph, p), x)).sum()
    results = [jax.jit(jax.value_and_grad(loss(h), (0, 1)))(params, jnp.asarray(X)) for h in (f, g)]
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
      np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(f(nnx.merge(graph, params), X), g(nnx.merge(graph, params), X),
                               rtol=1e-6, atol=1e-7)  # fmt: skip


SPECS = {
  "a table of distances": dict(transforms=["t5_bias"]),
  "vectors of distances": dict(transforms=[dict(name="shaw", max_distance=3), "alibi"]),
  "a logit of its own": dict(normaliser="sink", mask=dict(name="sliding_window", window=4)),
  "maps between heads": dict(normaliser="talking_heads"),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_any_spec_is_attended_to_and_its_parameters_learn(name, implementation):
  m = make(num_kv_heads=2, implementation=implementation, **SPECS[name])
  x, where = x32(), Tokens.of_length(T)
  q, k, v, spec = m.queries(x), m.keys(x), m.values(x), value_of(m.spec)
  expected = m.out(spec.finish(reference.partial(q, k, v, spec, where, where)))
  np.testing.assert_allclose(run(m, x), expected, **CLOSE)
  graph, params, rest = nnx.split(m, nnx.Param, ...)
  grads = jax.jit(jax.grad(lambda p: jnp.sin(nnx.merge(graph, p, rest)(x)).sum()))(params)
  learnt = jax.tree.leaves(grads["spec"])
  assert learnt and all(np.abs(g).max() > 0 for g in learnt)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params["spec"]))


def test_masks_in_a_list_must_all_agree():
  tokens = Tokens(np.arange(T)[None], np.arange(T)[None] % 5, np.arange(T)[None] // 5)
  m = make(mask=["causal", "same_segment"], position="rope")
  packed = run(m, x32(), tokens=tokens)
  np.testing.assert_allclose(packed[:, :5], m(x32()[:, :5]), **CLOSE)
  np.testing.assert_allclose(packed[:, 5:], m(x32()[:, 5:]), **CLOSE)


def test_a_combiner_stands_between_heads_and_the_output():
  m = make(combiner="head_scale", use_bias=True)
  m.combiner.scale.set_value(jnp.array([0.0, 0.0, 1.0, 0.0]))
  plain = make(use_bias=True)
  for name in ("query", "key", "value", "out"):
    nnx.update(getattr(plain, name), nnx.state(getattr(m, name)))
  plain.out.kernel.set_value(plain.out.kernel[...].at[jnp.array([0, 1, 3])].set(0.0))
  np.testing.assert_allclose(run(m, x32()), run(plain, x32()), **CLOSE)


def test_dropout_wants_a_key_and_is_the_same_in_every_implementation():
  key = jax.random.key(0)
  outs = [
    run(make(dropout=0.4, num_kv_heads=2, implementation=i), x32(), key=key)
    for i in ("reference", "chunked")
  ]
  np.testing.assert_allclose(*outs, **CLOSE)
  m = make(dropout=0.4, num_kv_heads=2)
  off = run(make(num_kv_heads=2), x32())
  np.testing.assert_allclose(run(m, x32()), off, **CLOSE)
  np.testing.assert_allclose(run(make(num_kv_heads=2), x32(), key=key), off, **CLOSE)
  assert not np.allclose(outs[0], run(m, x32(), key=jax.random.key(1)))
  # Weights are dropped, by place, after their sum was taken.
  where, q, k = Tokens.of_length(T), m.queries(x32()), m.keys(x32())
  spec = AttentionSpec(masks.Causal())
  w = reference.weights(q, k, spec, where, where)
  kept = Dropout(key, 0.4)(w, where.rows(B, N), where.columns())
  assert 0.3 < (kept == 0)[w > 0].mean() < 0.5
  heads = jnp.einsum("bnts,bsnv->btnv", kept, jnp.repeat(m.values(x32()), 2, axis=2))
  np.testing.assert_allclose(outs[0], m.out(heads), **CLOSE)


def test_the_mean_over_keys_of_what_drops_is_what_does_not():
  m = make(dropout=0.3)
  keys = jax.random.split(jax.random.key(0), 4000)
  mean = jax.jit(lambda x: jax.lax.map(lambda k: m(x, key=k), keys, batch_size=400).mean(0))(x32())
  expected = m(x32())
  assert np.linalg.norm(mean - expected) < 0.03 * np.linalg.norm(expected)


def test_cross_attention_reads_the_context_where_its_tokens_are():
  m = make(context_dim=6, mask="everything", num_kv_heads=2)
  tokens = Tokens.of_lengths(jnp.array([S, 4]), S)
  out = run(m, x32(), context=context32(), context_tokens=tokens)
  np.testing.assert_allclose(out[:1], m(x32()[:1], context=context32()[:1]), **CLOSE)
  np.testing.assert_allclose(out[1:], m(x32()[1:], context=context32()[1:, :4]), **CLOSE)
  q, k, v = m.queries(x32()), m.keys(context32()), m.values(context32())
  expected = m.out(attend(q, k, v, AttentionSpec(), k_tokens=tokens, implementation="reference"))
  np.testing.assert_allclose(out, expected, **CLOSE)


def test_positions_of_both_sides_count_in_causal_cross_attention():
  m = make(context_dim=6, position="rope")
  late = Tokens.of_length(T, offset=S)
  whole = run(m, x32(), context=context32(), tokens=late)
  every = make(context_dim=6, position="rope", mask="everything")
  np.testing.assert_allclose(whole, run(every, x32(), context=context32(), tokens=late), **CLOSE)
  early = run(m, x32(), context=context32())
  other = run(m, x32(), context=context32().at[:, 3:].add(1.0))
  np.testing.assert_array_equal(early[:, :3], other[:, :3])
  assert not np.allclose(early[:, 3:], other[:, 3:])


def test_a_bfloat16_input_is_computed_and_given_back_in_bfloat16():
  m = make(num_kv_heads=2, qk_norm=True, use_bias=True, position="rope", combiner="head_gate",
           transforms=["t5_bias"])  # fmt: skip
  low, high = run(m, x32().astype(jnp.bfloat16)), run(m, x32())
  assert low.dtype == jnp.bfloat16 and high.dtype == jnp.float32
  assert m.queries(x32().astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert {p.dtype for p in jax.tree.leaves(nnx.state(m, nnx.Param))} == {jnp.dtype("float32")}
  assert np.linalg.norm(low - high) < 0.03 * np.linalg.norm(high)


def test_what_is_sown_under_capture_is_what_was_computed():
  m = make(num_kv_heads=2, position="rope", dropout=0.3)
  look = nnx.capture(lambda m, x, key: m(x, key=key), nnx.Intermediate)
  out, seen = look(m, x32(), jax.random.key(0))
  (weights,), (heads,) = seen["weights"].get_value(), seen["heads"].get_value()
  assert weights.shape == (B, N, T, T) and (weights == 0)[..., *np.tril_indices(T)].mean() > 0.2
  values = jnp.repeat(m.values(x32()), 2, axis=2)
  np.testing.assert_allclose(jnp.einsum("bnts,bsnv->btnv", weights, values), heads, **CLOSE)
  np.testing.assert_allclose(m.project(heads, x32()), out, **CLOSE)


def test_nothing_is_sown_and_no_map_is_formed_when_nobody_looks():
  m = make()
  graph = nnx.split(m)[0]
  long = jax.ShapeDtypeStruct((1, 4096, D), jnp.float32)
  shapes = [v.aval.shape for e in jax.make_jaxpr(m)(long).eqns for v in e.outvars]
  assert all(np.prod(shape) < 4096**2 for shape in shapes)
  m(x32())
  assert nnx.split(m)[0] == graph


def test_rows_that_see_nothing_give_the_bias_alone():
  m = make(use_bias=True)
  out = run(m, x32(), tokens=Tokens.of_lengths(jnp.array([T, 0]), T))
  np.testing.assert_allclose(out[1], jnp.broadcast_to(m.out.bias[...], (T, D)), rtol=1e-6)
  np.testing.assert_allclose(out[0], m(x32())[0], **CLOSE)


@pytest.mark.parametrize(
  "options, error, sentence",
  [
    (dict(num_heads=3), ValueError, "num_heads=3 must divide dim=16"),
    (dict(num_heads=0), ValueError, "num_heads=0"),
    (dict(num_kv_heads=3), ValueError, "num_kv_heads=3 must divide num_heads=8"),
    (dict(dropout=1.0), ValueError, "dropout=1.0"),
    (dict(mask="casual"), KeyError, "did you mean 'causal'"),
    (dict(position="rop"), KeyError, "did you mean 'rope'"),
    (dict(head_dim=5, position="rope"), ValueError, "even"),
    (dict(widht=3), TypeError, "takes no 'widht'"),
  ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(options, error, sentence):
  with pytest.raises(error, match=sentence):
    registry.build("mixers", dict(options, name="attention"), dim=D, rngs=nnx.Rngs(0))(x32())


def test_tokens_of_a_context_want_a_context():
  with pytest.raises(ValueError, match="without a context"):
    make()(x32(), context_tokens=Tokens.of_length(T))
