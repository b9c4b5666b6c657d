"""The loop: what it computes, how it goes on, what it leaves behind."""

import json
import math
import pathlib
import resource
import struct
import subprocess
import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto import event_pb2

from attnx import data
from attnx.core.tokens import Tokens
from attnx.training import loop, optimizer, plan as plans, report
from attnx.training.config import Mistake, Stopped
from attnx.training.step import Evaluation
from attnx.training.watch import Watch
from runs import TINY, config_file, main

ROOT = pathlib.Path(__file__).parent.parent
MIXERS = [
  dict(name="retention", num_heads=4),
  dict(name="attention", num_heads=4, position="rope", mask=dict(name="sliding_window", window=5)),
]
HYBRID = dict(name="decoder_lm", vocab=8, dim=64, depth=2, mixers=MIXERS)
DATA = dict(name="copying", batch=32, length=6, vocab=8, shortest=3, eval_examples=40)
CONFIG = TINY | dict(model=HYBRID, data=DATA, steps=5, checkpoint=dict(every=100))
CLOSE = dict(rtol=2e-5, atol=2e-6)


def rows(workdir: pathlib.Path) -> list[dict]:
  return list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


def losses(workdir: pathlib.Path) -> list[float]:
  return [row["loss"] for row in rows(workdir) if "loss" in row]


def leaves(model: nnx.Module) -> list[np.ndarray]:
  return jax.device_get(jax.tree.leaves(nnx.state(model, nnx.Param)))


def trained(workdir: pathlib.Path, **changes):
  """The model and the losses of a run of CONFIG with changes."""
  return loop.train(CONFIG | changes, workdir), losses(workdir)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """A run of CONFIG, data parallel over eight devices: workdir, model and losses."""
  workdir = tmp_path_factory.mktemp("plain") / "run"
  return workdir, *trained(workdir)


def test_a_run_is_a_few_lines_on_one_device(plain):
  """Forward pass, loss, gradient and update written out, without any of the loop."""
  tx, _ = optimizer.make(**CONFIG["optimizer"], steps=CONFIG["steps"])
  state = plans.initial(HYBRID, tx, 0)
  graph = plans.make(CONFIG).graph

  @jax.jit
  def update(params, opt, batch):
    def loss(params):
      index = np.arange(batch["inputs"].shape[1], dtype=np.int32)[None]
      tokens = Tokens(index, batch["positions"], batch["segments"])
      logits = nnx.merge(graph, params, state["rest"])(batch["inputs"], tokens=tokens)
      picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)
      return -(picked[..., 0] * batch["weights"]).sum() / batch["weights"].sum()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt = tx.update(grads, opt, params)
    return value, optax.apply_updates(params, updates), opt

  params, opt, expected = state["params"], state["optimizer"], []
  for _, batch in zip(range(5), data.batches(DATA, split="train", seed=0)):
    value, params, opt = update(params, opt, batch)
    expected.append(float(value))
  _, model, found = plain
  np.testing.assert_allclose(found, expected, **CLOSE)
  for a, b in zip(leaves(model), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(data=4, fsdp=2)], ids=str)
def test_parameters_spread_over_devices_give_the_same_losses(plain, tmp_path, mesh):
  spread = plans.make(CONFIG | dict(mesh=mesh)).state["params"]
  assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread)) >= 8
  np.testing.assert_allclose(trained(tmp_path, mesh=mesh)[1], plain[2], **CLOSE)


def test_a_batch_in_parts_gives_the_same_losses(plain, tmp_path):
  np.testing.assert_allclose(trained(tmp_path, accumulate=4)[1], plain[2], **CLOSE)


def test_rematerialised_and_scanned_blocks_train_alike(tmp_path):
  # Scanned parameters are drawn otherwise, so that each is compared with what it does not change.
  model = dict(HYBRID, scan=True)
  _, scanned = trained(tmp_path / "scanned", model=model)
  _, remat = trained(tmp_path / "remat", model=dict(model, remat="nothing"))
  np.testing.assert_allclose(remat, scanned, **CLOSE)
  assert (tmp_path / "scanned" / "maps.png").exists()


def test_a_run_that_stops_goes_on_bit_for_bit(tmp_path):
  config = CONFIG | dict(
    model=dict(HYBRID, dropout=0.2), steps=9, eval=dict(every=2, batches=1), accumulate=2
  )
  whole = loop.train(config, tmp_path / "whole")
  asked = iter([None, None, None, "SIGTERM"])
  with pytest.raises(Stopped, match="stopped by SIGTERM at step 4, which is saved") as stopped:
    loop.train(config, tmp_path / "cut", interrupted=lambda: next(asked))
  assert stopped.value.code == 0
  found = loop.train(config, tmp_path / "cut")
  for a, b in zip(leaves(found), leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)
  timed = ("seconds", "mfu", "tokens_per_second")
  steady = lambda row: {k: v for k, v in row.items() if k not in timed}
  assert list(map(steady, rows(tmp_path / "cut"))) == list(map(steady, rows(tmp_path / "whole")))


def test_a_finished_run_goes_on_with_more_steps(plain, tmp_path):
  _, ended = trained(tmp_path, optimizer=dict(peak=1e-2, schedule="constant"))
  _, found = trained(tmp_path, optimizer=dict(peak=1e-2, schedule="constant"), steps=8)
  _, whole = trained(tmp_path / "whole", optimizer=dict(peak=1e-2, schedule="constant"), steps=8)
  assert found[:5] == ended and found == whole
  with pytest.raises(Mistake, match="the run is at step 8 already"):
    trained(tmp_path)


def test_bfloat16_trains_float32_parameters(plain, tmp_path):
  model = dict(HYBRID, vocabulary=dict(dtype="bfloat16"))
  model, found = trained(tmp_path, steps=80, model=model)
  assert {x.dtype for x in leaves(model)} == {np.dtype("float32")}
  assert 0 < abs(found[0] - plain[2][0]) < 0.02 * found[0]  # other numbers, hardly
  assert np.mean(found[-5:]) < 0.5 * found[0]


def test_metrics_are_the_means_since_the_last_row(plain, tmp_path):
  trained(tmp_path, steps=5, log=dict(every=2, tensorboard=False))
  found = rows(tmp_path)
  assert [row["step"] for row in found] == [2, 4, 5, 5]
  expected = [np.mean(plain[2][:2]), np.mean(plain[2][2:4]), plain[2][4]]
  np.testing.assert_allclose([row["loss"] for row in found[:3]], expected, rtol=1e-6)
  keys = {"step", "seconds", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"}
  assert all(row.keys() == keys for row in found[:3])
  assert found[3].keys() == {"step", "seconds", "eval_loss", "eval_accuracy", "eval_scored"}
  assert found[1]["tokens_per_second"] > 0 and found[1]["mfu"] > 0
  assert [row["learning_rate"] for row in found[:1]] == pytest.approx([5e-3])  # of step 2 of 2


def test_evaluation_is_the_same_in_any_batches(plain):
  _, model, _ = plain
  results = []
  for batch in (8, 24):  # 40 rows: whole batches, and a last one of which a third is empty
    plan = plans.make(CONFIG | dict(data=dict(DATA, batch=batch)))
    _, params, rest = nnx.split(jax.device_put(model, jax.devices()[0]), nnx.Param, ...)
    places = jax.tree.map(lambda x: x.sharding, plan.state["params"])
    state = dict(plan.init(), params=jax.device_put(params, places), rest=rest)
    results.append(Evaluation(plan)(state, "eval"))
  assert results[0] == pytest.approx(results[1], rel=1e-5)
  row = rows(plain[0])[-1]
  assert results[0] == pytest.approx({k: row[f"eval_{k}"] for k in results[0]}, rel=1e-5)


def records(path: pathlib.Path) -> list[event_pb2.Event]:
  """The events of a file of length-prefixed records."""
  content, found = path.read_bytes(), []
  while content:
    (size,) = struct.unpack("<Q", content[:8])
    found.append(event_pb2.Event.FromString(content[12 : 12 + size]))
    content = content[16 + size :]
  return found


def test_tensorboard_has_what_metrics_have(tmp_path):
  trained(tmp_path, log=dict(every=1, tensorboard=True))
  (file,) = (tmp_path / "tensorboard").iterdir()
  values = [(e.step, v.tag, v.simple_value) for e in records(file) for v in e.summary.value]
  expected = [
    (row["step"], name, np.float32(x))
    for row in rows(tmp_path) for name, x in row.items() if name != "step" and x is not None
  ]  # fmt: skip
  assert values == expected


def test_a_terminal_has_a_bar_and_a_file_has_lines(tmp_path, capsys, monkeypatch):
  loop.train(CONFIG)
  told = capsys.readouterr().out
  assert "step 3/5  loss " in told and " tokens/s  MFU " in told and "  ETA 0:" in told
  assert "\x1b" not in told
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("COLUMNS", "120")
  loop.train(CONFIG)
  told = capsys.readouterr().out
  assert "\x1b[" in told and "5/5" in told and "left" in told and "step 3/5  loss" not in told


def test_a_profile_is_of_ten_steps(tmp_path):
  with pytest.raises(Mistake, match="workdir"):
    loop.train(TINY, profile=True)
  loop.train(TINY, tmp_path, profile=True)  # twelve steps, of which two are traced
  assert list(tmp_path.glob("profile/**/*.xplane.pb"))


def test_help_is_quick_and_starts_nothing():
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  run = [sys.executable, "-X", "importtime", "-m", "attnx.train", "--help"]
  done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4
  assert "--config FILE" in done.stdout and "--profile" in done.stdout
  assert "jax" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("arguments, told", [
  (["--config.modle.dim=3"], "config has no 'modle'; did you mean 'model'?"),
  (["--config.data.batch=12"], "data.batch=12 must be a multiple of 8 devices"),
  (["--config.model.vocab=9"], "the model's outputs are (8, 12, 9), and the data want (8, 12, 8)"),
  (["--config.optimizer.warmup=99"], "optimizer.warmup=99 must be in 0 .. steps=12"),
  (["--config.accumulate=0"], "config.steps and config.accumulate must be at least 1"),
  (["--config.eval.every=0"], "eval.every=0 and eval.batches=None must be at least 1"),
])  # fmt: skip
def test_mistakes_are_told_in_a_sentence(tmp_path, capsys, arguments, told):
  assert main(config_file(tmp_path), *arguments) == 2
  error = capsys.readouterr().err
  assert told in error and error.startswith("attnx.train: ") and error.count("\n") == 1


def test_a_workdir_says_what_ran_where(plain):
  workdir, _, _ = plain
  config = json.loads((workdir / "config.json").read_text())
  assert config["model"]["dim"] == 64 and config["accumulate"] == 1
  environment = json.loads((workdir / "environment.json").read_text())
  assert len(environment["devices"]) == 8 and environment["jax"] == jax.__version__
  told = (workdir / "explain.txt").read_text()
  assert "B=32 T=12 S=12 N=4 K=4 H=16 V=16 float32" in told and "Window(before=4" in told
  assert "chunked         runs" in told
  assert "accuracy" in (workdir / "report.txt").read_text()
  for name in ("loss.png", "maps.png"):
    assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_a_model_without_attention_says_so(tmp_path):
  trained(tmp_path, model=dict(HYBRID, mixers=MIXERS[:1]))
  assert (tmp_path / "explain.txt").read_text() == "This model makes no call of attention.\n"


def test_baselines_are_entropy_and_xz(monkeypatch):
  text = dict(train=b"abracadabra " * 500, eval=b"abracadabra " * 50 + bytes(range(64)))
  ids = np.frombuffer(text["eval"], np.uint8).astype(int)[None]
  batch = dict(targets=ids, weights=np.ones(ids.shape))
  monkeypatch.setattr(report.data, "batches", lambda config, split, seed: iter([batch, batch]))
  about = data.Description(kind="tokens", vocab=256, raw=text.__getitem__)
  found = report.baselines(types.SimpleNamespace(config=dict(data={}), about=about), "eval")
  p = np.bincount(ids[0]) / ids.size
  entropy, hits = found["order-0 entropy"]
  assert entropy == pytest.approx(-sum(x * math.log(x) for x in p if x)) and hits == p.max()
  size = ids.size / 8 / math.log(2)
  names = ("xz -9 alone", "xz -9 after the training bytes")
  alone, after = (found[name][0] * size for name in names)
  assert 63.9 < after < alone < 64 + 100  # what is new, then also the word, and what frames them


def text_plan(**changes) -> plans.Plan:
  model = dict(HYBRID, vocab=256, dim=32, **changes)
  return plans.make(CONFIG | dict(model=model, data=dict(name="stdlib_bytes", batch=8, length=32)))


def test_a_sample_goes_on_from_a_held_out_beginning():
  plan = text_plan()
  state = plan.init()
  row = report.first_row(plan, "eval")
  told = report.sample(plan, plan.model(state["params"], state["rest"]), row)
  begun = plan.about.raw("eval")[1:4].decode()
  assert told.split("\n", 1)[1].startswith(f"{begun}▶") and "\x1b" not in told
  shuffled = dict(row, targets=row["targets"][:, ::-1])
  assert report.sample(plan, None, shuffled) is None


def test_what_does_not_stream_gives_no_sample_and_the_reason():
  plan = text_plan(mixers=[dict(name="fftnet", num_heads=4, length=32)])
  state = plan.init()
  model, row = plan.model(state["params"], state["rest"]), report.first_row(plan, "eval")
  assert report.sample(plan, model, row).startswith("no sample: ")


def test_images_are_reported_by_accuracy(tmp_path):
  model = dict(name="vit", classes=10, image=(8, 8, 1), patch=4, dim=16, depth=1)
  mixers = [dict(name="attention", num_heads=2, mask="everything")]
  changes = dict(model=model | dict(mixers=mixers), data=dict(name="digits", batch=64))
  loop.train(TINY | changes, tmp_path)
  told = (tmp_path / "report.txt").read_text()
  assert "eval, 355 scored images, nats per scored image:" in told and "accuracy" in told
  assert (tmp_path / "maps.png").exists() and "sample" not in told


def test_rates_leave_compiling_and_evaluation_out(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr("attnx.training.watch.devices.peak", lambda: 1e9)
  monkeypatch.setattr("attnx.training.watch.time.perf_counter", lambda: clock[0])
  shown = []
  console = types.SimpleNamespace(
    tick=lambda step: None, record=lambda row: None, say=lambda text: None,
    show=lambda row, left: shown.append((row["tokens_per_second"], left)),
  )  # fmt: skip
  plan = plans.make(CONFIG)
  watch = Watch(plan, console, None, 0, 0.0)
  metrics = dict.fromkeys(("loss", "grad_norm", "learning_rate"), 1.0)
  for step, seconds in enumerate((100, 1, 1, 1, 1), 1):  # compiles at 1, evaluates before 4
    if step == 4:
      clock[0] += 49
      watch.show_evaluation("eval", dict(loss=1.0, accuracy=0.0))
    watch.add(step, metrics)
    clock[0] += seconds
    if step in (3, 5):
      watch.show()
  per_step = plan.per_step
  assert shown == [(per_step, 2.0), (per_step, 0.0)]
