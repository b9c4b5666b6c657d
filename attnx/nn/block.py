"""The residual block that every model is a stack of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core import random, registry
from attnx.core.tokens import Tokens
from attnx.nn.linear import RMSNorm
from attnx.nn.mixer import Cache
from attnx.nn.mlp import MLP

Sublayers = Sequence[Callable[[jax.Array], jax.Array]]


def pre(x: jax.Array, sublayers: Sublayers, norms: Sublayers) -> jax.Array:
  """x + f(norm(x)), one sublayer after the other (arXiv:2002.04745)."""
  for f, norm in zip(sublayers, norms, strict=True):
    x = x + f(norm(x))
  return x


def post(x: jax.Array, sublayers: Sublayers, norms: Sublayers) -> jax.Array:
  """norm(x + f(x)), one sublayer after the other (arXiv:1706.03762)."""
  for f, norm in zip(sublayers, norms, strict=True):
    x = norm(x + f(x))
  return x


def parallel(x: jax.Array, sublayers: Sublayers, norms: Sublayers) -> jax.Array:
  """x + f(norm(x)) + g(norm(x)), all sublayers at once (arXiv:2204.02311)."""
  return x + sum(f(norm(x)) for f, norm in zip(sublayers, norms, strict=True))


WIRINGS = {"pre": pre, "post": post, "parallel": parallel}


class Block(nnx.Module):
  """A mixer, perhaps another that reads a context, and an MLP, each with a norm and a residual.

  Args:
    dim: D.
    mixer: entry of `mixers`.
    cross: entry of `mixers` that reads `context`; None for none.
    mlp: arguments of `MLP`.
    wiring: "pre", "post" or "parallel", or a function like those of this file.
    dropout: rate at which the outputs of sublayers are dropped when a `key` is given.
  """

  def __init__(
    self,
    dim: int,
    *,
    mixer: Any,
    cross: Any = None,
    mlp: Mapping[str, Any] | None = None,
    wiring: str | Callable[..., jax.Array] = "pre",
    dropout: float = 0.0,
    rngs: nnx.Rngs,
  ):
    if isinstance(wiring, str) and wiring not in WIRINGS:
      raise ValueError(f"wiring={wiring!r} is unknown; {registry.suggestion(wiring, WIRINGS)}")
    if not 0 <= dropout < 1:
      raise ValueError(f"dropout={dropout} must be in [0, 1)")
    self.wiring = WIRINGS[wiring] if isinstance(wiring, str) else wiring
    self.dropout = dropout
    self.mixer = registry.build("mixers", mixer, dim=dim, rngs=rngs)
    self.cross = None if cross is None else registry.build("mixers", cross, dim=dim, rngs=rngs)
    self.mlp = MLP(dim, **(mlp or {}), rngs=rngs)
    count = 2 if cross is None else 3
    self.norms = nnx.List([RMSNorm(dim, rngs=rngs) for _ in range(count)])

  def __call__(
    self,
    x: jax.Array,
    *,
    context: jax.Array | None = None,
    tokens: Tokens | None = None,
    context_tokens: Tokens | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """(B, T, D) to (B, T, D); arguments as for `Mixer`."""
    keys = [None] * 6 if key is None else [jax.random.fold_in(key, i) for i in range(6)]
    read = dict(context=context, tokens=tokens, context_tokens=context_tokens)
    sublayers = [lambda y: self.mixer(y, tokens=tokens, key=keys[0])]
    if (cross := self.cross) is not None:
      sublayers.append(lambda y: cross(y, **read, key=keys[1]))
    elif context is not None:
      raise ValueError("a context was given to a block without a cross mixer")
    sublayers.append(self.mlp)
    return self.wiring(x, [dropped(f, self.dropout, k) for f, k in zip(sublayers, keys[3:])],
                       list(self.norms))  # fmt: skip

  def init_cache(
    self,
    batch: int,
    length: int,
    *,
    context: jax.Array | None = None,
    context_tokens: Tokens | None = None,
  ) -> dict[str, Cache]:
    """Caches of the mixers; the keys of a context are computed here, once."""
    caches = dict(mixer=self.mixer.init_cache(batch, length))
    if self.cross is not None:
      if context is None:
        raise ValueError("a block with a cross mixer wants the context when its cache is made")
      caches["cross"] = self.cross.remember(context, context_tokens=context_tokens)
    return caches

  def step(
    self, x: jax.Array, cache: dict[str, Cache], *, tokens: Tokens | None = None
  ) -> tuple[jax.Array, dict[str, Cache]]:
    """The next t tokens (B, t, D), and the caches after them."""
    after = {}

    def stepping(name):
      def run(y):
        y, after[name] = getattr(self, name).step(y, cache[name], tokens=tokens)
        return y

      return run

    names = [name for name in ("mixer", "cross") if name in cache]  # jit sorts the keys of a dict
    return self.wiring(x, [*map(stepping, names), self.mlp], list(self.norms)), after


def dropped(f, rate: float, key: jax.Array | None):
  """x to f(x), numbers of which are dropped by a hash of key, row, place and channel."""
  if key is None or rate == 0:
    return f

  def g(x):
    y = f(x)
    kept = random.keep(key, rate, *jnp.ogrid[tuple(slice(n) for n in y.shape)])
    return jnp.where(kept, y / (1 - rate), jnp.zeros((), y.dtype))

  return g
