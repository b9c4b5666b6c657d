"""Sampling: pure functions of logits, and one scan over `model.step`."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnx.core.tokens import Tokens


def filtered(
  logits: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
) -> jax.Array:
  """logits / temperature, and -inf where a token is not to be drawn.

  Args:
    logits: (..., V).
    temperature: above 0; greedy choice is `greedy`, not a temperature of 0.
    top_k: keep the k most probable tokens, and those that tie with the last of them.
    top_p: keep the fewest tokens whose probabilities reach p, the most probable first
      (arXiv:1904.09751). What top_k cut has probability zero.
    min_p: keep tokens at least p times as probable as the most probable one (arXiv:2407.01082).

  Raises:
    ValueError: a number that is out of its range.
  """
  V = logits.shape[-1]
  if not temperature > 0:
    raise ValueError(f"temperature={temperature} must be above 0; sample greedily with `greedy`")
  if top_k is not None and not 1 <= top_k <= V:
    raise ValueError(f"top_k={top_k} must be in 1 .. {V}")
  for name, p in (("top_p", top_p), ("min_p", min_p)):
    if p is not None and not 0 < p <= 1:
      raise ValueError(f"{name}={p} must be in (0, 1]")
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
  if top_k is not None:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    share = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share  # of what is more probable
    kept = before < top_p
    least = jnp.where(kept, ranked, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if min_p is not None:
    logits = jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(min_p), -jnp.inf, logits)
  return logits


def greedy(key: jax.Array, logits: jax.Array) -> jax.Array:
  """The most probable token of (..., V)."""
  del key
  return logits.argmax(-1).astype(jnp.int32)


def draw(key: jax.Array, logits: jax.Array, **options: Any) -> jax.Array:
  """A token of softmax(filtered(logits, **options)), for (..., V)."""
  return jax.random.categorical(key, filtered(logits, **options)).astype(jnp.int32)


def sampler(**options: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """`draw` with its options, for `generate`; `sampler()` draws from the model as it is."""
  filtered(jnp.zeros(options.get("top_k") or 1), **options)  # refuses bad options at once
  return functools.partial(draw, **options)


def generate(
  model: Any,
  prompt: jax.Array,
  count: int,
  *,
  lengths: jax.Array | None = None,
  choose: Callable[[jax.Array, jax.Array], jax.Array] = greedy,
  key: jax.Array | None = None,
  cache: Any = None,
) -> jax.Array:
  """The next `count` tokens after each prompt: one call for the prompts, one scan for the rest.

  Args:
    model: has `init_cache` and `step`.
    prompt: (B, T) ids; row b holds `lengths[b]` of them, from the left.
    count: tokens to generate.
    lengths: (B,), at least 1; None means that all prompts have T tokens.
    choose: (key, logits (B, V)) to ids (B,): `greedy`, or a `sampler`.
    key: of the draws; the same key draws the same tokens. None for those who draw nothing.
    cache: what `model.init_cache` gave, for models that are given more than a prompt.

  Returns:
    (B, count) ids.
  """
  if prompt.ndim != 2 or 0 in prompt.shape:
    raise ValueError(f"prompt has shape {prompt.shape}; expected (B, T), none of them 0")
  if count < 1:
    raise ValueError(f"count={count} must be at least 1")
  if key is None and choose is not greedy:
    raise ValueError("sampling draws tokens and wants a key; only `greedy` goes without")
  B, T = prompt.shape
  key = jax.random.key(0) if key is None else key
  lengths = jnp.full(B, T) if lengths is None else jnp.asarray(lengths)

  # Prompts end together: short ones are padded on the left, where positions are negative.
  index = jnp.arange(T, dtype=jnp.int32)[None]
  position = index - (T - lengths[:, None]).astype(jnp.int32)
  ids = jnp.take_along_axis(prompt, position % T, axis=1)
  position = jnp.where(position >= 0, position, -1)
  tokens = Tokens(jnp.maximum(position, 0), position, jnp.zeros_like(position))
  cache = model.init_cache(B, T + count) if cache is None else cache
  logits, cache = model.step(ids, cache, tokens=tokens, last=True)

  def next_token(carry, key):
    logits, cache = carry
    ids = choose(key, logits)
    logits, cache = model.step(ids[:, None], cache)
    return (logits[:, -1], cache), ids

  # The last token needs no step after it.
  keys = jax.random.split(key, count)
  (logits, _), ids = jax.lax.scan(next_token, (logits[:, -1], cache), keys[:-1])
  return jnp.concatenate([ids.T, choose(keys[-1], logits)[:, None]], axis=1)
