"""What the contracts of the pair algebra share: instances, inputs, tokens, values and gradients."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, attend, masks, plan, reference, transforms
from attnx.attention.partial import empty, merge
from attnx.core import registry
from attnx.core.tokens import Tokens

B, T, S, N, K, H = 2, 7, 11, 4, 2, 8
CLOSE = dict(rtol=1e-9, atol=1e-10)
SAME = registry.build("masks", "same_segment")


@functools.cache
def instance(interface: str, name: str):
  """The tiny instance of an entry, with every parameter moved off its initial value."""
  tiny = dict(registry.get(interface, name).tiny, name=name)
  context = dict(num_heads=N, head_dim=H, dim=N * H, rngs=nnx.Rngs(0))
  leaves, tree = jax.tree.flatten(registry.build(interface, tiny, **context))
  rng = np.random.default_rng(1)
  move = lambda x: np.asarray(x + 0.3 * rng.standard_normal(x.shape), x.dtype)
  return tree.unflatten([move(x) if floating(x) else x for x in leaves])


def floating(x) -> bool:
  return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def entries_with(interface: str, fact: str, holds: bool = True) -> list[str]:
  names = registry.names(interface)
  return [name for name in names if (fact in registry.get(interface, name).facts) == holds]


def inputs(t: int = T, s: int = S, dtype=np.float64):
  """Queries, keys and values."""
  rng = np.random.default_rng(0)
  shapes = ((B, t, N, H), (B, s, K, H), (B, s, K, H))
  return tuple(jnp.asarray(1.5 * rng.standard_normal(shape), dtype) for shape in shapes)


def packed(length: int, seed: int | None = None) -> Tokens:
  """Two documents in a row and padding in one of the rows; shuffled with a seed."""
  where = Tokens.of_length(length)
  end = np.array([[length], [length - 2]])
  position = np.where(where.index < end, where.index, -1)
  segment = np.broadcast_to(where.index >= length // 2, position.shape).astype(np.int32)
  if seed is not None:
    order = np.random.default_rng(seed).permutation(length)
    position, segment = position[:, order], segment[:, order]
  return dataclasses.replace(where, position=position, segment=segment)


def evaluate(spec: AttentionSpec, qkv, q_tokens: Tokens, k_tokens: Tokens, implementation: str):
  """The output, and the gradients of a sum of its cosines to q, k, v and all parameters."""
  leaves, tree = jax.tree.flatten((qkv, spec))
  moving = [floating(x) for x in leaves]

  @jax.jit
  def run(*given):
    rest = iter(given)
    qkv, spec = tree.unflatten([next(rest) if m else x for x, m in zip(leaves, moving)])
    kwargs = dict(q_tokens=q_tokens, k_tokens=k_tokens, implementation=implementation)
    out = attend(*qkv, spec, **kwargs)
    return jnp.cos(out).sum(), out

  given = [x for x, m in zip(leaves, moving) if m]
  grads, out = jax.jit(jax.grad(run, tuple(range(len(given))), has_aux=True))(*given)
  return out, grads


def in_pieces(spec: AttentionSpec, qkv, q_tokens: Tokens, k_tokens: Tokens, cuts: tuple[int, ...]):
  """The finished output of keys that arrive in pieces, last first, with gradients as `evaluate`."""
  leaves, tree = jax.tree.flatten((qkv, spec))
  moving = [floating(x) for x in leaves]

  def run(*given):
    rest = iter(given)
    (q, k, v), spec = tree.unflatten([next(rest) if m else x for x, m in zip(leaves, moving)])
    p = empty((*q.shape[:3], v.shape[-1]), q.dtype)
    for a, b in reversed(list(zip(cuts, cuts[1:]))):
      p = merge(reference.partial(q, k[:, a:b], v[:, a:b], spec, q_tokens, k_tokens[a:b]), p)
    out = spec.finish(p)
    return jnp.cos(out).sum(), out

  given = [x for x, m in zip(leaves, moving) if m]
  grads, out = jax.jit(jax.grad(run, tuple(range(len(given))), has_aux=True))(*given)
  return out, grads


def edited(transform, scores, q: Tokens, k: Tokens):
  """Scores (B, N, T, S) after a transform that does not look at queries."""
  spec = AttentionSpec(transforms=(transform,))
  return spec.score(scores, q, k, spec.tables(jnp.zeros((1, scores.shape[2], scores.shape[1], 1))))


def wide(tree):
  """Floating leaves in float64; call it with x64 enabled."""
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if floating(x) else x, tree)


def assert_close(actual, expected, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def assert_near(actual, expected, tolerance: float):
  """Every array within a tolerance of its largest entry."""
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    scale = np.abs(y).max() or 1.0
    np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=tolerance)


def weights_of(normaliser, scores, visible=True) -> np.ndarray:
  """The finished weights of given scores (.., S) or (N, T, S), of the same shape."""
  given = jnp.asarray(scores)
  wide_scores = given.reshape((1,) * (4 - given.ndim) + given.shape)
  _, heads, t, s = wide_scores.shape
  q, k = (jnp.zeros((1, length, heads, 1), given.dtype) for length in (t, s))
  mask = masks.Dense(jnp.broadcast_to(visible, wide_scores.shape))
  spec = AttentionSpec(mask, (transforms.Add(wide_scores),), normaliser)
  out = reference.weights(q, k, spec, Tokens.of_length(t), Tokens.of_length(s))
  return out.reshape(given.shape)


def pairs(mask, t: int, s: int | None = None, heads: int = 1, batch: int = 1) -> np.ndarray:
  """Which pairs of one document a mask lets meet, (B, N, T, S)."""
  q, k = Tokens.of_length(t), Tokens.of_length(t if s is None else s)
  visible = mask(q.rows(batch, heads), k.columns())
  return np.asarray(jnp.broadcast_to(visible, (batch, heads, t, k.index.shape[1])))


def visited(mask, length: int, chunk: int) -> int:
  """How many tiles of one document are not empty."""
  where = Tokens.of_length(length)
  return int((~plan.tiles(mask, where, where, chunk, chunk).empty).sum())
