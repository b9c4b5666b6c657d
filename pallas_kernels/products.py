"""Products of two tiles, and which products are their cotangents."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

AXES = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}  # that a b, a b^T and a^T b sum over
# Such a product has the cotangents of a and b that are products of these pairs, "g" being its own.
PULL = {
  "nn": (("gb", "nt"), ("ag", "tn")),
  "nt": (("gb", "nn"), ("ga", "tn")),
  "tn": (("bg", "nt"), ("ag", "nn")),
}


def dot(
  a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: lax.Precision | None = None
) -> jax.Array:
  """Sum over axis axes[0] of a and axes[1] of b, in float32."""
  return lax.dot_general(
    a, b, (((axes[0],), (axes[1],)), ((), ())),
    precision=precision, preferred_element_type=jnp.float32,
  )  # fmt: skip
