"""attnx.decode: the same text on any number of devices and processes, and nothing gathered."""

import json
import re
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import decode, models
from attnx.core.tokens import Tokens
from attnx.data.dataset import decode_bytes
from attnx.decoding import trained
from attnx.decoding.stream import Stream
from attnx.decoding.text import Request, Text
from attnx.models.sampling import generate, sampler
from attnx.nn.kv_cache import BLOCK, KVCache
from attnx.sharded import rules
from attnx.training import plan as plans
from attnx.training.checkpoint import Checkpoints
from attnx.training.loop import named
from runs import TINY, ended, environment, free_port

MIXERS = (
  dict(name="attention", num_heads=4, num_kv_heads=2, position="rope"),
  dict(name="retention", num_heads=2),
  dict(name="mla", num_heads=2, kv_rank=8, head_dim=8, rope_dim=4, value_dim=8),
)
WINDOW = dict(
  name="attention", num_heads=2, mask=dict(name="sliding_window", window=20),
  cache=dict(name="window", size=20),
)  # fmt: skip
PROMPT = "def main(argv):\n  print(" * 9  # longer than a block of slots


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of a model of bytes that has not begun."""
  folder = tmp_path_factory.mktemp("decode")
  data = dict(name="stdlib_bytes", batch=8, length=32)
  model = dict(name="decoder_lm", vocab=256, dim=32, depth=3, mixers=MIXERS)
  plan = plans.make(TINY | dict(data=data, model=model))
  checkpoints = Checkpoints(folder / "checkpoints")
  checkpoints.save(2, named(plan.init()), None)
  checkpoints.wait()
  (folder / "config.json").write_text(json.dumps(plan.config))
  return folder


def text(capsys, workdir, *arguments) -> str:
  """What the command prints."""
  capsys.readouterr()
  prompt = () if any("--prompt" in a for a in arguments) else (f"--prompt={PROMPT}",)
  command = ["decode", f"--checkpoint={workdir}", *prompt, "--max-new-tokens=40", *arguments]
  assert decode.main(command) == 0
  return capsys.readouterr().out


def begun(devices: int, workdir, *arguments, count: int = 1) -> list[subprocess.Popen]:
  """The command in processes of their own."""
  where = [f"--coordinator=127.0.0.1:{free_port()}", f"--num-processes={count}"]
  command = [
    sys.executable, "-m", "attnx.decode", f"--checkpoint={workdir}", f"--prompt={PROMPT}",
    "--max-new-tokens=40", *arguments, *(where if count > 1 else ()),
  ]  # fmt: skip
  return [
    subprocess.Popen(
      [*command, *([f"--process-id={i}"] if count > 1 else ())],
      env=environment(devices),
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(count)
  ]  # fmt: skip


def apart(devices: int, workdir, *arguments, count: int = 1) -> list[str]:
  """What the command prints in processes of their own."""
  with ended(*(started := begun(devices, workdir, *arguments, count=count))):
    told = [process.communicate(timeout=200) for process in started]
  assert not any(process.returncode for process in started), told
  return [out for out, _ in told]


def test_seeded_text_is_the_same_on_any_devices_and_processes(workdir, capsys):
  expected = text(capsys, workdir, "--seed=5")
  assert len(expected) > 30
  assert apart(1, workdir, "--seed=5") == [expected]
  assert apart(2, workdir, "--seed=5", count=2) == [expected, ""]


def test_greedy_text_is_what_generate_gives(workdir, capsys):
  found = trained.load(workdir / "checkpoints" / "2", rules.make_mesh())
  prompt = np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int32)[None]
  expected = decode_bytes(np.asarray(generate(found.model, jnp.asarray(prompt), 40))[0])
  assert text(capsys, workdir, "--temperature=0", "--mesh=data=2,tensor=2,seq=2") == expected + "\n"


def test_requests_are_answered_side_by_side_as_they_are_alone(workdir, tmp_path, capsys):
  file = tmp_path / "requests.jsonl"
  asked = [dict(prompt=PROMPT), dict(prompt="x", max_new_tokens=7)]
  file.write_text("\n".join(map(json.dumps, asked)))
  lines = text(capsys, workdir, f"--prompt-file={file}", "--temperature=0").splitlines()
  said = [json.loads(line) for line in lines]
  texts = ["".join(s.get("text", "") for s in said if s["request"] == i) for i in range(2)]
  assert [s["request"] for s in said if s.get("end") == "length"] == [1, 0]
  assert texts[0] + "\n" == text(capsys, workdir, "--temperature=0")
  assert len(texts[1].encode()) >= 7


def test_a_text_ends_before_what_stops_it(workdir, capsys):
  whole = text(capsys, workdir, "--seed=5").removesuffix("\n")
  stop = next(whole[i : i + 2] for i in range(5, 30) if whole[i : i + 2].isascii())
  ended = text(capsys, workdir, "--seed=5", f"--stop={stop}", "--stop=never seen")
  assert ended == whole[: whole.index(stop)] + "\n"


def test_letters_of_several_bytes_and_ends_in_pieces_come_out_whole():
  ids = list("aé€🙂b<en<end>x".encode())
  t = Text(Request("", 99, ("<end>", "zz")), decode_bytes)
  pieces = [t.feed(i) for i in ids]
  assert "".join(pieces) == "aé€🙂b<en" and t.end == "stop" and t.taken == len(ids) - 1
  assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
  t = Text(Request("", 3, ("<end>",)), decode_bytes)
  assert [t.feed(i) for i in b"a<e"] == ["a", "", "<e"] and t.end == "length"


def test_a_process_that_dies_while_decoding_ends_the_other_which_names_it(workdir):
  more = "--max-new-tokens=100000", "--patience=5"
  with ended(*(started := begun(1, workdir, *more, count=2))):
    assert started[0].stdout.read(5)  # text is coming
    started[1].kill()
    told = started[0].communicate(timeout=60)[1]
    assert started[0].returncode == 1
  words = r"attnx.decode: stopped: process 1 \(host \S+\) is gone: .* the same command begins anew"
  assert re.search(words, told) and "Traceback" not in told, told


@pytest.mark.parametrize("arguments, words", [
  ((), "say which model"),
  (("--checkpoint=nowhere", "--prompt=x"), "there is no nowhere/config.json; --checkpoint wants"),
  (("--checkpoint={}",), "say what to go on from"),
  (("--checkpoint={}", "--prompt=x", "--prompt-file=y"), "say what to go on from"),
  (("--checkpoint={}", "--prompt-file=nowhere"), "nowhere cannot be read: .*No such file"),
  (("--checkpoint={}", "--prompt="), "the prompt: every prompt needs a token"),
  (("--checkpoint={}", "--prompt=x", "--max-new-tokens=0"), "--max-new-tokens=0 must be at least"),
  (("--checkpoint={}", "--prompt=x", "--mesh=seq"), "--mesh=seq must be like seq=8"),
  (("--checkpoint={}", "--prompt=x", "--mesh=seq=3"), "must be the 8 devices"),
  (("--checkpoint={}", "--prompt=x", "--mesh=length=8"), "--mesh: .*length"),
  (("--checkpoint={}", "--prompt=x", "--temperature=0", "--top-k=3"), "draws nothing that top_k"),
  (("--checkpoint={}", "--prompt=x", "--temperature=-1"), "temperature=-1.0 must be above 0"),
  (("--checkpoint={}", "--prompt=x", "--top-p=2"), "top_p=2.0 must be in"),
  (("--checkpoint={}", "--prompt=x", "--sed=2"), "there is no flag --sed; did you mean 'seed'"),
  (("--checkpoint={}/checkpoints/7", "--prompt=x"), "no whole checkpoint"),
])  # fmt: skip
def test_mistakes_are_told_in_a_sentence(workdir, capsys, arguments, words):
  given = [a.format(workdir) for a in arguments]
  assert decode.main(["decode", *(given or ["--prompt=x"])]) == 2
  told = capsys.readouterr().err
  assert re.search(words, told) and told.count("\n") == 1, told


@pytest.mark.parametrize("line", ["[", "1", '{"prompt": 1}', '{"prompt": "x", "sotp": "y"}',
                                  '{"prompt": "x", "max_new_tokens": 0}'])  # fmt: skip
def test_requests_that_are_none_are_refused(workdir, tmp_path, capsys, line):
  file = tmp_path / "requests.jsonl"
  file.write_text('{"prompt": "x"}\n' + line)
  assert decode.main(["decode", f"--checkpoint={workdir}", f"--prompt-file={file}"]) == 2
  assert "request 1 is" in capsys.readouterr().err


def test_a_decoded_token_costs_three_messages_and_no_device_has_all_keys():
  config = dict(name="decoder_lm", vocab=16, dim=32, depth=1, mixers=MIXERS[0])
  model = models.build(config, rngs=nnx.Rngs(0))
  stream = Stream(model, [[1] * 200, [2] * 150], 900, mesh=rules.make_mesh(data=1, seq=8))
  ids, cache = stream.prefill()
  keys = cache["blocks"][0]["mixer"].key
  assert keys.shape[1] >= 1100 and keys.sharding.shard_shape(keys.shape)[1] * 8 == keys.shape[1]
  text = stream.step.lower(stream.state, cache, ids[:, None], None, stream.keys, np.int32(1))
  names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  found = re.findall(rf" ({names})(?:-start)?\(", text.compile().as_text())
  assert found == ["collective-permute"] * 3  # a butterfly of eight
  held = (cache["blocks"][0]["mixer"].position >= 0).reshape(2, 8, -1).sum(-1)
  assert int((held.max(1) - held.min(1)).max()) <= BLOCK and held.sum() == 350


def test_prompts_in_pieces_are_prompts():
  config = dict(name="decoder_lm", vocab=16, dim=32, depth=2, mixers=(MIXERS[0], WINDOW))
  model = models.build(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 16, n) for n in (150, 3, 77)]
  options = dict(choose=sampler(top_k=4), key=jax.random.key(3))
  mesh = rules.make_mesh(data=1, seq=8)
  pieces, whole = (
    np.stack([*Stream(model, prompts, 12, mesh=mesh, piece=piece, **options)])
    for piece in (40, None)
  )
  np.testing.assert_array_equal(pieces, whole)
  assert pieces.shape == (12, 3)


def test_slots_by_turns_hold_what_slots_in_order_hold():
  rng = np.random.default_rng(1)
  k, v = rng.standard_normal((2, 2, 300, 1, 4))
  tokens = Tokens.of_length(300)
  views = []
  for shards in (1, 4):
    cache = KVCache.empty(2, 300, 1, 4, 4, shards=shards)
    for cut in (slice(0, 170), slice(170, 171), slice(171, 300)):
      view, cache = cache.append(k[:, cut], v[:, cut], tokens[cut])
    order = jnp.argsort(jnp.where(view.tokens.position < 0, 10**6, view.tokens.position))[:, :300]
    views.append([jnp.take_along_axis(x, order[..., None, None], 1) for x in view[:2]])
  jax.tree.map(np.testing.assert_array_equal, *views)
  with pytest.raises(ValueError, match="shards=2 must be at least 1, and 1 where"):
    KVCache.empty(1, 8, 1, 4, 4, shards=2, rolling=True)
