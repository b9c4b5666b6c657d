"""Looking up numbers of a row inside of a kernel, which has no gather but one within 128 lanes."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.algebra import LANES


@jax.custom_vjp
def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
  """table[q, index[q, k]]: for every 128 numbers of a row, one gather of lanes and one choice.

  The gradient of a table that is trained compares the tile with each entry that it meets.

  Args:
    table: (Q, R) or (1, R), float32 or int32, R a multiple of 128.
    index: (Q, K) int32, from 0 to R - 1, K a multiple of 128.

  Returns:
    (Q, K) in the dtype of the table.
  """
  assert table.shape[1] % LANES == 0 and index.shape[1] % LANES == 0, (table.shape, index.shape)
  rows = jnp.broadcast_to(table, (index.shape[0], table.shape[1]))
  out = [_gather(rows, index[:, c : c + LANES]) for c in range(0, index.shape[1], LANES)]
  return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def _gather(rows: jax.Array, index: jax.Array) -> jax.Array:
  """`lookup` of 128 columns."""
  lane, group = index & (LANES - 1), index >> (LANES.bit_length() - 1)
  found = None
  for g in range(rows.shape[1] // LANES):
    of = jnp.take_along_axis(rows[:, g * LANES : (g + 1) * LANES], lane, axis=1)
    found = of if found is None else jnp.where(group == g, of, found)
  assert found is not None
  return found


def _forward(table, index):
  return lookup(table, index), (table, index)


def _backward(residuals, grad):
  """sum over k of grad[q, k] where index[q, k] = r, for every r between the ends of the tile."""
  table, index = residuals
  if not jnp.issubdtype(table.dtype, jnp.floating):
    return np.zeros(table.shape, jax.dtypes.float0), None
  lanes = lax.broadcasted_iota(jnp.int32, table.shape, 1)
  per_row = table.shape[0] > 1

  def add(r, total):
    of = jnp.where(index == r, grad, 0.0)
    of = jnp.sum(of, axis=1, keepdims=True)
    of = of if per_row else jnp.sum(of, axis=0, keepdims=True)
    return total + jnp.where(lanes == r, of, 0.0)

  exact = index.astype(jnp.float32)  # whole registers are compared as floats; below 2^24 both agree
  first, last = jnp.min(exact).astype(jnp.int32), jnp.max(exact).astype(jnp.int32)
  return lax.fori_loop(first, last + 1, add, jnp.zeros(table.shape, jnp.float32)), None


lookup.defvjp(_forward, _backward)
