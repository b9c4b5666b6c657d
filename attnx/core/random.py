"""Random bits as a hash of coordinates: the same place draws the same bits in every layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN, _M1, _M2 = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


def hash_bits(key: jax.Array | tuple[jax.Array, ...], *coordinates: jax.Array | int) -> jax.Array:
  """h(key, c_1, c_2, ...): 32 bits for every point of the broadcast coordinates.

  Each coordinate is added and mixed by the finaliser of MurmurHash3, so that neighbouring points
  are independent to the eye of any test a network could be. No array of keys is formed: inside a
  kernel, a shard or a chunk the bits are those of the whole array.

  Args:
    key: a JAX key, new or old style, or its words.
    coordinates: integers that broadcast against each other.

  Returns:
    uint32 of the broadcast shape.
  """
  state = jnp.zeros((), jnp.uint32)
  for word in (*words(key), *coordinates):
    state = _mix((state + _GOLDEN) * np.uint32(5) ^ _mix(jnp.asarray(word).astype(jnp.uint32)))
  return state


def words(key: jax.Array | tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """The 32-bit words of a JAX key."""
  if isinstance(key, tuple):
    return key
  data = key if jnp.issubdtype(key.dtype, jnp.uint32) else jax.random.key_data(key)
  return tuple(data.reshape(-1)[i] for i in range(data.size))


def keep(
  key: jax.Array | tuple[jax.Array, ...], rate: float, *coordinates: jax.Array | int
) -> jax.Array:
  """Bernoulli(1 - rate), True where the point is kept; the coordinates are as in `hash_bits`."""
  return hash_bits(key, *coordinates) >= np.uint32(min(int(rate * 2**32), 2**32 - 1))


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * _M1
  x = (x ^ (x >> 13)) * _M2
  return x ^ (x >> 16)
