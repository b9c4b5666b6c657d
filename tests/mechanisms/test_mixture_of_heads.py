"""MoH: which heads are on, what they weigh, and what the router is told."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.combiners.mixture_of_heads import MixtureOfHeads

B, T, N, V, D = 2, 9, 6, 3, 8
RNG = np.random.default_rng(0)
HEADS, X = RNG.normal(size=(B, T, N, V)), RNG.normal(size=(B, T, D))
SPLITS = [(2, 2), (1, 3), (0, 2), (3, 0), (6, 0), (2, 4)]


def make(shared, active, zero=False):
  moh = MixtureOfHeads(D, N, shared=shared, active=active, rngs=nnx.Rngs(0))
  if zero:
    for router in (moh.route, moh.share, moh.between):
      if router is not None:
        router.kernel.set_value(jnp.zeros_like(router.kernel[...]))
  return moh


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def naive(moh, x):
  """The paper's gates of one token, head by head."""
  logits = lambda router: x @ np.asarray(router.kernel[...], float)
  g = np.zeros(N)
  g[: moh.shared] = 1 if moh.share is None else moh.shared * softmax(logits(moh.share))
  if moh.active:
    e = softmax(logits(moh.route))
    best = np.argsort(-e)[: moh.active]
    g[moh.shared + best] = moh.active * e[best] / e[best].sum()
  if moh.shared and moh.active:
    a = 2 * softmax(logits(moh.between))
    g[: moh.shared], g[moh.shared :] = a[0] * g[: moh.shared], a[1] * g[moh.shared :]
  return g


@pytest.mark.parametrize("shared, active", SPLITS)
def test_gates_are_the_formula_and_as_many_are_on_as_were_asked_for(shared, active):
  with jax.enable_x64(True):
    moh = make(shared, active)
    gates = moh.gates(jnp.asarray(X))
    expected = [[naive(moh, x) for x in row] for row in X]
    np.testing.assert_allclose(gates, expected, rtol=1e-6, atol=1e-12)
    assert ((np.asarray(gates) != 0).sum(-1) == shared + active).all()
    out = moh(jnp.asarray(HEADS), jnp.asarray(X))
    np.testing.assert_allclose(out, HEADS * np.asarray(expected)[..., None], rtol=1e-6, atol=1e-12)


def test_uniform_routers_that_select_everything_are_plain_attention():
  heads = jnp.asarray(HEADS, jnp.float32)
  out = make(2, 4, zero=True)(heads, jnp.asarray(X, jnp.float32))
  np.testing.assert_allclose(out, heads, rtol=1e-6)


def test_ties_still_select_exactly_k():
  gates = make(2, 3, zero=True).gates(jnp.asarray(X, jnp.float32))
  assert ((np.asarray(gates) != 0).sum(-1) == 5).all()


def test_the_router_hears_of_selected_heads_only_and_of_all_through_the_loss():
  moh, x = make(2, 2), jnp.asarray(X[:1, :1], jnp.float32)
  graph, params = nnx.split(moh)
  heads = jnp.asarray(HEADS[:1, :1], jnp.float32)
  off = np.asarray(moh.gates(x))[0, 0, 2:] == 0
  through_heads = jax.grad(lambda p: (nnx.merge(graph, p)(heads, x) ** 2).sum())(params)
  through_loss = jax.grad(lambda p: nnx.merge(graph, p).balance_loss(x))(params)
  columns = lambda g: np.abs(g["route"]["kernel"][...]).max(0)
  assert (columns(through_heads)[off] == 0).all() and (columns(through_heads)[~off] > 0).all()
  assert (columns(through_loss) > 0).all()


def test_the_balance_loss_is_k_in_perfect_balance_and_the_formula_elsewhere():
  moh, x = make(2, 2), jnp.asarray(X, jnp.float32)
  e = softmax(X.reshape(-1, D) @ np.asarray(moh.route.kernel[...], float))
  chosen = np.argsort(-e, -1)[:, :2]
  f = np.bincount(chosen.ravel(), minlength=4) / len(e)
  np.testing.assert_allclose(moh.balance_loss(x), 4 * (e.mean(0) * f).sum(), rtol=1e-5)
  moh.route.kernel.set_value(jnp.concatenate([jnp.eye(4), jnp.zeros((4, 4))]))
  everyone = jnp.asarray(np.eye(D)[None, [0, 1, 2, 3]] + np.eye(D)[None, [1, 2, 3, 0]], jnp.float32)
  np.testing.assert_allclose(moh.balance_loss(everyone), 2.0, rtol=1e-6)


@pytest.mark.parametrize("shared, active", [(7, 0), (2, 5), (0, 0), (-1, 2)])
def test_heads_that_do_not_add_up_are_refused(shared, active):
  with pytest.raises(ValueError, match=f"shared={shared} and active={active} do not choose"):
    make(shared, active)
