"""What is measured: shapes, masks as specs and as FlexAttention's functions, and the order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, masks, reference, transforms
from attnx.core import registry
from attnx.core.tokens import Tokens

SOFT_CAP, COLUMNS, NEAR = 50.0, 32, (63, 31)
DIRECTIONS = ("forward", "backward")
SPECIAL = ("packed", "soft_cap_alibi", "neighbourhood", "top_k_blocks")
SPARSE = ("packed", "neighbourhood", "top_k_blocks")
RECURRENCES = ("scalar_decay", "vector_decay", "gated_delta")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How large the cases are.

  Attributes:
    tokens: of a batch, or one row where that is longer.
    dim: N H.
    widths, lengths: H and T = S of plain attention.
    special: T of the masks that cuDNN does not have.
    window: keys of the packed documents' window.
    block: tokens of the blocks of which an eighth is chosen.
    cache, rows: keys that are decoded from, and how many rows of them.
    near: the neighbourhood on a grid of 32 columns.
    chunked, xla: the longest T of these slow series.
  """

  tokens: int = 16384
  dim: int = 2048
  widths: tuple[int, ...] = (64, 128, 256)
  lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
  special: int = 16384
  window: int = 1024
  block: int = 128
  cache: int = 65536
  rows: int = 8
  near: tuple[int, int] = NEAR
  chunked: int = 8192
  xla: int = 2048


SMOKE = Sizes(
  tokens=256, dim=32, widths=(16,), lengths=(256,), special=256, window=48, block=32, cache=512,
  rows=2, near=(3, 7), chunked=256, xla=256,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape and mask, forward or backward; all series of it take turns.

  Attributes:
    kind: "plain", "special", "decode" or "recurrence".
    mask: "full", "causal", or one of `SPECIAL` or `RECURRENCES`.
    direction: one of `DIRECTIONS`.
    B, T, S, N, K, H: shapes; values are as wide as keys.
  """

  kind: str
  mask: str
  direction: str
  B: int
  T: int
  S: int
  N: int
  K: int
  H: int
  sizes: Sizes = dataclasses.field(repr=False, default=Sizes())

  @property
  def name(self) -> str:
    return f"{self.kind} {self.mask} {self.direction} T={self.T} H={self.H}"

  def facts(self) -> dict[str, Any]:
    """What results.json keeps."""
    kept = ("kind", "mask", "direction", *"BTSNKH")
    return {name: getattr(self, name) for name in kept}

  def flops(self, pairs: float) -> float:
    """Of two products for each visible pair, or of the five that a backward pass takes."""
    return (4 if self.direction == "forward" else 10) * self.B * self.N * self.H * pairs

  @property
  def slow(self) -> bool:
    """Whether XLA's own loops would take a budget of minutes."""
    return self.T > self.sizes.chunked


def planned(sizes: Sizes) -> list[Case]:
  """All cases, those first that the bars hang on."""
  half = sizes.widths[len(sizes.widths) // 2]
  middle = sizes.lengths[len(sizes.lengths) // 2]
  rows = lambda T: max(1, sizes.tokens // T)
  shape = lambda T, H: dict(
    B=rows(T), T=T, S=T, N=sizes.dim // H, K=sizes.dim // H, H=H, sizes=sizes
  )
  plain = lambda T, H, mask: [
    Case("plain", mask, direction, **shape(T, H)) for direction in DIRECTIONS
  ]
  special = [
    Case("special", mask, direction, **shape(sizes.special, half))
    for direction in DIRECTIONS for mask in SPECIAL
  ]  # fmt: skip
  heads = sizes.dim // half
  decode = Case(
    "decode", "full", "forward", sizes.rows, 1, sizes.cache, 2 * heads, heads // 2, half, sizes
  )
  recurrent = lambda T, direction: [
    Case("recurrence", mask, direction, **shape(T, half)) for mask in RECURRENCES
  ]
  order: list[Case] = []
  for H in sorted(sizes.widths, key=lambda H: H != half):
    order += plain(middle, H, "causal")
  order += [*special[: len(SPECIAL)], decode, *recurrent(middle, "forward")]
  order += special[len(SPECIAL) :]
  ends = [sizes.lengths[-1], sizes.lengths[0], *sizes.lengths]
  for T in dict.fromkeys(ends):
    order += plain(T, half, "causal")
  for T in dict.fromkeys([middle, *ends]):
    order += recurrent(T, "forward")
  for T in dict.fromkeys([middle, *ends]):
    for mask in ("full", "causal"):
      for H in sizes.widths:
        order += plain(T, H, mask)
  for T in dict.fromkeys([middle, *ends]):
    order += recurrent(T, "backward")
  return list(dict.fromkeys(order))


def arrays(case: Case) -> tuple[jax.Array, ...]:
  """Random q, k, v in bfloat16; of recurrences also decays in logarithms, and beta.

  Keys of recurrences have length 1, and decays are such that half is forgotten in 2 to 700 tokens.
  """
  keys = jax.random.split(jax.random.key(len(case.name)), 5)
  shapes = ((case.T, case.N), (case.S, case.K), (case.S, case.K))
  q, k, v = (
    jax.random.normal(key, (case.B, *shape, case.H), jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=False)
  )
  if case.kind != "recurrence":
    return q, k, v
  width = case.H if case.mask == "vector_decay" else 1
  shape = (case.B, case.T, case.N, width)
  decay = -jnp.exp(jax.random.uniform(keys[3], shape, minval=-7, maxval=-1))
  length = jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True)
  k = (k / length).astype(k.dtype)
  if case.mask != "gated_delta":
    return q, k, v, decay
  beta = jax.nn.sigmoid(jax.random.normal(keys[4], (case.B, case.T, case.N)))
  return q, k, v, decay[..., 0], beta


@functools.cache
def documents(T: int) -> np.ndarray:
  """Which of eight documents of unlike lengths a token belongs to, (T,)."""
  ends = np.sort(np.random.default_rng(0).choice(np.arange(1, T), 7, replace=False))
  return np.searchsorted(ends, np.arange(T), side="right").astype(np.int32)


@functools.cache
def chosen(T: int, block: int) -> np.ndarray:
  """Which blocks of keys a block of queries sees: an eighth, by chance, (T / block, T / block)."""
  n = T // block
  best = np.argsort(np.random.default_rng(1).random((n, n)), axis=-1)[:, : max(1, n // 8)]
  table = np.zeros((n, n), bool)
  np.put_along_axis(table, best, True, axis=-1)
  return table


def described(case: Case) -> tuple[AttentionSpec, Tokens, Tokens]:
  """The spec of a case, and where its queries and keys sit."""
  build = lambda interface, name, **options: registry.build(interface, dict(options, name=name))
  causal, sizes = masks.Causal(), case.sizes
  q = Tokens.of_length(case.T, offset=case.S - case.T)
  k = Tokens.of_length(case.S)
  match case.mask:
    case "full":
      return AttentionSpec(), q, k
    case "packed":
      segment = documents(case.T)[None]
      q, k = (dataclasses.replace(side, segment=segment) for side in (q, k))
      window = masks.Window(sizes.window - 1)
      return AttentionSpec(mask=causal & window & build("masks", "same_segment")), q, k
    case "soft_cap_alibi":
      edits = transforms.SoftCap(SOFT_CAP), build("transforms", "alibi", num_heads=case.N)
      return AttentionSpec(mask=causal, transforms=edits), q, k
    case "neighbourhood":
      grid = (case.T // COLUMNS, COLUMNS)
      return AttentionSpec(
        mask=build("masks", "neighborhood", shape=grid, window=sizes.near)
      ), q, k
    case "top_k_blocks":
      scores = np.where(chosen(case.T, sizes.block), 1.0, -np.inf)[None, None]
      mask = build("masks", "top_k_blocks", scores=scores, top_k=scores.shape[-1],
                   q_block=sizes.block, k_block=sizes.block)  # fmt: skip
      return AttentionSpec(mask=mask), q, k
  return AttentionSpec(mask=causal), q, k  # also what recurrences are compared with


def flex(case: Case, torch: Any) -> tuple[Callable | None, Callable]:
  """The same as FlexAttention's score_mod (or None) and mask_mod."""
  tensor = lambda x: torch.as_tensor(np.asarray(x), device="cuda")
  match case.mask:
    case "packed":
      segment, window = tensor(documents(case.T)), case.sizes.window
      return None, lambda b, h, i, j: (i >= j) & (i - j < window) & (segment[i] == segment[j])
    case "soft_cap_alibi":
      slope = tensor(2.0 ** (-8 * np.arange(1, case.N + 1, dtype=np.float32) / case.N))
      capped = lambda s: SOFT_CAP * torch.tanh(s / SOFT_CAP)
      return lambda s, b, h, i, j: capped(s) - slope[h] * (i - j), lambda b, h, i, j: i >= j
    case "neighbourhood":
      grid, near = (case.T // COLUMNS, COLUMNS), case.sizes.near

      def seen(axis, i, j):
        start = torch.clamp(i - near[axis] // 2, 0, grid[axis] - near[axis])
        return (j >= start) & (j < start + near[axis])

      return None, lambda b, h, i, j: seen(0, i // COLUMNS, j // COLUMNS) & seen(
        1, i % COLUMNS, j % COLUMNS
      )
    case "top_k_blocks":
      table, block = tensor(chosen(case.T, case.sizes.block)), case.sizes.block
      return None, lambda b, h, i, j: table[i // block, j // block]
  raise NotImplementedError(f"mask={case.mask!r} is not one of {SPECIAL}")


def blocks(T: int) -> Iterator[slice]:
  """Rows a few at a time."""
  size = min(T, 512)
  return (slice(at, at + size) for at in range(0, T, size))


@functools.cache
def visible(case: Case) -> float:
  """How many pairs of a row of the batch and a head the mask lets meet."""
  if case.mask in ("full", *RECURRENCES):
    return case.T * case.S if case.mask == "full" else case.T * (case.T + 1) / 2
  spec, q, k = described(case)
  count = jax.jit(lambda rows: spec.visible(rows.rows(1, 1), k.columns()).sum())
  return float(sum(int(count(q[rows])) for rows in blocks(case.T)))


def cotangent(case: Case) -> jax.Array:
  """What gradients are pulled back from; of recurrences it ends with what is checked."""
  shape = (case.B, case.T, case.N, case.H)
  dout = jax.random.normal(jax.random.key(9), shape, jnp.bfloat16)
  return dout * (jnp.arange(case.T) < checked(case))[:, None, None].astype(dout.dtype)


def checked(case: Case) -> int:
  """How many of the first tokens are compared: a loop over all steps would take minutes."""
  return min(case.T, 1024) if case.kind == "recurrence" else case.T


def corner(case: Case, name: str, x: np.ndarray | jax.Array) -> np.ndarray:
  """Of a result (B, T, heads, H), what `exact` computes: the first key head of the first row."""
  group = case.N // case.K if name in ("out", "q") else 1
  length = min(x.shape[1], checked(case)) if case.kind == "recurrence" else x.shape[1]
  return np.asarray(x[0, :length, :group].astype(np.float32))


def exact(case: Case, given: tuple[jax.Array, ...]) -> dict[str, np.ndarray]:
  """The first row's first key head, with its query heads, by the definition in float32.

  No (T, S) array is made: rows are computed a few at a time, and again for gradients.
  """
  group, length = case.N // case.K, checked(case)
  head = lambda x, n=1: x[:1, : max(length, x.shape[1] * (case.kind != "recurrence")), :n]
  q, k, v, *rest = (head(x, n).astype(jnp.float32) for x, n in zip(given, (group, 1, 1, 1, 1)))
  dout = head(cotangent(case), group).astype(jnp.float32)
  whole = step_by_step(case, rest) if case.kind == "recurrence" else row_by_row(case)

  @jax.jit
  def run(q, k, v, dout):
    out, pull = jax.vjp(whole, q, k, v)
    return {"out": out} if case.direction == "forward" else dict(zip("qkv", pull(dout)))

  with jax.default_matmul_precision("highest"):
    return {name: np.asarray(x)[0] for name, x in run(q, k, v, dout).items()}


def row_by_row(case: Case) -> Callable[..., jax.Array]:
  """Attention of one row and one key head, (1, T, N, H), a block of queries at a time."""
  spec, q_tokens, k_tokens = described(case)
  size = min(case.T, 512)
  cut = lambda x: jnp.swapaxes(jnp.asarray(x).reshape(1, -1, size, *x.shape[2:]), 0, 1)
  tokens = jax.tree.map(lambda x: cut(jnp.broadcast_to(x, (1, case.T))), q_tokens)

  @jax.checkpoint
  def rows(q, k, v, at):
    return spec.finish(reference.partial(q, k, v, spec, at, k_tokens))

  def whole(q, k, v):
    out = jax.lax.map(lambda x: rows(x[0], k, v, x[1]), (cut(q), tokens))
    return jnp.swapaxes(out, 0, 1).reshape(1, case.T, -1, case.H)

  return whole


def step_by_step(case: Case, rest: list[jax.Array]) -> Callable[..., jax.Array]:
  """The recurrence of one row and head, (1, T, 1, H): its definition, token by token."""
  decay, *beta = (x[0, :, 0] for x in rest)  # (T, H or 1), or (T,) beside beta
  decay = jnp.exp(decay.reshape(decay.shape[0], -1, 1))

  def step(state, x):
    q, k, v, a, *b = x
    state = a * state
    new = v if not b else b[0] * (v - k @ state)
    state = state + k[:, None] * new[None]
    return state, q @ state

  def whole(q, k, v):
    xs = (q[0, :, 0], k[0, :, 0], v[0, :, 0], decay, *beta)
    return jax.lax.scan(step, jnp.zeros((case.H, case.H)), xs)[1][None, :, None]

  return whole
