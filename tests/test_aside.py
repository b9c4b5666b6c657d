"""What training does beside the gradient: losses that modules add, averages that move."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.nn.aside import Average, Loss, aside, learns_aside, moved, with_asides
from attnx.training import loop, plan as plans
from attnx.training.config import Mistake
from attnx.training.step import Evaluation, learning, nats, updater
from runs import TINY

VQ = dict(name="transformer_vq", num_heads=2, head_dim=4, num_codes=5, block=4, commitment=0.5)
ROUTED = dict(name="mixture_of_heads", shared=0, active=1, balance=0.25)
MOH = dict(name="attention", num_heads=2, combiner=ROUTED)
MODEL = dict(name="decoder_lm", vocab=8, dim=16, depth=2, mixers=(VQ, MOH))
CONFIG = TINY | dict(model=MODEL, steps=3, data=dict(TINY["data"], batch=32))
CLOSE = dict(rtol=2e-5, atol=1e-6)


def after_one_step(**changes):
  """Plan, batch, state before, state after and metrics of the first step."""
  plan = plans.make(CONFIG | changes)
  batch = jax.tree.map(jnp.asarray, next(plan.batches("train")))
  before = jax.device_get(plan.init())
  state, metrics = updater(plan)(plan.init(), batch)
  return plan, batch, before, jax.device_get(state), metrics


def test_a_step_adds_the_losses_of_modules_and_moves_their_averages():
  plan, batch, before, after, metrics = after_one_step()
  model = plan.model(before["params"], before["rest"])
  inputs = {}  # of the two mixers, which are where their losses are made of
  for i, block in enumerate(model.stack.blocks):
    block.mixer = nnx.data(Spy(block.mixer, inputs, i))
  logits = model(batch["inputs"])
  vq, combiner = (block.mixer.inner for block in model.stack.blocks)
  there = jnp.ones(batch["inputs"].shape, bool)
  keys = vq.keys(inputs[0])
  loss = nats(logits, batch) / batch["weights"].sum()
  loss += 0.5 * vq.codebook.commitment(keys, there)
  loss += 0.25 * combiner.combiner.balance_loss(inputs[1])
  np.testing.assert_allclose(metrics["loss"], loss, **CLOSE)
  sums = vq.codebook.of(keys, there)
  new = plan.model(after["params"], after["rest"]).stack.blocks[0].mixer.codebook
  np.testing.assert_allclose(new.sum, 0.99 * vq.codebook.sum + 0.01 * sums.sum, **CLOSE)
  np.testing.assert_allclose(new.count, 0.99 * vq.codebook.count + 0.01 * sums.count, **CLOSE)


class Spy(nnx.Module):
  """Writes down what a mixer is given."""

  def __init__(self, inner, inputs, i):
    self.inner, self.seen = inner, nnx.static(lambda x: inputs.setdefault(i, x))

  def __call__(self, x, **options):
    self.seen(x)
    return self.inner(x, **options)


def test_losses_have_gradients_and_a_batch_in_parts_moves_averages_alike():
  plan, batch, before, after, _ = after_one_step(model=dict(MODEL, depth=1))
  *_, parts, _ = after_one_step(model=dict(MODEL, depth=1), accumulate=4)
  for a, b in zip(jax.tree.leaves(after["rest"]), jax.tree.leaves(parts["rest"]), strict=True):
    np.testing.assert_allclose(b, a, **CLOSE)
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after["rest"], before["rest"]))))
  added = lambda params: learning(plan.model(params, before["rest"]), batch)[1]
  slopes = jax.grad(added)(before["params"])["stack"]["blocks"][0]["mixer"]
  assert np.abs(slopes["key"]["kernel"][...]).max() > 1e-6
  assert (slopes["value"]["kernel"][...] == 0).all()


def test_a_run_trains_the_codebook_and_evaluates_without_what_is_added(tmp_path):
  model = loop.train(CONFIG, tmp_path)
  assert (model.stack.blocks[0].mixer.code_count[...] != 1).all()
  plan = plans.make(CONFIG)
  _, params, rest = nnx.split(model, nnx.Param, ...)
  found = Evaluation(plan)(dict(params=params, rest=rest), "eval", whole=True)
  sums = [(nats(model(b["inputs"]), b), b["weights"].sum()) for b in plan.batches("eval")]
  np.testing.assert_allclose(found["loss"], np.divide(*np.sum(sums, 0)), rtol=1e-5)


@pytest.mark.parametrize("how", [dict(scan=True), dict(remat="nothing")], ids=str)
def test_a_stack_that_would_lose_them_is_refused_before_the_run(how):
  with pytest.raises(Mistake, match="config.model: a block here learns aside.*remat=None"):
    plans.make(CONFIG | dict(model=dict(MODEL, **how)))


def test_a_model_without_any_is_called_as_it_is():
  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  assert not learns_aside(model) and learns_aside(Counter())
  output, loss, sums = with_asides(lambda m: m is model, model)
  assert output and loss == 0 and not sums


class Counter(nnx.Module):
  """Sows 1 and 2, and a loss of 3 at each call."""

  learns_aside = True

  def __init__(self):
    self.mean = Average(jnp.array([10.0, 0]))

  def __call__(self):
    aside(self, Loss, "loss", jnp.asarray(3.0))
    aside(self, Average, "mean", jnp.array([1.0, 2]))


def test_of_several_calls_the_sums_count():
  model = Counter()
  _, loss, sums = with_asides(lambda m: (m(), m()), model)
  assert loss == 6
  after = moved(nnx.state(model), sums)
  np.testing.assert_allclose(after["mean"][...], [0.99 * 10 + 0.01 * 2, 0.04], rtol=1e-6)
  np.testing.assert_array_equal(model.mean[...], [10, 0])  # the model is left as it is
