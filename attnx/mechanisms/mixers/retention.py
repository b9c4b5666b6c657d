"""Retention: linear attention that forgets at a rate of each head (Sun et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import AttentionSpec, attend_partial
from attnx.attention.masks import Causal
from attnx.attention.normalisers import Normaliser
from attnx.attention.transforms import Transform
from attnx.core import registry, struct
from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.conv import exists
from attnx.nn.linear import RMSNorm, linear
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


# What a row is divided by, (B, T, N, 1) and without gradient. The official code has one for each of
# its forms; after the norm of a head they all are plain retention, but for the epsilon.


def plain(q, k, v, mass, tokens) -> float:
  """1: a float32 state needs no help."""
  del q, k, v, mass, tokens
  return 1.0


def recurrent(q, k, v, mass, tokens) -> jax.Array:
  """sqrt(m_t), m_t = sum_s gamma^(t-s), as the official recurrent form."""
  del q, k, v, tokens
  return jnp.sqrt(jnp.maximum(mass, 1.0))[..., None]


def parallel(q, k, v, mass, tokens) -> jax.Array:
  """sqrt(m_t) clip(sum_s |q_t k_s| gamma^(t-s) / sqrt(m_t), 1, 5e4), as the official parallel form.

  O(T^2 H) work in linear memory: no state knows a sum of absolute values.
  """
  root = jnp.sqrt(jnp.maximum(mass, 1.0))
  spec = AttentionSpec(
    Causal() & registry.build("masks", "same_segment"), (Decay(q.shape[2]),), Linear(), scale=1.0
  )
  tokens = Tokens.of_length(q.shape[1]) if tokens is None else tokens
  total = attend_partial(q, k, v[..., :1], spec, q_tokens=tokens, k_tokens=tokens).mass
  return (root * jnp.clip(total / root, 1.0, 5e4))[..., None]


def chunkwise(q, k, v, mass, tokens) -> jax.Array:
  """s_i max(1, sum_j |q_i k_j| gamma^(i-j) / s_i, max_V sum_H |S| / l) in chunks of 512.

  Here s_i^2 sums gamma^(i-j) over the chunk so far, l sums gamma^j over a whole chunk, and S is the
  state before it, as in the official chunkwise form.
  """
  del mass
  if tokens is not None:
    raise NotImplementedError("the chunkwise normalisation cannot tell documents apart; take plain")
  (B, T, N, _), C = q.shape, min(CHUNK, q.shape[1])
  log_decay = jnp.asarray(log_decays(N), working_dtype(q))
  heads = lambda x: chunks.heads_first(x, N, working_dtype(x))
  far = np.arange(C)[:, None] - np.arange(C)
  decay = jnp.where(far >= 0, jnp.exp(far * log_decay[:, None, None]), 0.0)  # (N, C, C)
  root, whole = jnp.sqrt(decay.sum(-1)), decay[:, -1].sum(-1)

  def step(state, of):
    q, k, v = map(heads, of)
    inside = (jnp.abs(q @ k.mT) * decay).sum(-1) / root
    before = jnp.abs(state).sum(-2).max(-1) / whole  # (B, N)
    most = jnp.maximum(jnp.maximum(inside, before[..., None]), 1.0)
    onto = k * decay[:, -1, :, None]
    state = jnp.exp(C * log_decay)[:, None, None] * state + onto.mT @ v
    return state, jnp.swapaxes(root * most, 1, 2)

  state = jnp.zeros((B, N, q.shape[3], v.shape[3]), working_dtype(q))
  _, most = chunks.scan(step, state, tuple(chunks.cut(x, C) for x in (q, k, v)))
  return chunks.join(most, T)[..., None]


NORMALISATIONS = dict(plain=plain, recurrent=recurrent, parallel=parallel, chunkwise=chunkwise)


@struct.dataclass
class Decay(Transform):
  """s gamma_n^(t - s), for head n of N."""

  num_heads: int = struct.static()

  def __call__(self, scores, q, k):
    log_decay = jnp.asarray(log_decays(self.num_heads), scores.dtype)[q.head]
    return scores * jnp.exp(jnp.maximum(q.position - k.position, 0) * log_decay)


@struct.dataclass
class Linear(Normaliser):
  """w_j = s_j: the scores themselves."""

  def weigh(self, scores, visible, peak):
    del peak
    return jnp.where(visible, scores, 0.0)

  def finish(self, p):
    return p.out


class Retention(RecurrentMixer):
  """o_t = q_t S_t with S_t = gamma_n S_{t-1} + k_t v_t^T (arXiv:2307.08621).

  q and k turn with the position, at 10000^(-j / (H/2 - 1)) radians a token, in two halves of the
  channels where the official code takes neighbours (the same up to an order of channels); k is over
  sqrt(H). Then out W_o with out = RMSNorm(o) * silu(x W_g) by head. (B, T, D) to (B, T, D) in the
  dtype of `x`; decays and states (B, N, H, V) are float32. Documents empty the state.

  Args:
    dim: D.
    num_heads: N; each head has its own fixed gamma = 1 - 2^-(5 + n).
    expand: width of the values over D.
    normalisation: what a row is divided by before the norm: "plain", "recurrent", "parallel" or
      "chunkwise", after the forms of the official code, or a function like those of this file.
    epsilon: of the norm; with 0 all normalisations are the same.

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
    normalisation: str | Callable[..., jax.Array | float] = "plain",
    epsilon: float = 1e-6,
    rngs: nnx.Rngs,
  ):
    N, inner = num_heads, int(expand * dim)
    if N < 1 or dim % (2 * N) or inner % N or inner < 1:
      raise ValueError(
        f"num_heads={N} must divide {inner} values and give dim={dim} an even number of channels"
      )
    if isinstance(normalisation, str) and normalisation not in NORMALISATIONS:
      known = registry.suggestion(normalisation, NORMALISATIONS)
      raise ValueError(f"normalisation={normalisation!r} is unknown; {known}")
    self.divisor = NORMALISATIONS.get(normalisation, normalisation)
    self.shape = (N, dim // N, inner // N)
    init = jax.nn.initializers.variance_scaling
    narrow = dict(kernel_init=init(2**-5, "fan_avg", "uniform"), rngs=rngs)
    self.query, self.key = (linear(dim, (N, dim // N), **narrow) for _ in range(2))
    self.value, self.gate = (linear(dim, (N, inner // N), **narrow) for _ in range(2))
    self.norm = RMSNorm(inner // N, epsilon=epsilon, use_scale=False, rngs=rngs)
    wide = init(2**-2, "fan_avg", "uniform")
    self.out = linear((N, inner // N), dim, kernel_init=wide, rngs=rngs)

  def empty(self, batch):
    N, H, V = self.shape
    return dict(
      seen=jnp.zeros((batch, 1), jnp.int32),
      mass=jnp.zeros((batch, 1, N, 1)),
      state=jnp.zeros((batch, N, H, V)),
    )

  def step(self, x, cache, *, tokens=None):
    if self.divisor not in (plain, recurrent):
      raise NotImplementedError(
        "this normalisation divides by sums over whole rows; decode with normalisation='recurrent'"
        " or 'plain', which are the same after the norm"
      )
    return super().step(x, cache, tokens=tokens)

  def run(self, x, past, tokens):
    v = self.values(x)
    heads, past = self._recur(x, v, v, past, tokens)
    return self.out(self.norm(heads).astype(x.dtype) * jax.nn.silu(self.gate(x))), past

  def values(self, x):
    return self.value(x)

  def mix(self, x, values, *, context=None, tokens=None, context_tokens=None):
    refuse(self, context=context, context_tokens=context_tokens)
    past = self.empty(x.shape[0])
    past["state"] = jnp.zeros((*past["state"].shape[:3], values.shape[3]))
    return self._recur(x, values, self.values(x), past, tokens)[0]

  def _recur(self, x, v, own, past, tokens):
    """Heads (B, T, N, V) of values v, divided as the values `own` are, and the past after them."""
    N, H, _ = self.shape
    position = past["seen"] + jnp.arange(x.shape[1], dtype=jnp.int32)
    position = position if tokens is None else jnp.asarray(tokens.position)
    dtype = working_dtype(x)
    angle = angles(position, frequencies(H), dtype)
    q = rotate(self.query(x), angle)
    k = exists(rotate(self.key(x), angle), tokens) * H**-0.5
    log_decay = jnp.asarray(log_decays(N), dtype)[:, None]
    segment = None if tokens is None else tokens.segment
    decayed = lambda q, k, v, state: linear_attention(
      q, k, v, log_decay, state=state, segment=segment
    )
    heads, state = decayed(q, k, v, past["state"])
    ones = exists(jnp.ones((*x.shape[:2], N, 1), dtype), tokens)
    mass, last = decayed(jnp.ones_like(ones), ones, ones, past["mass"].swapaxes(1, 2))
    divisor = jax.lax.stop_gradient(self.divisor(q, k, own, mass[..., 0], tokens))
    seen = jnp.broadcast_to(jnp.maximum(position[:, -1:] + 1, 0), past["seen"].shape)
    past = dict(seen=seen, mass=last.swapaxes(1, 2), state=state)
    return (heads / divisor).astype(v.dtype), past


ENTRY = Entry(
  make=Retention,
  paper="arXiv:2307.08621",
  facts={"streaming", "constant_state", "packed", "any_length", "linear_in_values"},
  tiny=dict(num_heads=4),
  patterns={"causal_self": {}},
)
