"""Attention over some of the keys: a commutative monoid, whatever the normaliser."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.core import struct


@struct.dataclass
class Partial:
  """Unfinished attention output, in float32 (float64 where the inputs are).

  Attributes:
    out: sum of weight * value over the keys seen, (B, T, N, V).
    mass: sum of |weight|, (B, T, N).
    peak: score that weights are measured from, (B, T, N); out and mass carry a factor exp(-peak).
      0 for normalisers that do not rescale, -inf where nothing was seen. It is a choice of unit,
      not a result: it carries no gradient, and what `finish` returns does not depend on it.
    count: number of keys that were visible, (B, T, N), for normalisers that count, else 0.
    whole: out / mass, from what divides by itself, (B, T, N, V), 0 where nothing was seen. Reading
      it, and not the two, keeps a gradient from going through mass. Merging drops it.
  """

  out: jax.Array
  mass: jax.Array
  peak: jax.Array
  count: jax.Array
  whole: jax.Array | None = None


def empty(shape: tuple[int, ...], dtype=jnp.float32) -> Partial:
  """The identity of `merge`: attention of shape (B, T, N, V) over no keys."""
  zero = jnp.zeros(shape[:-1], dtype)
  return Partial(out=jnp.zeros(shape, dtype), mass=zero, peak=zero - jnp.inf, count=zero)


def from_lse(out: jax.Array, lse: jax.Array, count: jax.Array) -> Partial:
  """A softmax output with its log-sum-exp, as library kernels return them, (B, T, N, V), (B, T, N).

  Gradients of both arrive: `out` is measured from a constant copy of `lse`.
  """
  peak = jax.lax.stop_gradient(lse)
  mass = jnp.where(jnp.isneginf(peak), 0.0, jnp.exp(lse - jnp.where(jnp.isneginf(peak), 0.0, peak)))
  return Partial(out=out * mass[..., None], mass=mass, peak=peak, count=count, whole=out)


def rebase(p: Partial, peak: jax.Array) -> Partial:
  """The same partial, measured from `peak`, which must not be below `p.peak`."""
  peak = jax.lax.stop_gradient(peak)
  origin = jnp.where(jnp.isneginf(peak), 0.0, peak)
  factor = jnp.exp(jax.lax.stop_gradient(p.peak) - origin)  # 0 where nothing was seen
  return Partial(out=p.out * factor[..., None], mass=p.mass * factor, peak=peak, count=p.count)


def merge(a: Partial, b: Partial) -> Partial:
  """Attention over the keys of `a` and the keys of `b`, which must be disjoint."""
  peak = jnp.maximum(a.peak, b.peak)
  a, b = rebase(a, peak), rebase(b, peak)
  return Partial(out=a.out + b.out, mass=a.mass + b.mass, peak=peak, count=a.count + b.count)


def merge_across(p: Partial, axis_name: str) -> Partial:
  """`merge` over the devices of a mesh axis: one maximum, then one sum of everything."""
  p = rebase(p, jax.lax.pmax(jax.lax.stop_gradient(p.peak), axis_name))
  out, mass, count = jax.lax.psum((p.out, p.mass, p.count), axis_name)
  return Partial(out=out, mass=mass, peak=p.peak, count=count)
