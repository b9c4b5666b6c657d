"""Recurrences over sharded sequences are those of one device, forwards and backwards."""

import functools
import re

import jax
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest
from specs import assert_close

from attnx.recurrence import convolution, delta, diagonal, linear
from attnx.sharded import scan

B, T, N, H, V = 2, 48, 2, 4, 3
TOKENS = P(None, "tokens")
CLOSE = dict(rtol=1e-8, atol=1e-10)
RNG = np.random.default_rng(0)
SEGMENT = np.sort(RNG.integers(0, 4, (B, T)), axis=1)  # some end with a shard, some within
SEGMENT[0, : T // 2] = 0  # a document over several shards
draw = lambda *shape: RNG.standard_normal(shape)
Q, K, VALUES = draw(B, T, N, H), draw(B, T, N, H) / 2, draw(B, T, N, V)
BETA = RNG.uniform(0, 1, (B, T, N))
LOG_DECAY = {
  "none": None, "head": -RNG.uniform(0, 1, (N, 1)), "scalar": -RNG.uniform(0, 1, (B, T, N, 1)),
  "vector": -RNG.uniform(0, 1, (B, T, N, H)),
}  # fmt: skip
COMPLEX = 0.9 * np.exp(1j * draw(B, T, 5))


def sizes(x):
  """How an argument is laid out: over devices where it has tokens."""
  return TOKENS if x is not None and x.ndim > 1 and x.shape[1] == T else P()


def split(function, size: int, segment):
  """A function of one device over `size` of them; states are returned of all shards."""
  mesh = jax.make_mesh(
    (size,), ("tokens",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:size]
  )

  def run(*arrays, state=None):
    given = {"state": state, "segment": segment}
    given = {name: jnp.asarray(x) for name, x in given.items() if x is not None}
    layout = tuple(map(sizes, arrays)), {name: sizes(x) for name, x in given.items()}
    one = lambda arrays, given: function(*arrays, **given, axis_name="tokens")
    stacked = lambda arrays, given: jax.tree.map(
      lambda x, tall: x[None] if tall else x, one(arrays, given), (False, True)
    )
    return jax.shard_map(
      stacked, mesh=mesh, in_specs=layout, out_specs=(TOKENS, P("tokens"))
    )(arrays, given)  # fmt: skip

  return run


def compare(on_one, on_many, arrays, state, size, segment):
  """Outputs, the state after the last token, and the gradients of both."""
  many = split(on_many, size, segment)

  def value_and_grad(f):
    def loss(arrays, state):
      out, state = f(*arrays, state=state)
      state = state if f is not many else state[-1]
      total = jnp.cos(jnp.abs(out)).sum() + jnp.sin(jnp.abs(state)).sum()
      return total, (out, state)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))

  one = functools.partial(on_one, segment=segment)
  with jax.enable_x64(True):
    arrays, state = jax.tree.map(jnp.asarray, (arrays, state))
    assert_close(value_and_grad(many)(arrays, state), value_and_grad(one)(arrays, state), **CLOSE)


@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["one document", "packed"])
@pytest.mark.parametrize("decay", LOG_DECAY)
def test_linear_attention(decay, segment):
  arrays = (Q, K, VALUES) if decay == "none" else (Q, K, VALUES, LOG_DECAY[decay])
  on = (functools.partial(module.linear_attention, chunk=4) for module in (linear, scan))
  compare(*on, arrays, draw(B, N, H, V), 8, segment)


@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["one document", "packed"])
def test_the_delta_rule(segment):
  on = (functools.partial(module.delta_rule, chunk=4) for module in (delta, scan))
  compare(*on, (Q, K, VALUES, BETA, LOG_DECAY["scalar"]), draw(B, N, H, V), 8, segment)


@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["one document", "packed"])
@pytest.mark.parametrize("a", [0.9 * np.ones(5), COMPLEX], ids=["constant", "complex"])
def test_a_diagonal_scan(a, segment):
  on = (functools.partial(module.diagonal_scan, chunk=4) for module in (diagonal, scan))
  state = draw(B, 5) + (1j if np.iscomplexobj(a) else 0)
  compare(*on, (a, draw(B, T, 5)), state, 8, segment)


@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["one document", "packed"])
@pytest.mark.parametrize("channels", [8, 1])
def test_a_long_convolution(channels, segment):
  mesh = jax.make_mesh((4,), ("tokens",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
  layout = (TOKENS, P(), P() if segment is None else TOKENS)
  many = jax.shard_map(
    lambda x, kernel, segment: scan.long_convolution(
      x, kernel, segment=segment, axis_name="tokens"
    ),
    mesh=mesh, in_specs=layout, out_specs=TOKENS,
  )  # fmt: skip
  one = lambda x, kernel, segment: convolution.long_convolution(x, kernel, segment=segment)
  with jax.enable_x64(True):
    given = jnp.asarray(draw(B, T, 8)), jnp.asarray(draw(T, channels))
    where = None if segment is None else jnp.asarray(segment)

    def value_and_grad(f):
      loss = lambda *given: (jnp.cos(y := f(*given, where)).sum(), y)
      return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*given)

    assert_close(value_and_grad(many), value_and_grad(one), **CLOSE)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_any_number_of_devices_will_do(size):
  on = (functools.partial(module.linear_attention, chunk=4) for module in (linear, scan))
  compare(*on, (Q, K, VALUES, LOG_DECAY["vector"]), draw(B, N, H, V), size, SEGMENT)


def test_without_a_state_the_first_device_begins_from_nothing():
  arrays = [jnp.asarray(x, jnp.float32) for x in (Q, K, VALUES)]
  out, _ = jax.jit(split(scan.linear_attention, 8, None))(*arrays)
  np.testing.assert_allclose(out, linear.linear_attention(*arrays)[0], rtol=1e-4, atol=1e-4)


def test_states_travel_in_as_many_steps_as_the_logarithm_of_devices():
  arrays = [jnp.asarray(x, jnp.float32) for x in (Q, K, VALUES)]
  text = jax.jit(split(scan.linear_attention, 8, None)).lower(*arrays).compile().as_text()
  sent = re.findall(r"= \(?f32\[([\d,]*)\].* collective-permute(?:-start)?\(", text)
  assert 3 <= len(sent) <= 6  # two arrays in each of three steps, perhaps as one
