"""Length scaled softplus attention (Gao et al., 2025)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class LSSA(Normaliser):
  """f_j / sum_k f_k with f_j = softplus(log(n) s_j), n the number of keys that the row can see.

  The paper's s_j is log(H) <q, k_j> of unit queries and keys: norm them before and set
  `AttentionSpec.scale` to log(H). A row that sees one key has weight one there. The whole row is
  needed, since n multiplies every score (arXiv:2501.13428).
  """

  needs: ClassVar[frozenset[str]] = frozenset({"row"})

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    visible = jnp.broadcast_to(visible, scores.shape)
    count = visible.sum(-1, keepdims=True, dtype=scores.dtype)
    return jnp.where(visible, jax.nn.softplus(jnp.log(jnp.maximum(count, 1.0)) * scores), 0.0)

  def finish(self, p: Partial) -> jax.Array:
    return p.out / jnp.where(p.mass > 0, p.mass, 1.0)[..., None]


ENTRY = Entry(make=LSSA, paper="arXiv:2501.13428", facts={"nonnegative", "sums_to_one"})
