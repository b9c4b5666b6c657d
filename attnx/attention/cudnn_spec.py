"""What a spec is to cuDNN's fused attention: a few numbers, or a reason why it is none."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnx.attention import by_tile
from attnx.attention.masks import And, Causal, Everything, Mask, Window
from attnx.attention.normalisers import Softmax
from attnx.attention.spec import AttentionSpec
from attnx.attention.transforms import Add
from attnx.core.tokens import Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
  """What cuDNN is told besides arrays; q_ends and k_ends (#B,) say how many tokens exist."""

  scale: float
  causal: bool
  window: int | None  # how many keys a query sees at most, itself included
  q_ends: np.ndarray
  k_ends: np.ndarray
  padded: bool

  def count(self, T: int) -> np.ndarray:
    """How many keys each query sees, (#B, T)."""
    t, ends = np.arange(T), self.k_ends[:, None]
    last = np.minimum(t + 1, ends) if self.causal else ends
    first = 0 if self.window is None else np.maximum(0, t + 1 - self.window)
    return np.where(t < self.q_ends[:, None], np.maximum(last - first, 0), 0)


def read(q, k, v, spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens) -> Asked | str:
  """What cuDNN is to be asked for, or why it cannot honour a call on any GPU.

  Its causal mask and windows go by places in the arrays, from the first query and key on. XLA has
  the gradient of a bias written in the dtype of q, even into an array of another. Segments, which
  JAX's public function does not take, and rows of no tokens are left out.
  """
  (T, H), (S, V) = q.shape[1::2], v.shape[1::2]
  if (unalike := by_tile.unalike(q, k, v, ("bfloat16", "float16"))) is not None:
    return unalike
  if H % 8 or V % 8:
    return f"wants widths of heads that are multiples of 8, got H={H} and V={V}"
  if T == S == 1:
    return "has no gradient for T = S = 1"
  if type(spec.normaliser) is not Softmax:
    return f"normalises by Softmax, not by {type(spec.normaliser).__name__}"
  if beyond := [type(part).__name__ for part in (*spec.edits, *spec.readouts)]:
    return f"reads values by unchanged weights and nothing else, got {', '.join(beyond)}"
  names = [type(part).__name__ for part in spec.transforms]
  if names not in ([], ["Add"]) or not all(type(part) is Add for part in spec.transforms):
    return f"changes scores by one Add at most, got {', '.join(names)}"
  if names and (dtype := jnp.result_type(spec.transforms[0].bias)) != q.dtype:  # type: ignore
    return f"adds a bias in the dtype of q, {q.dtype}, got {dtype}: cast it"
  if names and (T % 2 or S % 2):
    return f"has a gradient of the bias for even T and S, got T={T} and S={S}"
  if isinstance(spec.scale, jax.core.Tracer):
    return "compiles the scale in, got one that is traced: scale the queries"
  masks = list(conjuncts(spec.mask))
  if others := [type(mask).__name__ for mask in masks if type(mask) not in (Causal, Window)]:
    return f"masks by Causal, Window and lengths of rows alone, got {', '.join(others)}"
  windows = [mask for mask in masks if isinstance(mask, Window)]
  causal = len(windows) < len(masks) or any(window.after == 0 for window in windows)
  if windows and not causal:
    return f"has windows that end at the query, got after={windows[0].after}: use Causal() with it"
  positions = [q_tokens.position, k_tokens.position]
  if any(isinstance(x, jax.core.Tracer) for x in positions):
    return "plans before anything runs, got traced positions: close over tokens that are known"
  at = [np.asarray(x) for x in positions]
  ends = [(x >= 0).sum(-1) for x in at]
  places = [np.arange(x.shape[1]) for x in at]
  if any(((x >= 0) != (t < n[:, None])).any() for x, t, n in zip(at, places, ends, strict=True)):
    return "wants tokens that do not exist at the ends of rows, got some between others"
  if min(n.min() for n in ends) < 1:
    return "wants a query and a key in every row, got a row of padding"
  away = lambda x, t: np.where(x < 0, 0, x - t - at[0][:, :1])
  if causal and any(away(x, t).any() for x, t in zip(at, places, strict=True)):
    return "masks by places in arrays, got other positions: let queries and keys begin at one"
  within = min((window.before + 1 for window in windows), default=T)
  padded = any(n.min() < len(t) for n, t in zip(ends, places, strict=True))
  window = within if within < T else None
  asked = Asked(float(spec.factor(H)), causal, window, ends[0], ends[1], padded)
  if window is not None and T > S:
    return f"has windows for no more queries than keys, got T={T} and S={S}"
  if ((asked.count(T) == 0) & (places[0] < ends[0][:, None])).any():
    return f"wants a key for each query, got a window of {within} beyond the last key"
  return asked


def conjuncts(mask: Mask) -> Iterator[Mask]:
  """The masks that must all hold, without those that always do."""
  if type(mask) is And:
    yield from conjuncts(mask.left)
    yield from conjuncts(mask.right)
  elif type(mask) is not Everything:
    yield mask
