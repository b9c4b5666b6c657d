"""Checkpoints: whole or absent, vouched for byte by byte, and read on any devices."""

import ast
import gc
import json
import os
import pathlib
import pickle
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np
import pytest

from attnx.training import checkpoint
from attnx.training.checkpoint import Checkpoints, damage
from attnx.training.config import Mistake, Stopped

ROOT = pathlib.Path(__file__).parent.parent
DEVICES = np.array(jax.devices())
EIGHT = NamedSharding(Mesh(DEVICES, "x"), PartitionSpec("x"))
WHOLE = NamedSharding(Mesh(DEVICES, "x"), PartitionSpec())
ONE = SingleDeviceSharding(jax.devices()[0])
FOUR = NamedSharding(Mesh(DEVICES[:4].reshape(2, 2), ("x", "y")), PartitionSpec("y", "x"))


def values(step: int = 0) -> dict[str, np.ndarray]:
  """Arrays of many kinds, with every float that is special."""
  rng = np.random.default_rng(step)
  table = rng.normal(size=(16, 8)).astype(np.float32)
  table[0] = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, 3e38, -1]
  return {
    "params.table": table,
    "params.half": table.astype(jnp.bfloat16),
    "key": rng.integers(2**32, size=2, dtype=np.uint32),
    "step": np.array(step, np.int32),
  }


def placed(step: int, sharding) -> dict[str, jax.Array]:
  return {k: jax.device_put(v, sharding if v.ndim > 1 else ONE) for k, v in values(step).items()}


def targets(sharding) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding if v.ndim > 1 else ONE)
    for k, v in values().items()
  }


def saved(folder: pathlib.Path, *steps: int, sharding=ONE, say=print, **options) -> Checkpoints:
  checkpoints = Checkpoints(folder, say, **options)
  for step in steps:
    checkpoints.save(step, placed(step, sharding), dict(note=[step, "é", 0.1]))
  checkpoints.wait()
  return checkpoints


def assert_restored(checkpoints: Checkpoints, step: int, sharding=ONE) -> None:
  found, arrays, host = checkpoints.restore(targets(sharding))
  assert found == step and host == dict(note=[step, "é", 0.1])
  for name, value in values(step).items():
    assert arrays[name].dtype == value.dtype
    assert np.asarray(arrays[name]).tobytes() == value.tobytes(), name
    assert arrays[name].ndim < 2 or arrays[name].sharding == sharding


def flip(path: pathlib.Path, at: int) -> None:
  content = bytearray(path.read_bytes())
  content[at % len(content)] ^= 1
  path.write_bytes(content)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
  "before, after", [(EIGHT, ONE), (ONE, EIGHT), (WHOLE, FOUR), (FOUR, EIGHT)]
)
def test_what_some_devices_save_others_restore_bit_for_bit(tmp_path, before, after):
  assert_restored(saved(tmp_path, 3, sharding=before), 3, after)


def test_arrays_may_be_donated_once_save_returns(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=8)
  spoil = jax.jit(lambda arrays: jax.tree.map(jnp.zeros_like, arrays), donate_argnums=0)
  big = lambda step: jnp.full((256, 1024), step, jnp.float32) + jnp.arange(1024)
  for step in range(1, 9):
    arrays = dict(big=big(step))
    checkpoints.save(step, arrays, None)
    spoil(arrays)
  checkpoints.wait()
  target = jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=ONE)
  for step in range(8, 0, -1):
    found, arrays, _ = checkpoints.restore(dict(big=target))
    assert found == step and jnp.array_equal(arrays["big"], big(step))
    shutil.rmtree(tmp_path / str(step))


def test_the_newest_stay_and_halves_of_killed_runs_go(tmp_path):
  for left in ("7.saving", "1.deleting"):
    (tmp_path / left / "arrays").mkdir(parents=True)
  checkpoints = saved(tmp_path, 2, 4, 6, 8, keep=2)
  assert checkpoints.steps() == [6, 8]
  assert not [p for p in tmp_path.iterdir() if p.suffix in (".saving", ".deleting")]


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert Checkpoints(tmp_path).restore(targets(ONE)) is None


def test_a_change_of_any_byte_of_any_file_is_noticed(tmp_path):
  saved(tmp_path / "good", 1)
  good = tmp_path / "good" / "1"
  assert damage(good) is None and len(files(good)) > 5
  for i, path in enumerate(files(good)):
    content = path.read_bytes()
    name = "manifest.json" if path.name == "manifest.json" else str(path.relative_to(good))
    for at in {0, len(content) - 1, 7919 * (i + 1) % len(content)}:
      flip(path, at)
      assert name in damage(good)
      path.write_bytes(content)
    path.write_bytes(content[:-1])
    assert name in damage(good)
    path.unlink()
    assert "missing" in damage(good)
    path.write_bytes(content)
  assert damage(good) is None


def test_a_manifest_that_was_edited_is_not_believed(tmp_path):
  saved(tmp_path, 1)
  path = tmp_path / "1" / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["about"]["host"]["note"][0] = 2
  path.write_text(json.dumps(manifest))
  assert "manifest.json" in damage(tmp_path / "1")
  for nonsense in ("", "{}", "[]", "null", '{"about": 1}', '{"about": {}, "seal": 1}', "\0"):
    path.write_text(nonsense)
    assert "manifest.json" in damage(tmp_path / "1")


def test_damaged_checkpoints_are_told_moved_aside_and_passed_over(tmp_path):
  told = []
  checkpoints = saved(tmp_path, 1, 2, 3, say=told.append)
  flip(max(files(tmp_path / "3"), key=lambda path: path.stat().st_size), 100)
  (tmp_path / "2" / "manifest.json").unlink()
  assert_restored(checkpoints, 1)
  assert [text.split(" (")[0] for text in told] == [
    "the checkpoint of step 3 is damaged", "the checkpoint of step 2 is damaged"
  ]  # fmt: skip
  assert (tmp_path / "damaged-3").is_dir() and checkpoints.steps() == [1]
  saved(tmp_path, 2, 3)
  assert_restored(Checkpoints(tmp_path), 3)


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew(tmp_path):
  told = []
  checkpoints = saved(tmp_path, 1, 2, say=told.append)
  for step in (1, 2):
    flip(tmp_path / str(step) / "arrays" / "_METADATA", 3)
  assert checkpoints.restore(targets(ONE)) is None and len(told) == 2


@pytest.mark.parametrize("change, words", [
  (dict(step=None), "step is int32[] there and nothing here"),
  (dict(more=np.zeros(2)), "more is nothing there and float64[2] here"),
  (dict(key=np.zeros(3, np.uint32)), "key is uint32[2] there and uint32[3] here"),
  (dict(key=np.zeros(2, np.int32)), "key is uint32[2] there and int32[2] here"),
])  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(tmp_path, change, words):
  wanted = {k: v for k, v in (values() | change).items() if v is not None}
  with pytest.raises(Mistake) as mistake:
    saved(tmp_path, 1).restore(
      {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=ONE) for k, v in wanted.items()}
    )
  assert words in str(mistake.value) and "\n" not in str(mistake.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax' event loop
def test_a_full_disk_stops_the_run_and_leaves_older_checkpoints_whole(tmp_path):
  checkpoints = saved(tmp_path, 1, 2)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
  try:
    with pytest.raises(Stopped) as stopped:
      checkpoints.save(3, placed(3, ONE), None)
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  text = str(stopped.value)
  assert "the checkpoint of step 3 cannot be written" in text and "file too large" in text
  assert "whole checkpoints there: 1, 2;" in text and "\n" not in text and stopped.value.code == 1
  assert [damage(tmp_path / str(step)) for step in checkpoints.steps()] == [None, None]
  assert_restored(Checkpoints(tmp_path), 2)
  del stopped, checkpoints
  gc.collect()


def test_other_errors_are_not_blamed_on_the_disk(tmp_path):
  checkpoints = saved(tmp_path, 1)
  (tmp_path / "2.saving").mkdir()
  with pytest.raises(FileExistsError):
    checkpoints.save(2, placed(2, ONE), None)


def test_two_runs_cannot_save_to_one_directory_until_one_is_dead(tmp_path):
  code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
  command = [sys.executable, "-c", f"{code}; print(flush=True); time.sleep(60)"]
  other = subprocess.Popen([*command, tmp_path / "lock"], stdout=subprocess.PIPE)
  try:
    other.stdout.readline()
    with pytest.raises(Mistake, match="another run saves to"):
      Checkpoints(tmp_path)
  finally:
    other.kill()
    other.communicate()
  saved(tmp_path, 1)


def test_a_directory_that_cannot_be_used_is_a_mistake(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(Mistake, match="cannot keep checkpoints: not a directory"):
    Checkpoints(tmp_path / "file" / "checkpoints")
  (tmp_path / "closed").mkdir(mode=0o500)
  user = os.geteuid()
  if user == 0:  # no permission stops root
    os.seteuid(65534)
  try:
    with pytest.raises(Mistake, match="cannot keep checkpoints: permission denied"):
      Checkpoints(tmp_path / "closed" / "checkpoints")
  finally:
    os.seteuid(user)


HEARD: list[str] = []
LISTENING: list[bool] = []
DANGEROUS = ("pickle.find_class", "marshal.loads", "exec", "compile", "os.system", "os.exec",
             "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen")  # fmt: skip


def listen(event: str, arguments) -> None:
  if LISTENING and event in DANGEROUS:
    HEARD.append(event)


sys.addaudithook(listen)


class Bomb:
  def __init__(self, target):
    self.target = str(target)

  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path(self.target),)


def test_reading_a_checkpoint_executes_nothing(tmp_path):
  checkpoints = saved(tmp_path, 1, 2)
  assert_restored(checkpoints, 2)  # what is imported and compiled once is so now
  HEARD.clear()
  LISTENING.append(True)
  try:
    assert_restored(checkpoints, 2)
    silent = list(HEARD)
    pickle.loads(pickle.dumps(Bomb(tmp_path / "touched")))
  finally:
    LISTENING.clear()
  assert silent == [] and "pickle.find_class" in HEARD


def test_a_forged_checkpoint_full_of_pickles_is_refused_and_not_obeyed(tmp_path):
  checkpoints = saved(tmp_path, 1, 2)
  poison = pickle.dumps(Bomb(tmp_path / "obeyed"))
  for path in files(tmp_path / "2" / "arrays"):
    path.write_bytes(poison)
  path = tmp_path / "2" / "manifest.json"
  about = json.loads(path.read_text())["about"]
  about["files"] = {
    name: checkpoint.fingerprint(tmp_path / "2" / name) for name in about["files"]
  }
  path.write_text(json.dumps(dict(about=about, seal=checkpoint.seal(about))))
  assert damage(tmp_path / "2") is None
  with pytest.raises(Mistake, match="Orbax .* cannot read .*; move it away") as mistake:
    checkpoints.restore(targets(ONE))
  assert "\n" not in str(mistake.value) and not (tmp_path / "obeyed").exists()
  pickle.loads(poison)
  assert (tmp_path / "obeyed").exists()


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}


def unsafe(source: str) -> list[str]:
  """Imports and calls by which a file could make a program do what the file says."""
  found = []
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Import(names=names):
        found += [alias.name for alias in names if alias.name.split(".")[0] in UNSAFE]
      case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNSAFE:
        found.append(module)
      case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" as name)):
        found.append(name)
      case ast.Call(keywords=keywords):
        found += [k.arg for k in keywords if k.arg == "allow_pickle"]
  return found


def test_no_source_file_could_unpickle_or_execute_what_it_reads():
  for path in [*ROOT.glob("attnx/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]:
    assert not unsafe(path.read_text()), path
  bad = "import pickle\nfrom marshal import loads\neval('1')\nnp.load(f, allow_pickle=True)"
  assert sorted(unsafe(bad)) == ["allow_pickle", "eval", "marshal", "pickle"]
