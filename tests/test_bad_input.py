"""Whatever a user gets wrong is told in one sentence of a stated kind; XLA never has to."""

import importlib
import pathlib
import traceback
import warnings

from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import pytest

from attnx import data as datasets
from attnx import models, train
from attnx.attention import dot_product_attention
from attnx.attention.api import UnsupportedError, attend
from attnx.attention.masks import Causal
from attnx.attention.spec import AttentionSpec
from attnx.core import registry
from attnx.core.tokens import Tokens
from attnx.data.sources.copying import Copying
from attnx.models import decoder_lm
from attnx.sharded import rules
from attnx.training import config as configs
from attnx.training import devices, optimizer, plan, step
from attnx.training.checkpoint import Checkpoints
from attnx.training.console import Console
from runs import TINY, config_file, main
from test_registry import INTERFACES

SOURCE = str(pathlib.Path(registry.__file__).parent.parent)
STATED = (ValueError, TypeError, KeyError, NotImplementedError)  # of which UnsupportedError is one
POLICY = hypothesis.settings(
  derandomize=True, max_examples=80, deadline=None, database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
  phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # a failure is small enough
)  # fmt: skip
JUNK = st.sampled_from(
  [None, -1, 0, 3, 1.5, float("nan"), "x", "", (), [1], {}, {"name": "x"}, {"name": 3}, True, b"x"]
)


def refused(call, *, ours: bool = True):
  """What `call` returns, or None after an error that is as it should be.

  `ours` wants the error to be raised in attnx itself, i.e. before JAX or NumPy found it.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      return call()
  except STATED as error:
    message = configs.sentence(error)
    assert message and str(error).strip(), error
    assert isinstance(error, UnsupportedError) or "\n" not in str(error), error
    if ours:
      where = traceback.extract_tb(error.__traceback__)[-1].filename
      assert where.startswith(SOURCE), f"{where} had to find it: {message}"
    return None


# Attention.

SIZES = st.sampled_from([0, 1, 2, 3, 4])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "int32", "bool", "complex64", "uint32"])
FEW = st.integers(0, 29).map(lambda n: n == 0)  # one in thirty is wrong


@st.composite
def arrays(draw, right: tuple[int, ...], dtype: str = "float32"):
  """An array, seldom of another shape or dtype than the right ones, or no array at all."""
  if draw(FEW):
    return draw(st.sampled_from([None, "x", 3, 1.5, [[1.0]], (), object()]))
  shape = tuple(draw(SIZES) if draw(FEW) else n for n in right)
  shape = shape[1:] if draw(FEW) else shape + (1,) if draw(FEW) else shape
  return jnp.zeros(shape, draw(DTYPES) if draw(FEW) else dtype)


@st.composite
def tokens(draw, length: int):
  if draw(st.booleans()):
    return None
  if draw(FEW):
    return draw(JUNK)
  rows, more = draw(st.sampled_from([1, 2, 2, 3])), draw(st.integers(-1, 1)) * draw(FEW)
  where = jnp.zeros((rows, length + more), jnp.int32)
  return Tokens(where, where, where)


def shape_of(call) -> tuple[int, ...]:
  """The shape of the result, found without computing it."""
  return jax.eval_shape(call).shape


@POLICY
@hypothesis.given(st.data())
def test_attend_takes_its_arguments_or_says_what_is_wrong(data):
  q, k, v = (data.draw(arrays(shape)) for shape in ((2, 4, 4, 3), (2, 3, 2, 3), (2, 3, 2, 4)))
  spec = AttentionSpec(mask=Causal())
  if data.draw(FEW):
    spec = data.draw(JUNK)
  options = dict(q_tokens=data.draw(tokens(4)), k_tokens=data.draw(tokens(3)))
  name = data.draw(st.sampled_from(["auto", "auto", "reference", "chunked", "flash?"]) | JUNK)
  call = lambda: shape_of(lambda: attend(q, k, v, spec, **options, implementation=name))
  if (shape := refused(call)) is not None:
    assert shape == (*q.shape[:3], v.shape[-1])


@POLICY
@hypothesis.given(st.data())
def test_dot_product_attention_takes_its_arguments_or_says_what_is_wrong(data):
  q, k, v = (data.draw(arrays(shape)) for shape in ((2, 4, 4, 3), (2, 3, 2, 3), (2, 3, 2, 4)))
  seldom = lambda right, *wrong: st.sampled_from(wrong if data.draw(FEW) else right)
  lengths = st.none() | arrays((2,), "int32")
  options = dict(
    bias=data.draw(st.none() | arrays((2, 4, 4, 3)) | arrays((4, 1, 3))),
    mask=data.draw(st.none() | arrays((2, 4, 4, 3), "bool") | arrays((4, 3), "bool")),
    query_seq_lengths=data.draw(lengths),
    key_value_seq_lengths=data.draw(lengths),
    local_window_size=data.draw(seldom([None, 2, (1, 0)], -1, (1,), "x", 1.5, (1, "x"), [])),
    implementation=data.draw(seldom([None, "xla", "reference"], "cudnn", 3, b"x")),
    scale=data.draw(seldom([None, 0.5, 2], "x", [1.0], {})),
    dropout_rate=data.draw(seldom([0.0], 0.5, 1.5, -1.0, "x", None)),
    precision=data.draw(seldom([None], "highest")),
  )
  call = lambda: shape_of(lambda: dot_product_attention(q, k, v, **options))
  if (shape := refused(call)) is not None:
    assert shape == (*q.shape[:3], v.shape[-1])


# What is built by name.

SURROUNDINGS = dict(dim=16, num_heads=4, num_kv_heads=2, head_dim=8, length=8)


@pytest.mark.parametrize("interface", INTERFACES)
@hypothesis.settings(POLICY, max_examples=60)
@hypothesis.given(st.data())
def test_entries_are_built_or_say_what_is_wrong(interface, data):
  name = data.draw(st.sampled_from(registry.names(interface)))
  entry = registry.get(interface, name)
  config = {"name": name, **entry.tiny}
  known = [key for key in registry.arguments(entry.make) if key != "rngs"]
  for _ in range(data.draw(st.integers(1, 2))):
    config[data.draw(st.sampled_from([*known, "nonsense"]))] = data.draw(JUNK)
  build = lambda: registry.build(interface, config, **SURROUNDINGS, rngs=nnx.Rngs(0))
  refused(lambda: nnx.eval_shape(build) if interface == "mixers" else build(), ours=False)


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("config, kind", [
  ("no such entry", KeyError), ({}, ValueError), ({"name": 3}, ValueError),
  ({"name": ""}, KeyError),
  ({"name": "../core/registry"}, KeyError), ({"name": "__init__"}, KeyError),
])  # fmt: skip
def test_names_that_are_none_are_refused(interface, config, kind):
  with pytest.raises(kind, match=interface) as error:
    registry.build(interface, config)
  assert "\n" not in configs.sentence(error.value)


IMAGE = dict(classes=10, image=(8, 8, 1), patch=4, dim=16, depth=1)
HEADS = [dict(name="attention", num_heads=2, mask="everything")]
WHOLE = {
  "decoder_lm": TINY["model"],
  "encoder_decoder": dict(
    vocab=8, dim=16, depth=1, encoder=HEADS, decoder=["attention"], cross="cross_attention"
  ),
  "vit": IMAGE | dict(mixers=HEADS),
}


def test_every_model_is_tried():
  assert sorted(WHOLE) == models.names()


@pytest.mark.parametrize("name", WHOLE)
@hypothesis.settings(POLICY, max_examples=40)
@hypothesis.given(st.data())
def test_models_are_built_or_say_what_is_wrong(name, data):
  make = importlib.import_module(f"attnx.models.{name}").Model
  known = [key for key in registry.arguments(make) if key != "rngs"]
  config = {"name": name, **WHOLE[name]}
  for _ in range(data.draw(st.integers(1, 2))):
    config[data.draw(st.sampled_from([*known, "name", "nonsense"]))] = data.draw(JUNK)
  build = lambda: nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
  refused(build, ours=False)


@pytest.mark.parametrize("name", [n for n in datasets.names() if n != "tfds"])
@hypothesis.settings(POLICY, max_examples=30)
@hypothesis.given(st.data())
def test_batches_come_or_say_what_is_wrong(name, data):
  make = importlib.import_module(f"{datasets.FOLDER}.{name}").DATASET
  known = [key for key in registry.arguments(make) if key != "data_dir"]
  config = {"name": name, "batch": 2}
  for _ in range(data.draw(st.integers(0, 2))):
    config[data.draw(st.sampled_from([*known, "batch", "name", "nonsense"]))] = data.draw(JUNK)
  options = dict(split="train", seed=0)
  if data.draw(FEW):
    options[data.draw(st.sampled_from(["split", "seed"]))] = data.draw(JUNK)
  refused(lambda: datasets.batches(config, **options), ours=False)


def test_data_that_are_not_there_say_so():
  for config, words in (
    (dict(name="nowhere", batch=1), "there is no dataset 'nowhere'"),
    (dict(name="tfds:no_such_dataset", batch=1), "TFDS has no dataset 'no_such_dataset'"),
    (dict(name="copying:more", batch=1), "takes nothing after a colon"),
    (dict(batch=1), "wants a name"),
  ):
    with pytest.raises((KeyError, ValueError), match=words):
      datasets.batches(config, split="train", seed=0)


# The command.


def told(capsys, code: int) -> str:
  """The sentence that the command ended with."""
  out, err = capsys.readouterr()
  assert code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n"), (code, out, err)
  assert err.startswith("attnx.train: ") and "Traceback" not in err
  return err.removeprefix("attnx.train: ")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """No measuring of the peak rate; nothing here trains."""
  monkeypatch.setattr(devices, "peak", lambda: None)


@pytest.mark.parametrize("text, words", [
  ("def get_config(:\n", "tiny.py, line 1: SyntaxError: invalid syntax"),
  ("\nx = 1 / 0\n", "tiny.py, line 2: ZeroDivisionError: division by zero"),
  ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
  ("import sys; sys.exit(0)", "line 1: SystemExit: 0"),
  ("def get_config():\n  raise RuntimeError('a\\nb')", "line 2: RuntimeError: a b"),
  ("def get_config():\n  return {}['steps']", "line 2: KeyError: steps"),
  ("def get_config():\n  import sys; sys.exit()", "line 2: SystemExit"),
  ("", "defines no function get_config"), ("get_config = 3", "defines no function get_config"),
  ("get_config = lambda: None", "gives None; expected a ConfigDict"),
  ("get_config = lambda: [1]", "gives [1]; expected a ConfigDict"),
  ("get_config = lambda: {}", "config needs 'steps'"),
  ("get_config = lambda: {1: 2}", "attnx.train"),
  ("get_config = lambda x: {}", "missing 1 required positional argument"),
  ("get_config = lambda: dict(steps=int)", "config.steps=<class 'int'> must be a number"),
  ("get_config = lambda: dict(model=dict(x=[b'']))", "config.model.x.0=b'' must be a number"),
  ("\0", "source code"),
])  # fmt: skip
def test_config_files_that_fail_say_where(tmp_path, capsys, text, words):
  assert words in "attnx.train: " + told(capsys, main(config_file(tmp_path, text)))


def test_a_config_file_that_is_not_there_or_has_no_such_variant(tmp_path, capsys):
  assert "there is no config file" in told(capsys, main(tmp_path / "nowhere.py"))
  assert "there is no config file" in told(capsys, main(tmp_path))
  file = config_file(tmp_path)
  assert "has no variant 'large'" in told(capsys, main(f"{file}:large"))


@pytest.mark.parametrize("arguments, words", [
  (["--worcdir=x"], "there is no flag --worcdir; did you mean 'workdir'?"),
  (["stray"], "what is 'stray'?"),
  (["--config.stepz=3"], "config takes no 'stepz'; did you mean 'steps'?"),
  (["--config.steps=many"], "steps"), (["--config.steps=1.5"], "steps"),
  (["--config.steps=0"], "must be at least 1"), (["--config.accumulate=3"], "accumulate=3"),
  (["--config.optimizer.peek=1"], "config.optimizer takes no 'peek'; did you mean 'peak'?"),
  (["--config.optimizer.peak=x"], "peak"), (["--config.optimizer.peak.x=1"], "nothing inside"),
  (["--config.nowhere.x=1"], "config has no 'nowhere'"),
  (["--config.data=3"], "data"), (["--config.data.name=copyng"], "did you mean 'copying'?"),
  (["--config.data.length=0"], "length=0 must be an integer of at least 1"),
  (["--config.data.batch=7"], "data.batch=7 must be a multiple of 8 devices"),
  (["--config.data.vocab=9"], "the model's outputs are (8, 12, 8), and the data want (8, 12, 9)"),
  (["--config.seed=-1"], "seed=-1"), (["--config.seed=4294967296"], "seed=4294967296"),
  (["--config.model.name=x"], "there is no model 'x'"), (["--config.model.dim=0"], "dim=0"),
  (["--config.model.dim=15"], "15"), (["--config.model.depth=0"], "depth=0"),
  (["--config.model.wiring=x"], "wiring"), (["--config.model.remat=x"], "remat"),
  (["--config.mesh.fsdp=3"], "must be the 8 devices there are"),
  (["--config.mesh.model=2"], "config.mesh takes no 'model'"),
  (["--config.sharding=x"], "config.sharding='x' must be Sequence"),
  (["--config.sharding=(1,)"], "a sharding rule is a pair"),
  (["--config.checkpoint.every=0"], "checkpoint.every=0"), (["--config.eval.every=0"], "every=0"),
  (["--config.log.every=0"], "at least 1"),
  (["--config.optimizer.schedule=x"], "must be one of"), (["--config.optimizer.warmup=13"], "13"),
  (["--profile"], "workdir"), (["--coordinator=a:1"], "go together"),
  (["--num_processes=x"], "num_processes"), (["--config"], "config"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_told(tmp_path, capsys, arguments, words):
  file = config_file(tmp_path)
  workdir = [f"--workdir={tmp_path / 'workdir'}"] if "every" in arguments[0] else []
  assert words in told(capsys, main(file, *workdir, *arguments))


@pytest.mark.parametrize("arguments", [[], ["--workdir=x"]])
def test_nothing_to_train_is_told(capsys, arguments):
  if arguments:
    assert "say what to train" in told(capsys, train.main(["train", *arguments]))
  else:
    assert train.main(["train"]) == 0 and "--config" in capsys.readouterr().out


def test_a_workdir_that_cannot_be_used_is_told(tmp_path, capsys):
  file = config_file(tmp_path)
  message = told(capsys, main(file, f"--workdir={file}"))
  assert message.endswith("cannot keep checkpoints: not a directory\n")


PATHS = [(section, None) for section in registry.arguments(configs.complete)] + [
  (section, key)
  for section, make in dict(
    data=Copying, model=decoder_lm.Model, optimizer=optimizer.make, eval=step.Evaluation,
    checkpoint=Checkpoints, mesh=rules.make_mesh, log=Console,
  ).items()
  for key in [*registry.arguments(make), "name", "batch", "nonsense"]
]  # fmt: skip


@hypothesis.settings(POLICY, max_examples=120)
@hypothesis.given(st.dictionaries(st.sampled_from(PATHS), JUNK, min_size=1, max_size=2))
def test_any_config_is_planned_or_refused_in_one_sentence(changes):
  config = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
  for (section, inside), value in changes.items():
    if inside is None or not isinstance(config.get(section, {}), dict):
      config[section] = value
    else:
      config[section] = config.get(section, {}) | {inside: value}
  try:
    plan.make(config)
  except configs.Mistake as mistake:
    assert str(mistake) and "\n" not in str(mistake)


@POLICY
@hypothesis.given(st.text(max_size=12), st.text(max_size=4))
def test_any_override_is_read_or_refused_in_one_sentence(key, value):
  config = configs.ml_collections.ConfigDict(TINY)
  try:
    configs.override(config, [f"--config.{key}={value}"])
  except configs.Mistake as mistake:
    assert str(mistake) and "\n" not in str(mistake)
