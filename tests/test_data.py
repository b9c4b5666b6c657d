"""Data: every dataset keeps its promises, resumes bit for bit, and is the task that it names."""

import collections
import itertools
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from attnx import data
from attnx.data import dataset as datasets
from attnx.data import prepare
from attnx.data.sources import bach_chorales, digits, listops, s5, stdlib_bytes

TINY_LISTOPS = dict(name="listops", depth=4, arguments=4, shortest=4, longest=24)
CONFIGS = {
  "copying": dict(name="copying", length=5, vocab=7, eval_examples=10),
  "copying_padded": dict(name="copying", length=5, shortest=1, reverse=True, eval_examples=10),
  "selective_copy": dict(name="selective_copy", length=9, symbols=3, vocab=6, eval_examples=10),
  "mqar": dict(name="mqar", length=24, pairs=3, vocab=32, eval_examples=10),
  "induction": dict(name="induction", length=9, eval_length=13, vocab=5, eval_examples=10),
  "needle": dict(name="needle", length=24, needles=2, size=3, vocab=12, eval_examples=10),
  "parity": dict(name="parity", length=9, eval_length=13, eval_examples=10),
  "s5": dict(name="s5", length=9, eval_examples=10),
  "listops": TINY_LISTOPS | dict(eval_examples=10, test_examples=10),
  "listops_packed": TINY_LISTOPS | dict(pack=True, eval_examples=40, test_examples=10),
  "digits": dict(name="digits", shift=1),
  "stdlib_bytes": dict(name="stdlib_bytes", length=40_000),
  "tfds_texts": dict(name="tfds:tiny_texts", length=16),
  "tfds_images": dict(name="tfds:tiny_images"),
}
PACKED = ("tfds_texts", "listops_packed")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Tiny:
  """What the two builders below share."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(self.FEATURES)
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(n) for split, n in (("train", 20), ("test", 5))}


class TinyTexts(Tiny, tfds.core.GeneratorBasedBuilder):
  """Texts of 2 to 21 letters, one of two bytes."""

  FEATURES = {"text": tfds.features.Text()}

  def _generate_examples(self, n):
    for i in range(n):
      yield i, {"text": "é" + LETTERS[: 1 + i]}


class TinyImages(Tiny, tfds.core.GeneratorBasedBuilder):
  """Images of one grey each."""

  FEATURES = {
    "image": tfds.features.Image(shape=(4, 6, 1)),
    "label": tfds.features.ClassLabel(num_classes=3),
  }

  def _generate_examples(self, n):
    for i in range(n):
      yield i, {"image": PIL.Image.new("L", (6, 4), i), "label": i % 3}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
  """A folder for prepared data, of this test's own."""
  with pytest.MonkeyPatch.context() as patch:
    root = tmp_path_factory.mktemp("data")
    patch.setenv("TFDS_DATA_DIR", str(root))
    for builder in (TinyTexts, TinyImages):
      prepare.prepared(builder)
    yield root


def batches(name, split="train", batch=4, seed=0, process=(0, 1), **more):
  config = CONFIGS[name] | {"batch": batch} | more
  index, count = process
  return data.batches(config, split=split, seed=seed, process_index=index, process_count=count)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_same(actual, expected):
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], strict=True)


def joined(batches):
  return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_is_what_the_description_says(name):
  told = data.describe(CONFIGS[name])
  for split in told.splits:
    batch = next(batches(name, split))
    inputs, targets, weights = (batch[key] for key in ("inputs", "targets", "weights"))
    assert (targets.dtype, weights.dtype) == (np.int32, np.float32)
    assert set(np.unique(weights)) <= {0.0, 1.0} and weights.any()
    if told.kind == "images":
      assert inputs.shape == (4, *told.image) and inputs.dtype == np.float32
      assert 0 <= inputs.min() and inputs.max() <= 1
      assert targets.shape == weights.shape == (4,) and targets.max() < told.classes
    else:
      assert inputs.dtype == np.int32 and inputs.min() >= 0 and inputs.max() < told.vocab
      assert inputs.shape == targets.shape == weights.shape and targets.max() < told.vocab
      assert split != "train" or inputs.shape == (4, told.length)
    if "positions" in batch:
      nothing = batch["positions"] < 0
      np.testing.assert_array_equal(nothing, batch["segments"] == 0)
      assert not weights[nothing].any()
      starts = np.diff(batch["segments"], axis=1, prepend=0) != 0
      assert (batch["positions"][starts & ~nothing] == 0).all()
      follows = ~starts & ~nothing
      np.testing.assert_array_equal(
        batch["positions"][follows], np.roll(batch["positions"], 1, axis=1)[follows] + 1
      )


@pytest.mark.parametrize("name", CONFIGS)
def test_training_resumes_bit_for_bit_from_any_step(name):
  iterator, states, expected = batches(name, batch=2), [], []
  for _ in range(24):
    states.append(json.dumps(iterator.get_state()))
    expected.append(next(iterator))
  for step in (0, 1, 7, 12, 21):
    resumed = batches(name, batch=2)
    resumed.set_state(json.loads(states[step]))
    assert_same(take(resumed, 3), expected[step : step + 3])
  iterator.set_state(json.loads(states[3]))  # an iterator in use goes back too
  assert_same(take(iterator, 2), expected[3:5])


def test_texts_resume_at_every_cut():
  # JSON makes lists of tuples, and Grain compares the state of joined texts with tuples.
  iterator, states, expected = batches("tfds_texts", batch=1), [], []
  for _ in range(60):
    states.append(json.dumps(iterator.get_state()))
    expected.append(next(iterator))
  for step in range(58):
    resumed = batches("tfds_texts", batch=1)
    resumed.set_state(json.loads(states[step]))
    assert_same(take(resumed, 2), expected[step : step + 2])


@pytest.mark.parametrize("name", ["mqar", "listops_packed", "digits"])
def test_a_state_of_other_data_is_refused(name):
  state = batches(name).get_state()
  with pytest.raises(ValueError, match=r"saved with \{'batch': 4\} and cannot go on with .*8"):
    batches(name, batch=8).set_state(state)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_seed_changes_training_and_not_evaluation(name):
  a, b = (joined(take(batches(name, seed=seed), 4)) for seed in (0, 1))
  assert any((a[key] != b[key]).any() for key in a)
  assert_same(*(list(batches(name, "eval", seed=seed)) for seed in (0, 1)))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in PACKED])
def test_the_global_batch_is_the_same_for_any_number_of_processes(name):
  for split, steps in (("train", 6), ("eval", 2)):
    whole = take(batches(name, split), steps)
    parts = [take(batches(name, split, process=(p, 2)), steps) for p in range(2)]
    assert_same([joined(both) for both in zip(*parts)], whole)


@pytest.mark.parametrize("name", PACKED)
def test_packed_evaluation_is_the_same_for_any_number_of_processes(name):
  whole = list(batches(name, "eval"))
  parts = [list(batches(name, "eval", process=(p, 2))) for p in range(2)]
  assert_same([joined(both) for both in zip(*parts)], whole)


def documents(batches):
  """The segments of packed rows."""
  found = []
  for row, segments in ((r, s) for b in batches for r, s in zip(b["inputs"], b["segments"])):
    found += [tuple(row[segments == i].tolist()) for i in range(1, segments.max() + 1)]
  return found


def test_packing_loses_nothing_and_processes_train_on_different_examples():
  padded = CONFIGS["listops"] | dict(eval_examples=40, batch=4)
  expected = documents(data.batches(padded, split="eval", seed=0))
  assert len(expected) == 40
  assert collections.Counter(documents(batches("listops_packed", "eval"))) == (
    collections.Counter(expected)
  )
  parts = [documents(take(batches("listops_packed", process=(p, 2)), 20)) for p in range(2)]
  long = [{text for text in part if len(text) > 9} for part in parts]
  assert min(map(len, long)) > 20 and not long[0] & long[1]


def test_padding_is_rare_in_packed_rows():
  rows = joined(take(batches("listops_packed"), 16))
  alone = joined(take(batches("listops"), 16))
  assert (rows["positions"] < 0).mean() < 0.2 < 0.4 < (alone["positions"] < 0).mean()


def test_every_epoch_has_every_example_once_in_another_order():
  config = CONFIGS["s5"] | dict(train_examples=12, batch=4)
  rows = joined(take(data.batches(config, split="train", seed=3), 9))["inputs"]
  epochs = [[tuple(row) for row in rows[i : i + 12].tolist()] for i in (0, 12, 24)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  assert len(set(epochs[0])) == 12 and epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("name", ["parity", "copying_padded", "listops_packed", "digits"])
def test_evaluation_is_one_pass_filled_up_with_rows_of_no_weight(name):
  whole = list(batches(name, "eval", batch=7))
  assert all(len(b["weights"]) == 7 for b in whole)
  alone = list(batches(name, "eval", batch=1))
  assert_same([joined(alone)], [{k: v[: len(alone)] for k, v in joined(whole).items()}])
  rest = joined(whole)["weights"][len(alone) :]
  assert rest.size and not rest.any()


def examples(seed=0, split="train", count=64, **config):
  """Examples of a synthetic task."""
  made = data.build(config)[0]
  source = datasets.Generated(made, split, seed)
  return [source[i] for i in range(count)]


def test_copying_repeats_the_string_after_the_separator():
  for example in examples(name="copying", length=6, shortest=2, reverse=True):
    ids = [*example["inputs"], example["targets"][-1]]
    text, copy = ids[: ids.index(0)], ids[ids.index(0) + 1 :]
    assert copy == text[::-1] and 2 <= len(text) <= 6
    assert example["targets"][example["weights"] > 0].tolist() == copy


def test_selective_copy_asks_for_the_symbols_in_their_order():
  places = set()
  for example in examples(name="selective_copy", length=12, symbols=4, vocab=8):
    text, markers = np.split(example["inputs"], [12])
    assert (markers == 7).all() and np.count_nonzero(text) == 4 and text.max() < 7
    assert text[text > 0].tolist() == example["targets"][example["weights"] > 0].tolist()
    places.add(tuple(np.flatnonzero(text)))
  assert len(places) > 30


def test_mqar_asks_every_key_once_at_gaps_that_follow_the_power_law():
  config = dict(name="mqar", length=64, pairs=4, vocab=64, power=0.1)
  first = []
  for example in examples(**config, count=3000):
    keys, values = example["inputs"][:8:2], example["inputs"][1:8:2]
    asked = np.flatnonzero(example["weights"])
    assert (example["inputs"][8:] > 0).nonzero()[0].tolist() == (asked - 8).tolist()
    assert sorted(example["inputs"][asked]) == sorted(keys) and len(set(keys)) == 4
    assert keys.max() < 32 <= values.min() and len(set(values)) == 4
    pairs = dict(zip(keys, values))
    assert [pairs[k] for k in example["inputs"][asked]] == example["targets"][asked].tolist()
    assert (asked % 2 == 0).all()
    first.append((asked[example["inputs"][asked] == keys[0]][0] - 8) // 2)

  weights = np.arange(1, 29) ** -0.9
  counts = np.bincount(first, minlength=28)
  expected = 3000 * weights / weights.sum()
  np.testing.assert_allclose(counts[:4], expected[:4], atol=90)
  np.testing.assert_allclose(counts[14:].sum(), expected[14:].sum(), atol=90)


def test_induction_asks_what_followed_the_special_token():
  for example in examples(name="induction", length=7, vocab=4):
    inputs = example["inputs"].tolist()
    assert inputs.count(3) == 2 and inputs[-1] == 3
    assert example["targets"][-1] == inputs[inputs.index(3) + 1]
    assert example["weights"].tolist() == [0] * 6 + [1]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0, None])
def test_the_needle_asked_for_is_in_the_text_at_its_depth(depth):
  for example in examples(name="needle", length=40, needles=3, size=2, vocab=20, depth=depth):
    ids = [*example["inputs"].tolist(), int(example["targets"][-1])]
    assert ids[-4] == 1 and ids.count(0) == 3 and ids.count(1) == 1
    needles = {ids[i + 1]: (i, ids[i + 2 : i + 4]) for i in range(40) if ids[i] == 0}
    place, value = needles[ids[-3]]
    assert value == ids[-2:] == example["targets"][example["weights"] > 0].tolist()
    hay = sum(1 for i in range(place) if not any(0 <= i - j < 4 for j, _ in needles.values()))
    assert len(needles) == 3 and (depth is None or hay == round(depth * 25))


def test_parity_and_permutations_follow_their_groups():
  for example in examples(name="parity", length=12):
    assert example["targets"][-1] == example["inputs"].sum() % 2
  table = s5.products(4)
  assert sorted(table[5]) == list(range(24)) and (table[0] == np.arange(24)).all()
  permutations = list(itertools.permutations(range(4)))
  for example in examples(name="s5", length=12, symbols=4, count=8):
    state = (0, 1, 2, 3)
    for x, target in zip(example["inputs"], example["targets"]):
      state = tuple(permutations[x][i] for i in state)
      assert permutations[target] == state
  assert (table != table.T).any()  # no commutative group


def evaluate(text):
  """The value of an expression, by another way than the generator's."""
  code = text.replace("]", "])").replace(" ", ",")
  for name in ("MIN", "MAX", "MED", "SM"):
    code = code.replace(f"[{name},", f"{name.lower()}([")
  functions = dict(min=min, max=max, med=lambda x: int(np.median(x)), sm=lambda x: sum(x) % 10)
  return eval(code.replace(",]", "]"), functions)


def test_listops_values_are_those_of_their_expressions():
  assert evaluate("[MED 1 4 7 8 ]") == 5 and evaluate("[MAX 2 [SM 9 9 ] 1 ]") == 8
  told = data.describe(TINY_LISTOPS)
  seen = set()
  for example in examples(**TINY_LISTOPS, count=300):
    text = told.decode(example["inputs"])
    assert told.decode([example["targets"][-1]]) == str(evaluate(text))
    np.testing.assert_array_equal(told.encode(text), example["inputs"])
    assert 4 < len(example["inputs"]) < 24 and example["weights"].sum() == 1
    seen |= set(text.split())
  assert seen == set(listops.TOKENS) - {"<pad>"}


def test_listops_has_the_lengths_and_labels_of_the_benchmark():
  # 3000 of the reference: mean length 1048, labels 0 and 9 near 0.17, the others 0.07 to 0.10.
  kept = examples(name="listops", count=250)
  lengths = np.array([len(x["inputs"]) for x in kept])
  assert 500 < lengths.min() and lengths.max() < 2000 and abs(lengths.mean() - 1048) < 90
  labels = np.bincount([x["targets"][-1] - 6 for x in kept], minlength=10) / 250
  assert min(labels[0], labels[9]) > 0.1 and max(labels[1:9]) < 0.16


def test_standard_library_bytes_are_files_that_are_read_once():
  config = CONFIGS["stdlib_bytes"]
  told = data.describe(config)
  text = told.raw("eval")
  assert text.endswith(b"\0") and b"def __init__(self" in text
  held_out = 1 - len(told.raw("train")) / (len(text) + len(told.raw("train")))
  assert 0.02 < held_out < 0.15
  rows = joined(list(batches("stdlib_bytes", "eval")))
  scored = rows["weights"] > 0
  assert bytes(rows["targets"][scored].astype(np.uint8)) == text[1:]
  assert bytes(rows["inputs"][scored].astype(np.uint8)) == text[:-1]
  assert told.decode(told.encode("def é(x)")) == "def é(x)"
  builder = prepare.prepared(stdlib_bytes.StdlibBytesBuilder)
  files = {s: {x["path"].decode() for x in builder.as_data_source(split=s)} for s in told.splits}
  assert not files["train"] & files["eval"] and "dataclasses.py" in files["train"] | files["eval"]
  assert all(stdlib_bytes.is_held_out(path) for path in files["eval"])
  assert not any({"test", "tests", "site-packages"} & {*p.split("/")} for p in files["train"])


def test_digits_are_all_there_and_shifts_move_them_by_up_to_a_pixel():
  import sklearn.datasets

  images, labels = sklearn.datasets.load_digits(return_X_y=True)
  rows = joined(list(batches("digits", "eval", batch=30)))
  held_out = digits.is_held_out(labels)
  assert np.ptp(np.bincount(labels[held_out])) <= 2 and np.ptp(np.bincount(labels[~held_out])) <= 8
  np.testing.assert_array_equal(rows["weights"], np.arange(360) < 355)
  np.testing.assert_array_equal(rows["inputs"].reshape(360, 64)[:355] * 16, images[held_out])
  np.testing.assert_array_equal(rows["targets"][:355], labels[held_out])
  still = joined(take(batches("digits", shift=0), 100))["inputs"]
  moved = joined(take(batches("digits", shift=1.0), 100))["inputs"]
  middle = lambda x: np.stack([(x * np.arange(8).reshape(s)).sum((1, 2, 3)) / x.sum((1, 2, 3))
                               for s in ((8, 1, 1), (1, 8, 1))])  # fmt: skip
  by = middle(moved) - middle(still)  # a digit that leaves the image moves less
  assert np.abs(by).max() < 1.2 and (np.std(by, axis=1) > 0.25).all()


def test_images_of_any_tfds_dataset_are_scaled():
  told = data.describe(CONFIGS["tfds_images"])
  assert (told.kind, told.classes, told.image) == ("images", 3, (4, 6, 1))
  batch = next(batches("tfds_images", "eval"))
  np.testing.assert_allclose(batch["inputs"][3], 3 / 255)
  assert batch["targets"].tolist() == [0, 1, 2, 0]


def test_texts_of_any_tfds_dataset_are_joined_and_cut():
  whole = list(batches("tfds_texts", "eval"))
  rows = joined(whole)
  text = bytes(rows["targets"][rows["weights"] > 0].astype(np.uint8))
  assert text == data.describe(CONFIGS["tfds_texts"]).raw("eval")
  assert text.split(b"\0")[1].decode() == "éab"
  assert ((rows["inputs"] == 0) & (rows["positions"] == 0)).sum() == 5  # each begins with a 0


def test_nothing_that_reads_data_imports_tensorflow(home):
  code = (
    "import sys\nfrom attnx import data\n"
    "for config in (dict(name='stdlib_bytes'), dict(name='digits'), dict(name='parity')):\n"
    "  next(data.batches(config | dict(batch=2), split='train', seed=0))\n"
    "print([m for m in ('tensorflow', 'sklearn', 'music21') if m in sys.modules])"
  )
  prepare.prepared(stdlib_bytes.StdlibBytesBuilder)
  prepare.prepared(digits.DigitsBuilder)
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "[]"


def test_of_two_that_prepare_at_once_the_first_wins_and_both_read(tmp_path):
  class Racing(TinyTexts):
    """While it is prepared, another process prepares it too."""

    name = "racing"

    def _generate_examples(self, n):
      if self.first:
        type(self).first = False
        prepare.prepared(Racing, str(tmp_path))
      yield from super()._generate_examples(n)

  Racing.first = True
  assert len(prepare.prepared(Racing, str(tmp_path)).as_data_source(split="train")) == 20
  assert not Racing.first and not list(tmp_path.glob(".preparing*"))


def test_a_preparation_that_fails_leaves_nothing(tmp_path):
  class Failing(TinyTexts):
    """Stops in the middle."""

    name = "failing"

    def _generate_examples(self, n):
      yield from super()._generate_examples(3)
      raise OSError("the disk is full")

  with pytest.raises(OSError, match="the disk is full"):
    prepare.prepared(Failing, str(tmp_path))
  assert not (tmp_path / "failing").exists() and not list(tmp_path.glob(".preparing*"))


def test_a_dataset_that_cannot_be_downloaded_says_so(monkeypatch, tmp_path):
  def fail(self, **kwargs):
    raise ConnectionError("name or service not known")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
  with pytest.raises(OSError, match="tiny_texts is not prepared in .* name or service not known;"):
    data.describe(dict(name="tfds:tiny_texts", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
  "config, error, message",
  [
    (dict(), ValueError, "a data config wants a name"),
    (dict(name="coping"), KeyError, "no dataset 'coping'; did you mean 'copying'"),
    (dict(name="copying", lenght=3), TypeError, "takes no 'lenght'; did you mean 'length'"),
    (dict(name="copying:x"), ValueError, "takes nothing after a colon, got 'x'"),
    (dict(name="copying", length=0), ValueError, "length=0 must be an integer of at least 1"),
    (dict(name="copying", length=2.0), ValueError, "length=2.0 must be an integer"),
    (dict(name="copying", shortest=17), ValueError, "shortest=17 must be in 1 .. length=16"),
    (dict(name="copying", batch=0), ValueError, "batch=0 must be a positive integer"),
    (dict(name="copying", batch=None), ValueError, "batch=None must be a positive integer"),
    (dict(name="mqar", length=64, pairs=17), ValueError, "length=64 .* least 68 to hold pairs=17"),
    (dict(name="mqar", vocab=8), ValueError, "vocab=8 .* at least 10 to hold pairs=4"),
    (dict(name="mqar", length=65), ValueError, "length=65 and vocab=8192 must be even"),
    (dict(name="mqar", power=0), ValueError, "power=0 must be positive"),
    (dict(name="selective_copy", length=8), ValueError, "length=8 .* least 16, the number of sym"),
    (dict(name="needle", length=4), ValueError, "length=4 .* at least 5 to hold needles=1"),
    (dict(name="needle", depth=2), ValueError, "depth=2 must be in 0 .. 1"),
    (dict(name="s5", symbols=7), ValueError, "symbols=7 must be at most 6"),
    (dict(name="listops", depth=3, arguments=3), ValueError, "give at most 17 tokens"),
    (dict(name="listops", longest=501), ValueError, "longest=501 .* to leave room above 500"),
    (dict(name="bach_chorales", length=6), ValueError, "length=6 must be a multiple of 4"),
    (dict(name="bach_chorales", resolution="eighth"), ValueError, "one of quarter, sixteenth"),
    (dict(name="tfds"), TypeError, "the dataset tfds needs 'dataset'"),
    (dict(name="tfds:nothing_such"), KeyError, "TFDS has no dataset 'nothing_such'"),
    (dict(name="tfds:tiny_texts", text="body"), ValueError, "nor 'body'; it has text"),
  ],
)
def test_what_does_not_fit_is_one_sentence(config, error, message):
  with pytest.raises(error, match=message):
    data.batches(dict(batch=4) | config, split="train", seed=0)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(split="valid"), "split='valid' must be one of 'train', 'eval'"),
    (dict(process_count=3), "batch=4 must be a multiple of process_count=3"),
    (dict(process_count=2, process_index=2), "process_index=2 must be in 0 .. 1"),
    (dict(seed=-1), "seed=-1 must be in 0"),
  ],
)
def test_a_call_that_does_not_fit_is_one_sentence(arguments, message):
  with pytest.raises(ValueError, match=message):
    data.batches(dict(name="copying", batch=4), **dict(split="train", seed=0) | arguments)


def test_a_chorale_is_read_note_by_note():
  pytest.importorskip("music21")
  from music21 import converter, corpus

  path = next(p for p in corpus.getComposer("bach") if p.name == "bwv269.mxl")
  chorale = bach_chorales.read(path)
  score = converter.parse(path, forceSource=True, storePickle=False)
  chords = list(score.chordify().flatten().notes)
  for chord in chords:
    sounding = chorale["pitches"][round(4 * chord.offset)]
    assert sorted({*sounding.tolist()}) == sorted({p.midi for p in chord.pitches})
  assert len(chords) == 80
  assert (chorale["notes"][0] == 1).all() and (np.diff(chorale["notes"], axis=0) >= 0).all()
  onsets = np.diff(chorale["notes"], axis=0, prepend=0) > 0
  changes = np.diff(chorale["pitches"], axis=0, prepend=0) != 0
  assert (onsets | ~changes | (chorale["pitches"] == 0)).all() and (onsets & ~changes).any()
  moved = np.where(chorale["pitches"] > 0, chorale["pitches"] + 3, 0)
  assert bach_chorales.shape(chorale["pitches"]) == bach_chorales.shape(moved)


@pytest.mark.slow  # music21 reads four hundred scores: half a minute
def test_chorales_have_the_usual_sizes_and_resume():
  pytest.importorskip("music21")
  config = dict(name="bach_chorales", length=256, batch=2, transpose=3)
  told = data.describe(config)
  sizes = {s: len(bach_chorales.chorales(s, "quarter", False, None)) for s in told.splits}
  assert sizes == dict(train=229, eval=76, test=77)
  quarter, sixteenth, held = (
    [bach_chorales.chorales(s, r, h, None) for s in told.splits]
    for r, h in (("quarter", False), ("sixteenth", False), ("sixteenth", True))
  )
  for few, many, short in zip(sum(quarter, []), sum(sixteenth, []), sum(held, [])):
    np.testing.assert_array_equal(few.reshape(-1, 4), many.reshape(-1, 4)[::4])
    assert few.min() >= 1 and few.max() < told.vocab - 6
    restored = short.reshape(-1, 4).copy()
    for t in range(1, len(restored)):
      restored[t] = np.where(restored[t] == bach_chorales.HOLD, restored[t - 1], restored[t])
    np.testing.assert_array_equal(restored.ravel(), many)
  rows = joined(list(data.batches(config, split="eval", seed=0)))
  assert rows["weights"].sum() == sum(map(len, quarter[1]))
  iterator = data.batches(config, split="train", seed=0)
  take(iterator, 5)
  state, expected = json.dumps(iterator.get_state()), take(iterator, 5)
  iterator = data.batches(config, split="train", seed=0)
  iterator.set_state(json.loads(state))
  assert_same(take(iterator, 5), expected)
