"""Training with rows, heads and tokens over devices has the losses of one device."""

import json
import shutil

import pytest

from runs import TINY, arrays, assert_same, config_file, finish, losses, main, start

MIXERS = (
  dict(name="attention", num_heads=4, num_kv_heads=2, position="rope", dropout=0.1),
  dict(name="mamba2", head_dim=16, state_dim=8),
  dict(name="gated_delta_net", num_heads=2),
)
SECTIONS = dict(
  steps=20,
  data=dict(name="copying", batch=8, length=8, vocab=8, eval_examples=8),
  model=dict(name="decoder_lm", vocab=8, dim=64, depth=3, mixers=MIXERS),
  optimizer=dict(peak=1e-3, warmup=10),
  checkpoint=dict(every=10),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """A run on one device."""
  folder = tmp_path_factory.mktemp("alone")
  file = config_file(folder, **SECTIONS)
  process = start(file, f"--workdir={folder / 'workdir'}")
  told = finish(process, 300)
  assert process.returncode == 0, told
  return file, folder / "workdir"


def test_tokens_over_eight_devices_have_the_losses_of_one(alone, tmp_path):
  file, reference = alone
  assert main(file, f"--workdir={tmp_path}", "--config.mesh.data=1", "--config.mesh.seq=8") == 0
  assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-5)
  assert_same(arrays(tmp_path), arrays(reference), rtol=1e-2, atol=2e-4)
  explained = (tmp_path / "explain.txt").read_text()
  assert "Over the mesh: seq=8, keys go round a ring, early and late tokens" in explained


def test_a_run_of_one_device_goes_on_over_rows_heads_and_tokens(alone, tmp_path):
  file, reference = alone
  shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints" / "20")
  mesh = [f"--config.mesh.{name}={size}" for name, size in dict(fsdp=2, tensor=2, seq=2).items()]
  assert main(file, f"--workdir={tmp_path}", *mesh) == 0
  assert json.loads((tmp_path / "config.json").read_text())["mesh"]["seq"] == 2
  assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-5)


def test_what_cannot_be_shared_says_so(tmp_path, capsys):
  file = config_file(tmp_path, **SECTIONS | dict(data=TINY["data"] | dict(length=6)))
  assert main(file, "--config.mesh.data=1", "--config.mesh.seq=8") == 2
  assert "seq=8 must divide the length of the data, 12" in capsys.readouterr().err
