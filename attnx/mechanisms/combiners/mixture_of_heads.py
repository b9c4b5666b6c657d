"""Mixture-of-head attention: a router chooses the heads that a token listens to."""

from __future__ import annotations

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from attnx.core.registry import Entry
from attnx.core.tokens import Tokens
from attnx.nn.aside import Loss, aside
from attnx.nn.combiner import Combiner, fits


class MixtureOfHeads(Combiner):
  """heads_n * g_n(x): the first n_s heads are always on, of the other n_r the k best are.

    shared:  g_s = a_1 n_s softmax(x W_1)_s
    routed:  g_r = a_2 k e_r / sum_{selected} e where r is selected, else 0; e = softmax(x W_g)
    between: a = 2 softmax(x W_0)

  Factors of what is alone are 1: a single shared head has no W_1, and W_0 exists where both kinds
  do. With zero weights, which choose the first k, and k = n_r, every gate is 1. Gates are float32
  and exactly n_s + k of them are not zero. (B, T, N, V) to the same shape and dtype. All heads are
  computed; the router without parameters, for models that were trained without one, is left out.
  arXiv:2410.11842.

  Args:
    dim: D.
    num_heads: N = n_s + n_r.
    shared: n_s.
    active: k, how many routed heads a token listens to.
    balance: factor of the balance loss that training adds for this layer. The paper's 0.01 is of
      the mean over layers: 0.01 / depth.
    rngs: initialises the routers.

  Raises:
    ValueError: `shared` and `active` do not fit N, no head is on, or heads or `x` have another
      shape.
  """

  learns_aside = True

  def __init__(
    self,
    dim: int,
    num_heads: int,
    *,
    shared: int,
    active: int,
    balance: float = 0.01,
    rngs: nnx.Rngs,
  ):
    routed = num_heads - shared
    if not (0 <= shared <= num_heads and 0 <= active <= routed and shared + active):
      raise ValueError(f"shared={shared} and active={active} do not choose some of {num_heads}")
    self.dim, self.shared, self.routed, self.active = dim, shared, routed, active
    self.balance = balance
    router = lambda width: nnx.Linear(dim, width, use_bias=False, rngs=rngs)
    self.route: Any = router(routed) if active else None
    self.share = router(shared) if shared > 1 else None
    self.between = router(2) if shared and active else None

  def __call__(self, heads, x):
    fits(heads, x, self.shared + self.routed, self.dim)
    return (heads * self.gates(x)[..., None]).astype(heads.dtype)

  def gates(self, x: jax.Array) -> jax.Array:
    """The factor of every head for every token, (B, T, D) to (B, T, N)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    shared = jnp.ones((*x.shape[:2], self.shared), x.dtype)
    if self.share is not None:
      shared = self.shared * jax.nn.softmax(self.share(x))
    routed = jnp.zeros((*x.shape[:2], self.routed), x.dtype)
    if self.route is not None:
      logits, selected = self._selected(x)
      routed = self.active * jax.nn.softmax(logits, where=selected)
    if self.between is not None:
      a = 2 * jax.nn.softmax(self.between(x))
      shared, routed = a[..., :1] * shared, a[..., 1:] * routed
    return jnp.concatenate([shared, routed], axis=-1)

  def aside(self, x, tokens):
    aside(self, Loss, "balance", self.balance * self.balance_loss(x, tokens=tokens))

  def balance_loss(self, x: jax.Array, *, tokens: Tokens | None = None) -> jax.Array:
    """n_r sum_r P_r f_r: P_r is the mean of e_r over tokens, f_r the share that selected r.

    Equals k where every routed head is selected and weighed alike; 0 without routed heads.
    x (B, T, D), to a scalar.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if self.route is None:
      return jnp.zeros((), x.dtype)
    logits, selected = self._selected(x)
    there = jnp.ones((1, 1)) if tokens is None else jnp.asarray(tokens.position >= 0)
    there = jnp.broadcast_to(there, x.shape[:2])[..., None].astype(x.dtype)
    mean = lambda y: (y * there).sum((0, 1)) / jnp.maximum(there.sum(), 1)
    return self.routed * jnp.sum(mean(jax.nn.softmax(logits)) * mean(selected.astype(x.dtype)))

  def _selected(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of the routed heads and which k of them are on, (B, T, n_r) each."""
    logits = self.route(x)
    _, best = jax.lax.top_k(logits, self.active)  # exactly k, also among equals
    return logits, jax.nn.one_hot(best, self.routed, dtype=bool).any(-2)


ENTRY = Entry(
  make=MixtureOfHeads,
  paper="arXiv:2410.11842",
  facts={"balanced"},
  tiny=dict(shared=1, active=2),
)
