"""Rectified linear attention (Zhang et al., 2021)."""

from __future__ import annotations

from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class ReLA(Normaliser):
  """o = concat_n sum_j relu(s_nj) v_nj; y = scale * o / sqrt(mean o^2 + 1e-8) * sigmoid(gate * o).

  The weights are not divided by anything: one gated RMS norm over all heads of a row keeps the
  output in size. A row that attends to nothing is zero. This is the variant with an RMS norm and a
  gate, which the paper prefers; y is not linear in the values, so that there are no finished
  weights (arXiv:2104.07012).

  Attributes:
    scale: (N, V), float32.
    gate: (N, V), float32.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"heads", "parameters"})
  counts: ClassVar[bool] = False

  scale: jax.Array
  gate: jax.Array

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    return jnp.where(visible, jax.nn.relu(scores), 0.0)

  def finish(self, p: Partial) -> jax.Array:
    if p.out.shape[-2:] != self.scale.shape:
      raise NotImplementedError(
        f"rela norms outputs of (heads, width) {self.scale.shape}, got {p.out.shape[-2:]}: it has "
        "no finished weights; read the unnormalised ones"
      )
    size = jax.lax.rsqrt((p.out**2).mean((-2, -1), keepdims=True) + 1e-8)
    gate = jax.nn.sigmoid(jnp.asarray(self.gate).astype(p.out.dtype) * p.out)
    return jnp.asarray(self.scale).astype(p.out.dtype) * p.out * size * gate


def rela(num_heads: int, head_dim: int, rngs: nnx.Rngs) -> ReLA:
  """`ReLA` for values of width `head_dim`; the gate is drawn like a weight of N V by N V."""
  shape = (num_heads, head_dim)
  limit = (3 / (num_heads * head_dim)) ** 0.5
  gate = jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit)
  return ReLA(scale=jnp.ones(shape), gate=gate)


ENTRY = Entry(make=rela, paper="arXiv:2104.07012", facts={"nonnegative"})
