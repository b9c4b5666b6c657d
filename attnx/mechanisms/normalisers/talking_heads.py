"""Talking heads: logits and weights are mixed over heads (Shazeer et al., 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.attention.normalisers import Normaliser, Softmax
from attnx.attention.partial import Partial
from attnx.core import struct
from attnx.core.registry import Entry


@struct.dataclass
class TalkingHeads(Normaliser):
  """w_m = sum_n normaliser(sum_l s_l logits_ln)_n weights_nm, for the heads l, n, m of a pair.

  A pair that a head may not see counts as zero in what it tells others and in what it is told, for
  masks that differ between heads. The paper's three numbers of heads are one here: N
  (arXiv:2003.02436).

  Attributes:
    logits: (N, N) float32, mixes scores.
    weights: (N, N) float32, mixes normalised weights.
    normaliser: what stands between, softmax in the paper.
  """

  logits: jax.Array
  weights: jax.Array
  normaliser: Normaliser = Softmax()

  @property
  def needs(self) -> frozenset[str]:
    return frozenset({"heads", "row", "parameters"}) | self.normaliser.needs

  def weigh(self, scores: jax.Array, visible: jax.Array, peak: jax.Array) -> jax.Array:
    del peak
    visible = jnp.broadcast_to(visible, scores.shape)
    scores = _mix(jnp.where(visible, scores, 0.0), self.logits)
    peak = jax.lax.stop_gradient(self.normaliser.peak(scores, visible))
    origin = jnp.where(jnp.isneginf(peak), 0.0, peak)[..., None]
    raw = self.normaliser.weigh(scores, visible, origin)
    row = Partial(
      out=raw, mass=jnp.abs(raw).sum(-1), peak=peak, count=visible.sum(-1, dtype=raw.dtype)
    )
    row = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), row)  # values are rows of the identity
    finished = jnp.swapaxes(self.normaliser.finish(row), 1, 2)
    return jnp.where(visible, _mix(finished, self.weights), 0.0)

  def finish(self, p: Partial) -> jax.Array:
    return p.out


def _mix(x: jax.Array, matrix: jax.Array) -> jax.Array:
  return jnp.einsum("bnts,nm->bmts", x, jnp.asarray(matrix).astype(x.dtype))


def talking_heads(num_heads: int, normaliser: Normaliser = Softmax()) -> TalkingHeads:
  """`TalkingHeads` that starts as `normaliser`: both matrices are the identity."""
  if not isinstance(normaliser, Normaliser):
    raise TypeError(f"normaliser={normaliser!r} must be a Normaliser; build it first")
  return TalkingHeads(jnp.eye(num_heads), jnp.eye(num_heads), normaliser)


ENTRY = Entry(make=talking_heads, paper="arXiv:2003.02436", facts={"shift_invariant"})
