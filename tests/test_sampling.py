"""Sampling: filters against their definitions, and generation against a loop."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import models
from attnx.models import sampling

V = 11
CONFIG = dict(
  name="decoder_lm",
  vocab=V,
  dim=16,
  depth=2,
  mixers=(
    dict(name="attention", num_heads=4, num_kv_heads=2, position="rope"),
    dict(name="retention", num_heads=2),
  ),
)
MODEL = models.build(CONFIG, rngs=nnx.Rngs(0))
LOGITS = np.random.default_rng(0).normal(size=(5, V)).astype(np.float32) * 2
PROMPTS = np.random.default_rng(1).integers(0, V, (3, 6))


def probabilities(logits):
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def kept(**options):
  return np.isfinite(sampling.filtered(jnp.asarray(LOGITS), **options))


def test_temperature_divides_and_keeps_everything():
  actual = sampling.filtered(jnp.asarray(LOGITS), temperature=0.5)
  np.testing.assert_allclose(actual, LOGITS / 0.5, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, V])
def test_top_k_keeps_the_k_most_probable(k):
  ranks = (-LOGITS).argsort(-1).argsort(-1)
  np.testing.assert_array_equal(kept(top_k=k), ranks < k)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(p):
  for row, mask in zip(probabilities(LOGITS), kept(top_p=p)):
    order = np.argsort(-row)
    needed = np.searchsorted(np.cumsum(row[order]), p * (1 - 1e-6)) + 1
    np.testing.assert_array_equal(np.sort(order[:needed]), np.flatnonzero(mask))


def test_min_p_keeps_what_is_near_the_most_probable():
  p = probabilities(LOGITS)
  np.testing.assert_array_equal(kept(min_p=0.2), p >= 0.2 * p.max(-1, keepdims=True))


def test_filters_follow_each_other():
  both = kept(top_k=4, top_p=0.7)
  alone = sampling.filtered(jnp.asarray(LOGITS), top_k=4)
  np.testing.assert_array_equal(both, np.isfinite(sampling.filtered(alone, top_p=0.7)))


def test_draws_have_the_probabilities_of_the_filtered_logits():
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = jax.vmap(lambda key: sampling.draw(key, jnp.asarray(LOGITS[0]), top_k=4))(keys)
  share = np.bincount(drawn, minlength=V) / len(keys)
  expected = probabilities(np.asarray(sampling.filtered(jnp.asarray(LOGITS[0]), top_k=4)))
  np.testing.assert_allclose(share, expected, atol=0.015)


@pytest.mark.parametrize(
  "options", [dict(temperature=0), dict(top_k=0), dict(top_k=V + 1), dict(top_p=0), dict(min_p=2)]
)
def test_numbers_out_of_range_are_refused(options):
  with pytest.raises(ValueError, match=f"{next(iter(options))}="):
    sampling.filtered(jnp.asarray(LOGITS), **options)


def test_greedy_generation_is_the_loop_of_whole_calls():
  whole = jax.jit(lambda ids: MODEL(ids))
  ids = np.pad(PROMPTS, [(0, 0), (0, 5)])  # a causal model does not see what is not there yet
  for t in range(6, 11):
    ids[:, t] = whole(ids)[:, t - 1].argmax(-1)
  found = jax.jit(lambda prompts: sampling.generate(MODEL, prompts, 5))(PROMPTS)
  np.testing.assert_array_equal(found, ids[:, 6:])


def test_prompts_of_unequal_length_go_on_as_if_each_were_alone():
  lengths = np.array([6, 2, 4])
  go_on = jax.jit(lambda prompts, lengths: sampling.generate(MODEL, prompts, 4, lengths=lengths))
  together = go_on(PROMPTS, lengths)
  for row, length, out in zip(PROMPTS, lengths, together, strict=True):
    alone = go_on(row[None, :length], lengths=None)
    np.testing.assert_array_equal(out, alone[0])


def test_the_same_key_draws_the_same_tokens_and_another_key_others():
  choose = sampling.sampler(temperature=1.5)
  run = jax.jit(
    lambda seed: sampling.generate(MODEL, PROMPTS, 8, choose=choose, key=jax.random.key(seed))
  )
  np.testing.assert_array_equal(run(0), run(0))
  assert (run(0) != run(1)).any()


def test_the_tokens_of_a_generation_are_one_scan():
  trace = lambda count: jax.make_jaxpr(lambda p: sampling.generate(MODEL, p, count))(PROMPTS)
  many, few = trace(50), trace(5)
  assert len(many.eqns) == len(few.eqns)
  assert [e.params["length"] for e in many.eqns if e.primitive.name == "scan"][-1] == 49


def test_what_cannot_be_generated_is_refused():
  with pytest.raises(ValueError, match="key"):
    sampling.generate(MODEL, jnp.asarray(PROMPTS), 2, choose=sampling.sampler())
  with pytest.raises(ValueError, match="count=0"):
    sampling.generate(MODEL, jnp.asarray(PROMPTS), 0)
  with pytest.raises(ValueError, match="prompt"):
    sampling.generate(MODEL, jnp.zeros((2, 0), int), 2)
