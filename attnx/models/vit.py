"""Vision transformer over any mixer that is not causal (arXiv:2010.11929)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.nn.block import Block
from attnx.nn.linear import RMSNorm, like_first, linear
from attnx.nn.stack import Stack, pattern


class Model(nnx.Module):
  """classes = readout(mean(norm(blocks(patches(image) + position)))).

  Args:
    classes: size of the output.
    image: (height, width, channels); height and width are multiples of `patch`.
    patch: side of a patch.
    dim: D.
    depth: number of blocks.
    mixers: entries of `mixers`, repeated in order until the depth is reached.
    mlp, wiring, dropout: of `nn.block.Block`.
    dtype: that blocks compute in; parameters and logits are float32.
    scan, remat: of `nn.stack.Stack`.
  """

  def __init__(
    self,
    classes: int,
    *,
    image: Sequence[int],
    patch: int,
    dim: int,
    depth: int,
    mixers: Sequence[Any],
    mlp: Mapping[str, Any] | None = None,
    wiring: Any = "pre",
    dropout: float = 0.0,
    dtype: str = "float32",
    scan: bool = False,
    remat: str | None = None,
    rngs: nnx.Rngs,
  ):
    if len(image) != 3 or patch < 1 or image[0] % patch or image[1] % patch:
      raise ValueError(
        f"image={tuple(image)} must be (height, width, channels), in multiples of patch={patch}"
      )
    mixer = pattern(mixers)
    make = lambda i, rngs: Block(
      dim, mixer=mixer(i), mlp=mlp, wiring=wiring, dropout=dropout, rngs=rngs
    )
    period = 1 if isinstance(mixers, str | Mapping) else len(mixers)
    size = (image[0] // patch) * (image[1] // patch)
    self.image, self.dtype = tuple(image), jnp.dtype(dtype)
    self.patches = nnx.Conv(
      image[2], dim, (patch, patch), strides=patch, padding="VALID", rngs=rngs,
      promote_dtype=like_first,
    )  # fmt: skip
    self.position = nnx.Param(jax.random.normal(rngs.params(), (size, dim)) * 0.02)
    self.stack = Stack(make, depth, period=period, scan=scan, remat=remat, rngs=rngs)
    self.norm = RMSNorm(dim, rngs=rngs)
    self.readout = linear(dim, classes, use_bias=True, rngs=rngs)

  def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """(B, height, width, channels) to logits (B, classes), float32."""
    if images.shape[1:] != self.image:
      expected = ", ".join(map(str, self.image))
      raise ValueError(f"images are {images.shape}; expected (B, {expected})")
    x = jax.lax.collapse(self.patches(images.astype(self.dtype)), 1, 3)
    x = self.stack(x + self.position[...].astype(x.dtype), key=key)
    return self.readout(jnp.mean(self.norm(x).astype(jnp.float32), axis=1))
