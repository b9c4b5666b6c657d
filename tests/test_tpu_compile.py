"""Every entry that works by tile compiles for TPUs, forward and backward, from the one kernel.

`make test-tpu` installs the compiler; `make test` skips this file. One process compiles all entries
for a chip.
"""

import dataclasses
import json
import pathlib
import sys

import ahead
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specs import SAME, floating
from test_pallas_tpu import FIT

from attnx.attention import AttentionSpec, api, masks, pallas_tpu, transforms
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.nn.kv_cache import KVCache
from attnx.nn.position import Position
from attnx.sharded.ring import ring_attend
from pallas_kernels import aot
from pallas_kernels.blocks import Blocks, Chosen

B, T, N, K, H = 2, 512, 4, 2, 128
DENSE = ("bias", "visible")  # arrays of pairs, which are no entries
WIDE = ("v6e", "tpu7x")  # chips with matrix units of 256, for which sums lie
CHIPS = ["v5e", "v6e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5p", "tpu7x"))]


def spec_of(interface: str, name: str) -> AttentionSpec:
  if interface == "pairs":
    array = np.ones((1, N, T, T), np.float32)
    if name == "bias":
      return AttentionSpec(transforms=(transforms.Add(array),))
    return AttentionSpec(mask=masks.Dense(array > 0))
  options = dict(registry.get(interface, name).tiny, name=name)
  if name == "top_k_blocks":
    options |= dict(scores=np.zeros((B, N, T // 16, T // 16)), q_block=16, k_block=16)
  if name == "shaw":
    options |= dict(values=False)
  part = registry.build(
    interface, options, num_heads=N, head_dim=H, dim=N * H, rngs=nnx.Rngs(0)
  )
  if interface == "masks":
    return AttentionSpec(mask=part)
  mask = masks.Causal() & SAME
  if interface == "normalisers":
    return AttentionSpec(mask=mask, normaliser=part)
  return AttentionSpec(mask=mask, **{interface: (part,)})


def case(interface: str, name: str, lying: bool, dtype=jnp.bfloat16):
  """The value and all gradients of an entry, packed rows with positions known at run time."""
  blocks = Chosen(*[Blocks(*[256 if lying else 128] * 4, 0, lying)] * 2)
  leaves, tree = jax.tree.flatten(spec_of(interface, name))
  moving = [floating(x) for x in leaves]

  def loss(qkv, moved, rest, at):
    moved, rest = iter(moved), iter(rest)
    spec = tree.unflatten([next(moved if m else rest) for m in moving])
    tokens = Tokens(np.arange(T, dtype=np.int32)[None], at, at)
    p = pallas_tpu.partial(*qkv, spec, tokens, tokens, blocks=blocks)
    return spec.finish(p).astype(jnp.float32).sum()

  shape = lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype)
  pick = lambda kind: [shape(x) for x, m in zip(leaves, moving) if m == kind]
  qkv = tuple(jax.ShapeDtypeStruct((B, T, heads, H), dtype) for heads in (N, K, K))
  at = jax.ShapeDtypeStruct((B, T), jnp.int32)
  return jax.value_and_grad(loss, (0, 1)), (qkv, pick(True), pick(False), at)


def ring(devices):
  """Value and gradient of a ring whose shards are attended to by kernels, over all devices."""
  mesh = jax.sharding.Mesh(np.array(devices), ("ring",))
  here = api.IMPLEMENTATIONS["pallas_tpu"]
  api.IMPLEMENTATIONS["pallas_tpu"] = dataclasses.replace(here, refusal=lambda *_: None)

  def attend(q, k, v, at):
    tokens = dict(q_tokens=at, k_tokens=at)
    return ring_attend(q, k, v, AttentionSpec(mask=masks.Causal()), **tokens, axis_name="ring")

  shards = jax.sharding.PartitionSpec(None, "ring")
  over = jax.shard_map(attend, mesh=mesh, in_specs=shards, out_specs=shards)
  loss = lambda q, k, v, at: over(q, k, v, at).astype(jnp.float32).sum()
  place = jax.NamedSharding(mesh, shards)
  shape = lambda x, dtype: jax.ShapeDtypeStruct(x, dtype, sharding=place)
  length = T * len(devices)
  qkv = [shape((B, length, heads, H), jnp.bfloat16) for heads in (N, K, K)]
  return jax.value_and_grad(loss, (0, 1, 2)), [*qkv, Tokens(*[shape((1, length), jnp.int32)] * 3)]


def steps(devices):
  """Four tokens, one after the other in a loop, over a cache of 4096 tokens of 8 heads."""
  pallas = dataclasses.replace(api.IMPLEMENTATIONS["pallas_tpu"], refusal=lambda *_: None)
  api.IMPLEMENTATIONS["pallas_tpu"] = pallas

  def run(cache, q):
    def step(carry, _):
      cache, q = carry
      at = cache.next(1)
      k = v = q[:, :, :8]
      q, cache = cache.attend(
        q, k, v, at, spec=AttentionSpec(mask=masks.Causal()), position=Position(),
        implementation="pallas_tpu",
      )  # fmt: skip
      return (cache, q), None

    return jax.lax.scan(step, (cache, q), length=4)[0]

  cache = jax.eval_shape(lambda: KVCache.empty(B, 4096, 8, H, H, dtype=jnp.bfloat16))
  return run, [cache, jax.ShapeDtypeStruct((B, 1, 32, H), jnp.bfloat16)]


@pytest.fixture(scope="module", params=CHIPS)
def compiled(request) -> dict[str, str]:
  """What became of every entry on a chip: "" or the error."""
  return json.loads(ahead.run(__file__, request.param, timeout=900).splitlines()[-1])


@pytest.mark.libtpu
@pytest.mark.parametrize("entry", [*FIT, *(("pairs", name) for name in DENSE)], ids="-".join)
def test_an_entry_compiles_forward_and_backward(compiled, entry):
  assert compiled["-".join(entry)] == ""


@pytest.mark.libtpu
@pytest.mark.parametrize("case", ["ring", "steps"])
def test_kernels_compile_inside_of_what_calls_them(compiled, case):
  assert compiled[case] == ""


def compile_all(chip: str) -> dict[str, str]:
  """Entries, "ring" and "steps", to "" or what went wrong."""
  found, module = {}, pathlib.Path(__file__).stem
  targets = {name: f"{module}:{name}" for name in ("ring", "steps")}
  for interface, name in [*FIT, *(("pairs", name) for name in DENSE)]:
    arguments = f"interface={interface!r}, name={name!r}, lying={chip in WIDE}"
    targets[f"{interface}-{name}"] = f"{module}:case({arguments})"
  for name, target in targets.items():
    try:
      aot.compiled(target, chip)
      found[name] = ""
    except Exception as error:  # whatever it is, it belongs to this entry
      found[name] = f"{type(error).__name__}: {str(error)[:400]}"
  return found


if __name__ == "__main__":
  print(json.dumps(compile_all(sys.argv[1])))
