"""Token mixers: the part of a block that moves information between positions."""

from __future__ import annotations

from typing import Any

from flax import nnx
import jax

from attnx.core.tokens import Tokens

Cache = Any  # a pytree of arrays; each mixer has its own


class Mixer(nnx.Module):
  """Attention, recurrence, convolution or Fourier transform over a sequence.

  A mixer is a pure function of its parameters and arguments: it never writes to itself. It declares
  in its entry the attention patterns that it holds exactly (`Entry.patterns`), and facts that the
  contract tests then hold it to:

    streaming: `step` exists, and stepping through a sequence gives what one call gives.
    constant_state, linear_state: how the cache grows with the room that `init_cache` makes.
    packed: honours `tokens`: documents packed in one row do not see each other, tokens at negative
      positions are not there, and in `step` a prompt may be padded on the left.
    any_length: one instance serves every sequence length.
    linear_in_values: `values` and `mix` exist, so that `implicit_attention` gives the (B, N, T, S)
      matrix that the mixer is.
  """

  def __call__(
    self,
    x: jax.Array,
    *,
    context: jax.Array | None = None,
    tokens: Tokens | None = None,
    context_tokens: Tokens | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Mixes a whole sequence.

    Args:
      x: (B, T, D).
      context: (B, S, D) to read from, for cross attention; None reads from `x`.
      tokens: where the tokens of `x` sit; default: positions 0 .. T-1 of one document.
      context_tokens: where the tokens of `context` sit; default: positions 0 .. S-1.
      key: randomness for what drops; None is evaluation.

    Returns:
      (B, T, D) in the dtype of `x`.

    Raises:
      NotImplementedError: the mixer does not take an argument that was given.
    """
    raise NotImplementedError

  def init_cache(self, batch: int, length: int) -> Cache:
    """What is remembered before the first token, with room for `length` tokens."""
    raise NotImplementedError(f"{type(self).__name__} does not declare 'streaming'")

  def step(
    self, x: jax.Array, cache: Cache, *, tokens: Tokens | None = None
  ) -> tuple[jax.Array, Cache]:
    """Mixes the next t tokens, (B, t, D) to (B, t, D), and returns the cache after them.

    `tokens` default to the positions after those that the cache has seen. Rows of a prompt that are
    shorter than the others are padded on the left, with negative positions.
    """
    raise NotImplementedError(f"{type(self).__name__} does not declare 'streaming'")

  def values(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """What is mixed: (B, S, D) to (B, S, K, V), or (B, S, D, 1) where channels mix apart.

    `tokens` say where those of `x` sit, to values that see their neighbours.
    """
    raise NotImplementedError(f"{type(self).__name__} does not declare 'linear_in_values'")

  def mix(
    self,
    x: jax.Array,
    values: jax.Array,
    *,
    context: jax.Array | None = None,
    tokens: Tokens | None = None,
    context_tokens: Tokens | None = None,
  ) -> jax.Array:
    """Values (B, S, K, V) of any width V to heads (B, T, N, V): linear, with weights that x gives.

    A call does this to `values(x, tokens=tokens)`, and then what it does to each token alone:
    norms, gates, combiners, projections. Arguments as for a call.
    """
    raise NotImplementedError(f"{type(self).__name__} does not declare 'linear_in_values'")


def refuse(module: nnx.Module, **arguments: Any) -> None:
  """Raises for every argument that was given though `module` cannot honour it."""
  given = [name for name, value in arguments.items() if value is not None]
  if given:
    raise NotImplementedError(f"{type(module).__name__} takes no {' and no '.join(given)}")


def observed(module: nnx.Module, kind: type[nnx.Variable] = nnx.Intermediate) -> bool:
  """Whether `nnx.capture` is collecting this kind; guards work done only for who looks."""
  return any(type(captured) is kind for captured in getattr(module, "__captures__", ()))
