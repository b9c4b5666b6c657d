"""Decoding token by token over a mesh: long prompts in pieces, caches shared by the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np

from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.models.sampling import greedy
from attnx.nn.kv_cache import KVCache
from attnx.sharded import rules, sequence

PIECE = 2**14  # tokens of a prompt that a device takes in at once, at the most


class Stream:
  """The next tokens of several prompts, all rows at once: an iterator of ids (B,).

  Prompts are taken in over the axis "seq", by a ring or a tree, see `sharded.sequence`; caches of
  kind `full` live there in blocks by turns, their rows over "data" and "fsdp" where these divide
  them, and each new token attends by a tree; other caches are everywhere. A row draws its i-th
  token with a key of its own and of i: neither the other rows nor the number of devices change what
  it draws, but for logits that tie within rounding.

  Args:
    model: has `init_cache` and `step`, its arrays on the devices of `mesh`.
    prompts: ids of each row, at least one.
    count: tokens that there is room for after each prompt.
    choose: (key, logits (V,)) to an id: `greedy`, or a `sampler`.
    key: of the draws.
    mesh: from `sharded.rules.make_mesh`.
    piece: tokens of a prompt that are taken in at once, by all devices of a sequence together;
      None takes 16,384 for each of them.

  Raises:
    ValueError: there is nothing to go on from.
  """

  def __init__(
    self,
    model: Any,
    prompts: Sequence[Any],
    count: int,
    *,
    choose: Callable[[jax.Array, jax.Array], jax.Array] = greedy,
    key: jax.Array | None = None,
    mesh: Mesh,
    piece: int | None = None,
  ):
    if not prompts or not all(map(len, prompts)):
      raise ValueError("every prompt needs a token to go on from, and there must be one")
    if count < 1:
      raise ValueError(f"count={count} must be at least 1")
    size, self.mesh, self.count = mesh.shape["seq"], mesh, count
    spread(model, size)
    graph, self.state = nnx.split(model)
    longest = max(map(len, prompts))
    whole = size * PIECE if piece is None else piece + -piece % size
    self.piece = min(whole, longest + -longest % size)
    self.length = longest + -longest % self.piece
    self.ids, self.position = padded(prompts, self.length)
    key = jax.random.key(0) if key is None else key
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(prompts)))
    self.keys = np.asarray(jax.random.key_data(keys))

    def init(state):
      return nnx.merge(graph, state).init_cache(len(prompts), longest + count)

    shapes = jax.eval_shape(init, self.state)
    places = jax.tree.map(self.places, shapes, is_leaf=lambda x: isinstance(x, KVCache))
    here = rules.replicated(mesh)
    self.init = jax.jit(init, out_shardings=places)

    def step(state, cache, ids, position, keys, i):
      tokens = None
      if position is not None:
        tokens = Tokens(jnp.maximum(position, 0), position, jnp.zeros_like(position))
      with sequence.over(mesh):
        logits, cache = nnx.merge(graph, state).step(ids, cache, tokens=tokens, last=True)
      draws = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys), i)
      return jax.vmap(choose)(draws, logits[:, -1]), cache

    self.step = jax.jit(step, out_shardings=(here, places), donate_argnums=1)

  def places(self, cache: Any) -> Any:
    """Where the arrays of a cache live: slots over "seq", heads over "tensor", rows over the rest.

    Of a scanned stack all of them have an axis of layers in front.
    """
    mesh = self.mesh
    if not isinstance(cache, KVCache) or cache.shards == 1:
      return rules.replicated(mesh)
    layers, rows = cache.position.ndim - 2, cache.position.shape[-2]
    axes = [*[None] * layers, rules.ROWS if rows % rules.rows(mesh) == 0 else None, "seq"]
    heads = "tensor" if cache.key.shape[-2] % mesh.shape["tensor"] == 0 else None
    slots, keys = (NamedSharding(mesh, PartitionSpec(*axes, *more)) for more in ((), (heads,)))
    here: Any = dict(key=keys, value=keys, position=slots, segment=slots)
    return dataclasses.replace(cache, **here, seen=rules.replicated(mesh))  # type: ignore[arg-type]

  def __iter__(self) -> Iterator[np.ndarray]:
    ids, cache = self.prefill()
    for i in range(1, self.count):  # the next step is on its way while this one's tokens are read
      after, cache = self.step(self.state, cache, ids[:, None], None, self.keys, np.int32(i))
      yield np.asarray(ids)
      ids = after
    yield np.asarray(ids)

  def prefill(self) -> tuple[jax.Array, Any]:
    """The first ids, and the caches after the prompts."""
    cache, ids = self.init(self.state), None
    place = NamedSharding(self.mesh, PartitionSpec(None, "seq"))
    put = lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index])
    for begin in range(0, self.length, self.piece):
      cut = (x[:, begin : begin + self.piece] for x in (self.ids, self.position))
      ids, cache = self.step(self.state, cache, *map(put, cut), self.keys, np.int32(0))
    assert ids is not None
    return ids, cache


def spread(model: nnx.Module, shards: int) -> None:
  """Lets caches of kind `full` fill as many shards by turns."""
  kind = registry.get("caches", "full").make
  for _, module in nnx.iter_graph(model):
    if isinstance(cache := getattr(module, "cache", None), kind):  # type: ignore[arg-type]
      module.cache = dataclasses.replace(cache, shards=shards)  # type: ignore[type-var]


def padded(prompts: Sequence[Any], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Ids and positions (B, length) of prompts that end together; positions before them are -1."""
  ids = np.zeros((len(prompts), length), np.int32)
  position = np.full((len(prompts), length), -1, np.int32)
  for row, prompt in enumerate(prompts):
    ids[row, length - len(prompt) :] = prompt
    position[row, length - len(prompt) :] = np.arange(len(prompt))
  return ids, position
