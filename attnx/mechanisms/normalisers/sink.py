"""A learned sink: a logit that takes weight and gives no value (gpt-oss)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Softmax
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class Sink(Softmax):
  """exp(s_j) / (exp(b_n) + sum_k exp(s_k)), a logit b for each of the N query heads.

  As if there were one more key of score b and value zero, counted once however the keys are split.
  Starts at b = 0, which is softmax-plus-one; b = -inf is softmax. What caps or biases scores does
  not touch b (arXiv:2508.10925).

  Attributes:
    logit: b (N,), float32.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"heads", "parameters"})

  logit: jax.Array

  def finish(self, p: Partial) -> jax.Array:
    logit = jnp.asarray(self.logit).astype(p.out.dtype)
    peak = jax.lax.stop_gradient(jnp.maximum(p.peak, logit))
    origin = jnp.where(jnp.isneginf(peak), 0.0, peak)  # neither a key nor a sink
    factor = jnp.exp(jax.lax.stop_gradient(p.peak) - origin)
    mass = p.mass * factor + jnp.exp(logit - origin)
    return p.out * (factor / jnp.where(mass > 0, mass, 1.0))[..., None]


def sink(num_heads: int) -> Sink:
  """`Sink` with logits of zero."""
  return Sink(jnp.zeros(num_heads))


ENTRY = Entry(make=sink, paper="arXiv:2508.10925", facts={"nonnegative"})
