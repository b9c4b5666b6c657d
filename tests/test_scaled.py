"""Factors of a function are gathered, and change nothing but how often a tile is multiplied."""

import chex
from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.scaled import Scaled

TILE = (8, 128)
I, J = np.arange(8.0)[:, None], np.arange(128.0)[None]
SLOPE = jnp.full((1, 1), 0.25)


def products(fn, x) -> int:
  """Products and quotients of whole tiles in a program."""
  eqns = jax.make_jaxpr(fn)(x).eqns
  return sum(e.primitive.name in ("mul", "div") and e.outvars[0].aval.shape == TILE for e in eqns)


FUNCTIONS = dict(
  nothing=(lambda x: x, 1),
  cap=(lambda x: 50.0 * jnp.tanh(x / 50.0), 2),
  slopes=(lambda x: x - jnp.abs(SLOPE * I - SLOPE * J), 1),
  array=(lambda x: x + 0.5 * jnp.sin(I * J), 2),
  one=(lambda x: -(x * SLOPE) * SLOPE, 1),
  twice=(lambda x: (lambda y: y * jnp.tanh(y))(2.0 * x), 3),
  square=(lambda x: x * x, 3),
  where=(lambda x: jnp.where(x > 0, x, 0.5 * x), 3),
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_the_same_with_fewer_products(name):
  fn, most = FUNCTIONS[name]
  x = jax.random.normal(jax.random.key(0), TILE)
  plain = lambda x: 1.4426950408889634 * fn(0.125 * x)
  folded = Scaled(fn, 0.125, 1.4426950408889634)
  chex.assert_trees_all_close(folded(x), plain(x), rtol=1e-6, atol=1e-6)
  pull = lambda f: jax.vjp(f, x)[1](jnp.cos(x))
  chex.assert_trees_all_close(pull(folded), pull(plain), rtol=1e-5, atol=1e-6)
  assert products(folded, x) <= min(most, products(plain, x))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_composition_is_the_same(data):
  """Chains of sums, factors, and functions that no factor goes through."""
  steps = dict(
    factor=lambda y, c: c * y, quotient=lambda y, c: y / c, add=lambda y, c: y + c * I,
    less=lambda y, c: c * J - y, neg=lambda y, c: -y, abs=lambda y, c: jnp.abs(y),
    tanh=lambda y, c: jnp.tanh(y), self=lambda y, c: y * jax.nn.sigmoid(c * y),
    both=lambda y, c: jnp.where(y > c, y, c * y),
  )  # fmt: skip
  numbers = st.sampled_from([-2.0, -0.5, 0.25, 1.0, 3.0])
  chain = data.draw(st.lists(st.tuples(st.sampled_from(sorted(steps)), numbers), max_size=6))

  def fn(x):
    for name, c in chain:
      x = steps[name](x, c)
    return x

  with jax.enable_x64(True):
    x = jnp.linspace(-2.0, 2.0, 8 * 128).reshape(TILE) + 0.01
    folded, near = Scaled(fn, 0.3, 1.5), dict(rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(folded(x), 1.5 * fn(0.3 * x), **near)
    given = folded.leading(x)
    chex.assert_trees_all_close(folded(given * x, given), 1.5 * fn(0.3 * x), **near)


def test_functions_may_close_over_traced_arrays():
  @jax.jit
  def run(x, slope):
    return Scaled(lambda y: y - slope * jnp.abs(I - J), 0.5, 2.0)(x)

  x = jnp.ones(TILE)
  chex.assert_trees_all_close(run(x, SLOPE), x - 0.5 * jnp.abs(I - J), rtol=1e-6)


LEADING = dict(nothing=0.25, cap=0.0025, slopes=0.25, twice=0.25, one=1.0, where=1.0)


@pytest.mark.parametrize("name", LEADING)
def test_what_comes_before_anything_else_may_come_earlier(name):
  """SLOPE is an array, whose factor is not known when a kernel is traced."""
  fn, most = FUNCTIONS[name]
  x = jax.random.normal(jax.random.key(0), TILE)
  folded = Scaled(fn, 0.125, 2.0)
  given = folded.leading(jax.ShapeDtypeStruct(TILE, jnp.float32))
  assert given == pytest.approx(LEADING[name])
  chex.assert_trees_all_close(folded(given * x, given), 2 * fn(0.125 * x), rtol=1e-6, atol=1e-6)
  early = products(lambda x: folded(x, given), x)
  assert early == (most if given == 1 else most - 1)
