"""Chunks of the delta rule with decay on TPU: the step that `chunk_scan` takes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.linear_recurrence import (
  THREE_PASSES,
  Decay,
  Documents,
  column,
  decay_of,
  product,
  scores,
)

LANES = 128


def inverses(lowers: list[jax.Array], passes: int) -> list[jax.Array]:
  """(I + A)^-1 of strictly lower triangular A (C, C), C a power of two.

  Inverses of diagonal blocks of m rows become those of 2 m rows: the inverse of [[X, 0], [L, Y]]
  is [[X^-1, 0], [-Y^-1 L X^-1, Y^-1]], and if T holds all X^-1 and Y^-1, then T L T holds all
  Y^-1 L X^-1. This is forward substitution by blocks, and as stable, in 2 log2(C) - 2 products.
  """
  C = lowers[0].shape[0]
  # Side by side they fill the lanes, and products of one group fill the gaps between another's.
  most = max(1, LANES // C)
  groups = [lowers[i : i + most] for i in range(0, len(lowers), most)]
  sides = [jnp.concatenate(group, axis=1) for group in groups]
  found = [_identity(side) - _blocks(side, 1) for side in sides]
  for m in (1 << i for i in range(1, C.bit_length() - 1)):
    left = [_times(a, _blocks(side, m), passes) for a, side in zip(found, sides)]
    found = [a - _times(b, a, passes) for a, b in zip(found, left)]
  return [x[:, i : i + C] for x in found for i in range(0, x.shape[1], C)]


def _differ(side: jax.Array) -> jax.Array:
  """Row xor column, in matrices that lie side by side, (C, count C)."""
  t, s = (jax.lax.broadcasted_iota(jnp.int32, side.shape, axis) for axis in (0, 1))
  return t ^ (s & side.shape[0] - 1)


def _identity(side: jax.Array) -> jax.Array:
  return jnp.where(_differ(side) == 0, 1.0, 0.0)


def _blocks(side: jax.Array, m: int) -> jax.Array:
  """Of diagonal blocks of 2 m rows, the quarter in the lower left; there is none above it."""
  differ = _differ(side)
  return jnp.where((differ >= m) & (differ < 2 * m), side, 0.0)


def _times(a: jax.Array, b: jax.Array, passes: int) -> jax.Array:
  """Products of matrices that lie side by side, each with its own."""
  C, width = b.shape
  if width > C:
    block = [jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) // C for axis in (0, 1)]
    b = jnp.where(block[0] == block[1], jnp.concatenate([b] * (width // C)), 0.0)
  return product(a, b, "nn", passes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def solve(
  lowers: list[jax.Array], rights: list[jax.Array], passes: int
) -> list[jax.Array]:
  """(I + A)^-1 R of strictly lower triangular A (C, C), and R (C, V)."""
  return _solve_fwd(lowers, rights, passes)[0]


def _solve_fwd(lowers, rights, passes):
  found = inverses(lowers, passes)
  solved = [product(a, b, "nn", passes) for a, b in zip(found, rights, strict=True)]
  return solved, (found, solved)


def _solve_bwd(passes, residuals, g):
  found, solved = residuals
  d_rights = [product(a, b, "tn", passes) for a, b in zip(found, g, strict=True)]
  return [-product(a, b, "nt", passes) for a, b in zip(d_rights, solved, strict=True)], d_rights


solve.defvjp(_solve_fwd, _solve_bwd)


class System(NamedTuple):
  """What a chunk of a head is before its corrections U, (I + lower) U = right, are known.

  Attributes:
    lower: (C, C).
    right: (C, V).
    before: (C, V), what queries read of the state that enters.
    inside: (C, C), what they read of the corrections.
    onto: (C, H), keys as they reach the end.
    kept: (V, H), the state that enters as it reaches the end.
  """

  lower: jax.Array
  right: jax.Array
  before: jax.Array
  inside: jax.Array
  onto: jax.Array
  kept: jax.Array


def delta_rule(states, tiles, *, passes: int) -> list[tuple[jax.Array, jax.Array]]:
  """One chunk of S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T, o_t = q_t S_t.

  Args:
    states: (V, H) each.
    tiles: as those of `linear_attention` without bonus, and beta (1, C).
    passes: of `product`; the systems are solved in three passes at least.

  Returns:
    The state after the chunk (V, H), and o (C, V).
  """
  decays = [decay_of(tile, passes) for tile in tiles]
  queries, keys = ([tile[name] for tile in tiles] for name in "qk")
  overlaps = scores(keys, keys, decays, passes, strict=True)
  insides = scores(queries, keys, decays, passes, strict=False)
  heads = zip(states, tiles, decays, overlaps, insides, strict=True)
  systems = [_system(*head, passes) for head in heads]
  corrections = solve(
    [x.lower for x in systems], [x.right for x in systems], max(passes, THREE_PASSES)
  )
  return [
    (
      x.kept + product(correction, x.onto, "tn", passes),
      x.before + product(x.inside, correction, "nn", passes),
    )
    for x, correction in zip(systems, corrections, strict=True)
  ]


def _system(state, tile, decay: Decay | None, overlap, inside, passes: int) -> System:
  q, k, v, beta = tile["q"], tile["k"], tile["v"], column(tile["beta"])
  into, asks, onto, kept = (q, k, k, state) if decay is None else (
    q * decay.into, k * decay.into, k * decay.onto, state * decay.total
  )  # fmt: skip
  if "since" in tile:
    documents = Documents(tile["since"])
    overlap = jnp.where(documents.meet(), overlap, 0.0)
    inside = jnp.where(documents.meet(), inside, 0.0)
    into = jnp.where(documents.enters(), into, 0.0)
    asks = jnp.where(documents.enters(), asks, 0.0)
    onto = jnp.where(documents.leaves(), onto, 0.0)
    kept = jnp.where(documents.passes(), kept, 0.0)
  return System(
    lower=beta * overlap,
    right=beta * (v - product(asks, state, "nt", passes)),
    before=product(into, state, "nt", passes),
    inside=inside,
    onto=onto,
    kept=kept,
  )
