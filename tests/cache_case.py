"""A cache to decode from, as NumPy holds it, its oracle, and the pages it may lie in."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decoding import Partials


def meet(facts):
  return (facts.k.position <= facts.q.position) & (facts.k.segment == facts.q.segment)


class CacheCase:
  """What the cases of both decoding kernels share; keys come in the order of their slots.

  A subclass has B, N, K, T, S, `lengths`, `dtype` (of queries) and `stored` (of keys and values),
  the arrays q (B, N, T, H), k and v, and `slots`, the axis along which the slots of k and v lie:
  1 in (B, S, K, X), 2 in (B, K, S, X).
  """

  slots: int

  def place(self, first) -> None:
    """Sides of one document: slots at 0, 1, .. and queries at `first`, ..."""
    self.k_side = np.broadcast_to(np.arange(self.S), (self.B, 3, self.S)).copy()
    self.k_side[:, 2] = 0
    self.q_side = np.zeros((self.B, 3, self.T), np.int64)
    self.q_side[:, :2] = first

  def filled(self):
    """(B, 1, 1, S)."""
    return np.arange(self.S) < np.array(self.lengths)[:, None, None, None]

  def visible(self):
    """(B, 1, T, S)."""
    _, position, segment = (x[:, None, None] for x in np.moveaxis(self.k_side, 1, 0))
    at, of = self.q_side[:, 1, None, :, None], self.q_side[:, 2, None, :, None]
    return (position <= at) & (segment == of) & self.filled()

  def heads(self, x):
    """Keys or values as (B, N, S, X)."""
    return np.repeat(np.moveaxis(x, self.slots, 2), self.N // self.K, 1)

  def products(self):
    return np.einsum("bnth,bnsh->bnts", self.q, self.heads(self.k))

  def partial(self, weights, peak, visible, edited=None) -> Partials:
    edited = weights if edited is None else edited
    out = np.einsum("bnts,bnsv->bntv", edited, self.heads(self.v))
    count = np.broadcast_to(visible, weights.shape).sum(-1)
    return Partials(out, np.abs(weights).sum(-1), peak, count)

  def exponential(self, scores, visible) -> Partials:
    """Softmax to base 2."""
    scores = np.where(visible, scores, -np.inf)
    peak = scores.max(-1)
    weights = np.exp2(scores - np.maximum(peak, -1e30)[..., None])
    return self.partial(weights, peak, visible)

  def arguments(self):
    """q, k, v and both sides; slots that hold nothing hold NaN, or 99 where integers are stored."""
    what = 99 if self.stored == "int8" else np.nan
    filled = np.moveaxis(self.filled(), 3, self.slots)
    lost = lambda x: jnp.asarray(np.where(filled, x, what), self.stored)
    sides = (jnp.asarray(x, jnp.int32) for x in (self.q_side, self.k_side))
    return jnp.asarray(self.q, self.dtype), lost(self.k), lost(self.v), *sides


def paged(case: CacheCase, page: int, *arrays):
  """A shuffled table, and pools of pages that lie as the arrays do; free pages hold no numbers."""
  columns = -(-case.S // page)
  table = np.random.default_rng(1).permutation(case.B * columns + 3)[: case.B * columns]
  table = table.reshape(case.B, columns)
  pools = []
  for x in arrays:
    x = np.moveaxis(np.asarray(x), case.slots, 1)  # (B, S, K, X)
    x = np.pad(x, ((0, 0), (0, columns * page - case.S), (0, 0), (0, 0)))
    pages = np.moveaxis(x.reshape(case.B, columns, page, *x.shape[2:]), 2, case.slots + 1)
    what = 99 if x.dtype == np.int8 else np.nan
    pool = np.full((case.B * columns + 3, *pages.shape[2:]), what, x.dtype)
    pool[table] = pages
    pools.append(jnp.asarray(pool))
  used = np.arange(columns) * page < np.array(case.lengths)[:, None]
  table = np.where(used, table, case.B * columns + 3)  # none
  side = np.pad(case.k_side, ((0, 0), (0, 0), (0, columns * page - case.S)))
  return jnp.asarray(table, jnp.int32), pools, jnp.asarray(side, jnp.int32)
