"""The experiment's rings are exact, and its figures are those of the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.attention import attend
from experiments.tree_vs_ring import exact, formulas, hlo, rings

SHAPE = dict(B=2, N=4, K=2, H=16, t=256)


def mesh(size: int, per_node: int):
  return rings.mesh_of(jax.devices()[:size], per_node)


@pytest.mark.parametrize("name", rings.STRATEGIES)
def test_every_strategy_is_attention(name):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((2, 1, 4, 16), (2, 48, 2, 16), (2, 48, 2, 16))
  q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
  for size, per_node in ((1, 1), (6, 3), (8, 4)):
    out = jax.jit(rings.decode(name, mesh(size, per_node)))(q, k, v)
    np.testing.assert_allclose(out, attend(q, k, v), atol=1e-5)


@pytest.mark.parametrize("size", [4, 8])
def test_steps_and_bytes_are_those_of_the_formulas_and_a_tree_holds_half(size):
  found = exact.costs("host", size, dtype=jnp.float32, **SHAPE)  # which asserts just that
  tree, partials, keys = (
    found[name] for name in ("tree, butterfly", "ring of partials", "ring of keys")
  )
  assert tree["steps"] == size.bit_length() - 1
  assert partials["steps"] == keys["steps"] == size - 1
  assert keys["sent"] == (size - 1) * 2 * 2 * 256 * 2 * 16 * 4
  assert partials["sent"] == (size - 1) * 2 * 4 * (16 + 3) * 4


def test_a_figure_that_is_not_the_formulas_is_noticed(monkeypatch):
  wrong = dict(formulas.FORMULAS, **{"ring of keys": formulas.ring_of_partials})
  monkeypatch.setattr(formulas, "FORMULAS", wrong)
  with pytest.raises(AssertionError, match="ring of keys"):
    exact.costs("host", 2, dtype=jnp.float32, **SHAPE)


def test_loops_multiply_what_is_in_them():
  def run(x):
    hop = lambda x: jax.lax.ppermute(x, rings.AXES, [(0, 1), (1, 0)])
    for length in (3, 5):
      x = jax.lax.fori_loop(0, length, lambda _, x: hop(jnp.sin(x)), x)
    return jax.lax.psum(x, rings.AXES)

  both = jax.sharding.PartitionSpec(rings.AXES)
  run = jax.shard_map(run, mesh=mesh(2, 2), in_specs=both, out_specs=both, check_vma=False)
  found = hlo.collectives(jax.jit(run).lower(jnp.zeros((2, 7))).compile().as_text())
  assert [(c.op, c.size, c.times) for c in found] == [
    ("collective-permute", 28, 3), ("collective-permute", 28, 5), ("all-reduce", 28, 1),
  ]  # fmt: skip
