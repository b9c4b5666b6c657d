"""Retention: linear attention that forgets at a rate of each head (Sun et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, attend_partial
from attnx.attention.normalisers import Normaliser
from attnx.attention.transforms import Transform
from attnx.core import registry, struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.conv import exists
from attnx.nn.gated_norm import GatedNorm
from attnx.nn.linear import linear
from attnx.nn.mixer import refuse
from attnx.nn.position import working_dtype
from attnx.nn.recurrent import RecurrentMixer
from attnx.nn.rotary import angles, rotate
from attnx.recurrence import chunks
from attnx.recurrence.linear import linear_attention

CHUNK = 512  # of the chunkwise normalisation, as in the official code


def log_decays(num_heads: int) -> np.ndarray:
  """(N,) values of log(1 - 2^-(5 + n)): head 0 forgets in about 32 tokens, head 7 in about 4096."""
  return np.log1p(-(2.0 ** -(5.0 + np.arange(num_heads))))


def frequencies(width: int) -> np.ndarray:
  """10000^(-j / (H/2 - 1)) for j = 0 .. H/2 - 1: 1 and 1/10000 are both among them."""
  return 10_000.0 ** -np.linspace(0.0, 1.0, width // 2)


class Rows(NamedTuple):
  """What a normalisation sees, to give what rows are divided by, (B, T, N) and without gradient.

  The official code has one for each of its forms. After the norm of a head they all are plain
  retention, but for the epsilon.
  """

  q: jax.Array  # (B, T, N, H), turned
  k: jax.Array  # (B, T, N, H), turned and scaled
  v: jax.Array  # (B, T, N, V)
  root: jax.Array  # (B, T, N), sqrt(m_t) with m_t = sum_s gamma^(t-s)
  total: jax.Array  # (B, T, N), sum_s q_t k_s gamma^(t-s)
  tokens: Tokens | None


def plain(rows: Rows) -> jax.Array:
  """1: a float32 state needs no help."""
  return jnp.ones_like(rows.root)


def recurrent(rows: Rows) -> jax.Array:
  """sqrt(m_t), as the official recurrent form."""
  return rows.root


def absolute_sum(rows: Rows) -> jax.Array:
  """sqrt(m_t) max(|sum_s q_t k_s gamma^(t-s)| / sqrt(m_t), 1), as the paper.

  So did the official parallel form before it summed absolute values. The sum is q_t times a state
  of its own, and is the same in every form.
  """
  return jnp.maximum(jnp.abs(rows.total), rows.root)


def parallel(rows: Rows) -> jax.Array:
  """sqrt(m_t) clip(sum_s |q_t k_s| gamma^(t-s) / sqrt(m_t), 1, 5e4), as the official parallel form.

  O(T^2 H) work in linear memory: no state knows a sum of absolute values.
  """
  mask = registry.build("masks", "causal") & registry.build("masks", "same_segment")
  spec = AttentionSpec(mask, (Decay(rows.q.shape[2]),), Linear(), scale=1.0)
  tokens = Tokens.of_length(rows.q.shape[1]) if rows.tokens is None else rows.tokens
  near = attend_partial(rows.q, rows.k, rows.v[..., :1], spec, q_tokens=tokens, k_tokens=tokens)
  return rows.root * jnp.clip(near.mass / rows.root, 1.0, 5e4)


def chunkwise(rows: Rows) -> jax.Array:
  """s_i max(1, sum_j |q_i k_j| gamma^(i-j) / s_i, max_V sum_H |S| / l) in chunks of 512.

  Here s_i^2 sums gamma^(i-j) over the chunk so far, l sums gamma^j over a whole chunk, and S is the
  state before it, as in the official chunkwise form.
  """
  if rows.tokens is not None:
    raise NotImplementedError("the chunkwise normalisation cannot tell documents apart; take plain")
  (B, T, N, H), V, C = rows.q.shape, rows.v.shape[3], min(CHUNK, rows.q.shape[1])
  log_decay = jnp.asarray(log_decays(N), dtype := working_dtype(rows.q))
  far = np.arange(C)[:, None] - np.arange(C)
  decay = jnp.where(far >= 0, jnp.exp(far * log_decay[:, None, None]), 0.0)  # (N, C, C)
  root, whole = jnp.sqrt(decay.sum(-1)), decay[:, -1].sum(-1)

  def step(state, of):
    q, k, v = (chunks.heads_first(x, N, dtype) for x in of)
    inside = (jnp.abs(q @ k.mT) * decay).sum(-1) / root
    before = jnp.abs(state).sum(-2).max(-1) / whole
    most = jnp.maximum(jnp.maximum(inside, before[..., None]), 1.0)  # (B, N, C)
    state = jnp.exp(C * log_decay)[:, None, None] * state + (k * decay[:, -1, :, None]).mT @ v
    return state, jnp.swapaxes(root * most, 1, 2)

  xs = tuple(chunks.cut(x, C) for x in (rows.q, rows.k, rows.v))
  _, most = chunks.scan(step, jnp.zeros((B, N, H, V), dtype), xs)
  return chunks.join(most, T)


STREAMING = dict(plain=plain, recurrent=recurrent, absolute_sum=absolute_sum)
NORMALISATIONS = STREAMING | dict(parallel=parallel, chunkwise=chunkwise)


@struct.dataclass
class Decay(Transform):
  """s gamma_n^(t - s), for head n of N."""

  num_heads: int = struct.static()

  def __call__(self, scores, q, k):
    log_decay = jnp.asarray(log_decays(self.num_heads), scores.dtype)[q.head]
    return scores * jnp.exp(jnp.maximum(q.position - k.position, 0) * log_decay)


@struct.dataclass
class Linear(Normaliser):
  """w_j = s_j: the scores themselves, of which `parallel` wants the mass."""

  def weigh(self, scores, visible, peak):
    del peak
    return jnp.where(visible, scores, 0.0)


class Retention(RecurrentMixer):
  """o_t = q_t S_t with S_t = gamma_n S_{t-1} + k_t v_t^T (arXiv:2307.08621).

  q and k turn with the position, at 10000^(-j / (H/2 - 1)) radians a token, in two halves of the
  channels where the official code takes neighbours (the same up to an order of channels); k is over
  sqrt(H). Then out W_o with out = RMSNorm(o) * silu(x W_g) by head. (B, T, D) to (B, T, D) in the
  dtype of `x`; decays, states (B, N, H, V) and the sums of gamma^(t-s) and of gamma^(t-s) k_s, for
  normalisations that stream, are float32. Documents empty them.

  Args:
    dim: D.
    num_heads: N; each head has its own fixed gamma = 1 - 2^-(5 + n).
    expand: width of the values over D.
    normalisation: what a row is divided by before the norm: "plain", "absolute_sum" as in the
      paper, "recurrent", "parallel" or "chunkwise" after the forms of the official code, or a
      function like those of this file.
    epsilon: of the norm; with 0 all normalisations are the same.
    chunk: tokens handled at once; any number gives the same.

  Raises:
    ValueError: `num_heads` does not divide D or the width of the values, or heads are odd.
    NotImplementedError: a `context` is given; or `step` where a normalisation wants whole rows.
  """

  def __init__(
    self,
    dim: int,
    *,
    num_heads: int = 4,
    expand: float = 2,
    normalisation: str | Callable[[Rows], jax.Array] = "plain",
    epsilon: float = 1e-6,
    chunk: int = 64,
    rngs: nnx.Rngs,
  ):
    N, inner = num_heads, int(expand * dim)
    if N < 1 or dim % (2 * N) or inner % N or inner < 1:
      raise ValueError(f"num_heads={N} must divide {inner} values, and dim={dim} into even heads")
    if not callable(normalisation) and normalisation not in NORMALISATIONS:
      near = registry.suggestion(normalisation, NORMALISATIONS)
      raise ValueError(f"normalisation={normalisation!r} is unknown; {near}")
    self.divisor = normalisation if callable(normalisation) else NORMALISATIONS[normalisation]
    self.shape, self.chunk = (N, H := dim // N, V := inner // N), chunk
    init = lambda gain: jax.nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")
    into = lambda width: linear(dim, (N, width), kernel_init=init(2**-2.5), rngs=rngs)
    self.query, self.key, self.value, self.gate = map(into, (H, H, V, V))
    self.norm = GatedNorm(V, epsilon=epsilon, use_scale=False, rngs=rngs)
    self.out = linear((N, V), dim, kernel_init=init(2**-1), rngs=rngs)

  def empty(self, batch):
    N, H, V = self.shape
    sizes = dict(mass=(1, 1), keys=(H, 1), state=(H, V))
    sums = {name: jnp.zeros((batch, N, *size)) for name, size in sizes.items()}
    return sums | dict(seen=jnp.zeros((batch, 1), jnp.int32))

  def step(self, x, cache, *, tokens=None):
    if self.divisor not in STREAMING.values():
      raise NotImplementedError(
        "this normalisation looks at whole rows; decode with 'recurrent', the same after the norm"
      )
    return super().step(x, cache, tokens=tokens)

  def run(self, x, past, tokens):
    v = self.values(x)
    heads, past = self._recur(x, v, v, past, tokens)
    return self.out(self.norm(heads, self.gate(x))), past

  def values(self, x, *, tokens=None):
    return self.value(x)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    past = self.empty(x.shape[0]) | dict(state=None)  # of another width, perhaps
    return self._recur(x, values, self.values(x), past, tokens)[0]

  def _recur(self, x, v, own, past, tokens):
    """Heads (B, T, N, V) of values v, divided as the values `own` are, and the past after them."""
    N, H, _ = self.shape
    position = past["seen"] + jnp.arange(x.shape[1], dtype=jnp.int32)
    position = position if tokens is None else jnp.asarray(tokens.position)
    angle = angles(position, frequencies(H), dtype := working_dtype(x))
    q = rotate(self.query(x), angle)
    k = exists(rotate(self.key(x), angle), tokens) * H**-0.5
    log_decay = jnp.asarray(log_decays(N), dtype)[:, None]
    segment = None if tokens is None else tokens.segment
    decayed = lambda q, k, v, name: linear_attention(
      q, k, v, log_decay, state=past[name], segment=segment, chunk=self.chunk
    )
    heads, state = decayed(q, k, v, "state")
    one = exists(jnp.ones((*x.shape[:2], N, 1), dtype), tokens)
    (total, keys), (mass, last) = decayed(q, k, one, "keys"), decayed(one, one, one, "mass")
    root = jnp.sqrt(jnp.maximum(mass, 1.0))[..., 0]  # at least 1 where there is a token
    rows = Rows(q=q, k=k, v=own, root=root, total=total[..., 0], tokens=tokens)
    divisor = jax.lax.stop_gradient(self.divisor(rows))[..., None]
    seen = jnp.broadcast_to(jnp.maximum(position[:, -1:] + 1, 0), past["seen"].shape)
    past = dict(seen=seen, mass=last, keys=keys, state=state)
    return (heads / divisor).astype(v.dtype), past


ENTRY = Entry(
  make=Retention,
  paper="arXiv:2307.08621",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4),
  patterns={"causal_self": {}},
)
