"""What to compute, apart from how."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp

from attnx.attention.masks import Everything, Mask
from attnx.attention.normalisers import Normaliser, Softmax
from attnx.attention.partial import Partial
from attnx.attention.transforms import Readout, Transform
from attnx.core import struct
from attnx.core.lookup import Table
from attnx.core.tokens import Tokens


class Need(enum.StrEnum):
  """What a part of a spec may ask of an implementation, beyond tiles of keys in any order."""

  HEADS = "heads"  # all heads of a score at once
  ROW = "row"  # all keys of a row at once
  INDEX = "index"  # dense arrays indexed by place
  PARAMETERS = "parameters"  # arrays of its own, with gradients


@struct.dataclass
class AttentionSpec:
  """out = edits(normaliser(mask(transforms(scale * q k^T)))) v + readouts.

  Attributes:
    mask: which pairs may meet.
    transforms: elementwise edits of the scores, in order, before the mask.
    normaliser: how scores become weights.
    edits: elementwise edits of the weights, after the mass of the row has been counted: dropout,
      gates, ablations.
    readouts: what the weights read besides `value`: relative values.
    scale: factor on q k^T; None means 1 / sqrt(H).

  A transform with a `readout` of its own, as relative keys have relative values, gives it up to
  `readouts`.
  """

  mask: Mask = Everything()
  transforms: tuple[Transform, ...] = ()
  normaliser: Normaliser = Softmax()
  edits: tuple[Transform, ...] = ()
  readouts: tuple[Readout, ...] = ()
  scale: float | None = struct.static(None)

  def __post_init__(self):
    brings = lambda t: getattr(t, "readout", None) is not None
    if any(map(brings, self.transforms)):
      readouts = (*self.readouts, *(t.readout for t in self.transforms if brings(t)))
      bare = (dataclasses.replace(t, readout=None) if brings(t) else t for t in self.transforms)
      object.__setattr__(self, "readouts", readouts)
      object.__setattr__(self, "transforms", tuple(bare))

  @classmethod
  def from_mods(
    cls,
    mask_mod: Callable[..., jax.Array] | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    **parts,
  ) -> AttentionSpec:
    """The spec of FlexAttention-style functions (arXiv:2412.05496).

    Args:
      mask_mod: (batch, head, q_index, k_index) -> bool, True where the pair may meet.
      score_mod: (score, batch, head, q_index, k_index) -> score, before the mask.
      parts: other fields of the spec.

    Both are called on integer arrays that broadcast, may close over arrays that are not
    differentiated, and see places in the arrays (`Tokens.index`), as FlexAttention does.
    """
    if mask_mod is not None:
      parts["mask"] = MaskMod(mask_mod)
    if score_mod is not None:
      parts["transforms"] = (ScoreMod(score_mod), *parts.get("transforms", ()))
    return cls(**parts)

  @property
  def needs(self) -> frozenset[str]:
    """What an implementation must offer beyond streaming over tiles of keys."""
    mods: tuple[Any, ...] = (*self.transforms, *self.edits, *self.readouts)
    needs = (self.mask.needs | self.normaliser.needs).union(*(part.needs for part in mods))
    if unknown := needs - set(Need):
      raise ValueError(f"needs={sorted(unknown)} must be some of {', '.join(Need)}")
    return needs

  def must_merge(self) -> None:
    """Raises NotImplementedError unless attention over parts of the keys can be merged."""
    if Need.ROW in self.needs:
      raise NotImplementedError(
        f"{type(self.normaliser).__name__} sees whole rows of keys, which cannot be split over"
        " devices; choose a normaliser without the need 'row'"
      )

  def factor(self, head_dim: int) -> float:
    """The scale that applies to keys of width H."""
    return head_dim**-0.5 if self.scale is None else self.scale

  def tables(self, query: jax.Array) -> tuple[Table | None, ...]:
    """What the transforms look up, given the queries (B, T, N, H)."""
    query = query * self.factor(query.shape[-1])
    tables = [transform.table(query) for transform in self.transforms]
    return tuple(None if table is None else Table(jnp.swapaxes(table, 1, 2)) for table in tables)

  def score(
    self, products: jax.Array, q: Tokens, k: Tokens, tables: tuple[Table | None, ...]
  ) -> jax.Array:
    """Scaled products (B, N, T, S) to scores, for one tile of keys.

    Args:
      products: scale * q k^T.
      q, k: laid out by `Tokens.rows` and `Tokens.columns`.
      tables: rows of what `tables` gave.
    """
    for transform, table in zip(self.transforms, tables, strict=True):
      products = transform(products, dataclasses.replace(q, table=table), k)
    return products

  def visible(self, q: Tokens, k: Tokens) -> jax.Array:
    """Which pairs meet: those of the mask whose tokens exist; broadcasts to (B, N, T, S)."""
    return self.mask(q, k) & (q.position >= 0) & (k.position >= 0)

  def edit(self, weights: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    """Weights to the weights that read values."""
    for edit in self.edits:
      weights = edit(weights, q, k)
    return weights

  def finish(self, p: Partial) -> jax.Array:
    """The output (B, T, N, V) once every key has been seen."""
    return self.normaliser.finish(p)


@struct.dataclass
class MaskMod(Mask):
  """mask_mod(batch, head, q_index, k_index)."""

  function: Callable[..., jax.Array] = struct.static()

  def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
    return self.function(q.batch, q.head, q.index, k.index)


@struct.dataclass
class ScoreMod(Transform):
  """score_mod(score, batch, head, q_index, k_index)."""

  function: Callable[..., jax.Array] = struct.static()

  def __call__(self, scores: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    return self.function(scores, q.batch, q.head, q.index, k.index)
