"""The streaming kernels in interpret mode: every entry whose parts work tile by tile."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import B, N, floating, inputs, instance, packed, wide

from attnx.attention import AttentionSpec, masks, pallas_tpu, reference
from attnx.core import registry
from pallas_kernels.blocks import Blocks, Chosen

T, S = 150, 200  # no tile divides them
BLOCKS = Chosen(*[Blocks(128, 128, 128, 128, 0)] * 3)
SAME = registry.build("masks", "same_segment")
INTERFACES = ("masks", "transforms", "normalisers", "edits")
ENTRIES = [(interface, name) for interface in INTERFACES for name in registry.names(interface)]
ROWS = {"entmax15", "lssa", "lssar", "sparsemax", "talking_heads"}
REFUSED = {("transforms", "rotary_bias"), *(("normalisers", name) for name in ROWS)}
FIT = [entry for entry in ENTRIES if entry not in REFUSED]


def spec_of(interface: str, name: str) -> AttentionSpec:
  """A causal, packed spec with an entry in its place."""
  if (interface, name) == ("masks", "top_k_blocks"):
    scores = np.random.default_rng(2).standard_normal((B, N, 10, 13))
    blocks = dict(scores=scores, top_k=5, q_block=16, k_block=16)
    part = registry.build(interface, dict(blocks, name=name))
  else:
    part = instance(interface, name)
  if interface == "masks":
    return AttentionSpec(mask=part)
  mask = masks.Causal() & SAME
  if interface == "normalisers":
    return AttentionSpec(mask=mask, normaliser=part)
  spec = AttentionSpec(mask=mask, **{interface: (part,)})
  return dataclasses.replace(spec, readouts=())  # relative values are refused


def run(partial, spec, qkv, q_tokens, k_tokens):
  """The partial, and the gradients of a loss that all of it but its unit has a share in."""
  leaves, tree = jax.tree.flatten((qkv, spec))
  moving = [floating(x) for x in leaves]

  @jax.jit
  def loss(given, q_tokens, k_tokens):
    rest = iter(given)
    qkv, spec = tree.unflatten([next(rest) if m else x for x, m in zip(leaves, moving)])
    p = partial(*qkv, spec, q_tokens, k_tokens)
    mass = p.mass * jnp.exp(jnp.where(jnp.isneginf(p.peak), 0.0, p.peak - 3))
    return jnp.sin(spec.finish(p)).sum() + jnp.log1p(mass).sum(), (spec.finish(p), p.count)

  given = [x for x, m in zip(leaves, moving) if m]
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  return gradient(given, q_tokens, k_tokens)


def kernel(blocks: Chosen = BLOCKS):
  return functools.partial(pallas_tpu.partial, blocks=blocks, interpret=True)


def assert_near(actual, expected, tolerance: float):
  """Every array within a tolerance of its largest entry."""
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    scale = np.abs(y).max() or 1.0
    np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=tolerance)


def exact(spec, qkv, *tokens):
  with jax.enable_x64(True):
    return run(reference.partial, wide(spec), wide(qkv), *tokens)


@pytest.mark.parametrize("entry", FIT, ids="-".join)
def test_an_entry_in_the_kernel_is_the_reference_in_values_and_gradients(entry):
  qkv, tokens = inputs(T, S, np.float32), (packed(T), packed(S))
  spec = spec_of(*entry)
  assert pallas_tpu.unfit(*qkv, spec) is None
  traced = jax.tree.map(jnp.asarray, tokens)  # an argument of jit: planned at run time
  assert_near(run(kernel(), spec, qkv, *traced), exact(spec, qkv, *tokens), 4e-6)


@pytest.mark.parametrize("entry", sorted(REFUSED), ids="-".join)
def test_what_does_not_work_by_tile_is_refused_with_a_sentence(entry):
  qkv, spec = inputs(T, S, np.float32), spec_of(*entry)
  if "row" in spec.needs:  # not offered: the choice of an implementation says so
    return
  assert "tiles" in pallas_tpu.unfit(*qkv, spec)
