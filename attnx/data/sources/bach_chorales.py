"""Bach's four-part chorales, from the corpus that music21 carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import math
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attnx.data import prepare
from attnx.data.dataset import Dataset, Description, Example, Source, at_least
from attnx.data.pipeline import Fitted

VOICES = ("Soprano", "Alto", "Tenor", "Bass")
SIZES = {"train": 229, "eval": 76, "test": 77}
STEPS = {"quarter": 4, "sixteenth": 1}  # sixteenths a step
START, REST, HOLD, PITCH = 0, 1, 2, 3  # the ids; PITCH is that of the lowest note
LOWEST, HIGHEST = 36, 81  # MIDI notes of the corpus: C2 to A5


class BachChoralesBuilder(tfds.core.GeneratorBasedBuilder):
  """Chorales with exactly one soprano, alto, tenor and bass, each on a grid of sixteenths.

  `pitches` (steps, 4): MIDI note sounding at each sixteenth, 0 for a rest. `notes` (steps, 4): how
  many notes of the voice have begun by then, to tell a held note from a repeated one. Repeats are
  not played out. Of chorales equal up to transposition one is kept, and of those whose voices rest
  for more than a fifth of the time, while instruments play, none. The usual split into 229, 76 and
  77 goes by numbers that music21 does not have: here the hash of the file name orders the chorales.
  """

  name = "bach_chorales"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    grid = tfds.features.Tensor(shape=(None, 4), dtype=np.int32)
    features = {"name": tfds.features.Text(), "pitches": grid, "notes": grid}
    return tfds.core.DatasetInfo(
      builder=self,
      description="Four-part chorales of J. S. Bach.",
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    try:
      from music21 import corpus
    except ImportError:
      raise ImportError(
        "bach_chorales is prepared by music21, which is not installed: pip install 'attnx[music]'"
      ) from None
    paths = [path for path in corpus.getComposer("bach") if path.suffix == ".mxl"]
    paths = sorted(paths, key=lambda path: hashlib.sha256(path.stem.encode()).digest())
    chorales, seen = [], set()
    for path in paths:
      chorale = read(path)
      if chorale is None or (key := shape(chorale["pitches"])) in seen:
        continue
      seen.add(key)
      chorales.append(chorale)
    if len(chorales) < sum(SIZES.values()):
      raise ValueError(f"music21 has {len(chorales)} chorales, of {sum(SIZES.values())} wanted")
    ends = dict(zip(SIZES, np.cumsum(list(SIZES.values()))))
    return {
      split: self._generate_examples(chorales[end - SIZES[split] : end])
      for split, end in ends.items()
    }

  def _generate_examples(self, chorales: Sequence[dict[str, Any]]) -> Iterator:
    yield from enumerate(chorales)


def read(path: pathlib.Path) -> dict[str, Any] | None:
  """A chorale on its grid, or None where there is more to it than four voices that sing."""
  from music21 import converter

  score: Any = converter.parse(path, forceSource=True, storePickle=False)  # and nothing unpickled
  parts = score.parts
  named = [[p for p in parts if (p.partName or "").startswith(voice)] for voice in VOICES]
  if all(len(found) == 1 for found in named):
    parts = [part for (part,) in named]
  elif len(parts) != 4:
    return None
  if any(part.recurse().getElementsByClass("Chord") for part in parts):
    return None
  steps = round(4 * max(part.duration.quarterLength for part in parts))
  grid = np.zeros((2, steps, 4), np.int32)
  for voice, part in enumerate(parts):
    begun = 0
    for note in part.flatten().notes:
      first, last = (math.ceil(4 * x) for x in (note.offset, note.offset + note.quarterLength))
      begun += note.tie is None or note.tie.type == "start"
      grid[0, first:last, voice] = note.pitch.midi
      grid[1, first:, voice] = begun
  if (grid[0] == 0).mean() > 0.2:
    return None
  return {"name": path.stem, "pitches": grid[0], "notes": grid[1]}


def shape(pitches: np.ndarray) -> bytes:
  """The same for a chorale and its transpositions, and for no other."""
  return np.where(pitches > 0, pitches - pitches.max(), 1).tobytes()


@functools.lru_cache
def chorales(split: str, resolution: str, hold: bool, data_dir: str | None) -> list[np.ndarray]:
  """Ids (4 steps,) of each chorale."""
  every, texts = STEPS[resolution], []
  for chorale in prepare.prepared(BachChoralesBuilder, data_dir).as_data_source(split=split):
    pitches, notes = chorale["pitches"][::every], chorale["notes"][::every]
    ids = np.where(pitches > 0, PITCH + pitches - LOWEST, REST)
    if hold:
      held = (notes[1:] == notes[:-1]) & (pitches[1:] == pitches[:-1]) & (pitches[1:] > 0)
      ids[1:][held] = HOLD
    texts.append(ids.astype(np.int32).ravel())
  return texts


class Pieces:
  """Chorales as rows "start s1 a1 t1 b1 s2 ..", those longer than `length` cut into several."""

  def __init__(self, texts: Sequence[np.ndarray], length: int):
    self.texts, self.length = texts, length
    self.places = [(i, j) for i, text in enumerate(texts) for j in range(0, len(text), length)]

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, index: int) -> Example:
    chorale, first = self.places[index]
    text = np.concatenate([[START], self.texts[chorale]]).astype(np.int32)
    ids = text[first : first + self.length + 1]
    return dict(inputs=ids[:-1], targets=ids[1:], weights=np.ones(len(ids) - 1, np.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BachChorales(Dataset):
  """Four ids a step, soprano to bass, several whole chorales packed in a row.

  Ids: 0 start, 1 rest, 2 hold, then the notes from C2 - transpose up. The sum of four losses is the
  nats of a step; at quarter resolution without holds that is what is reported for the 229/76/77
  piano rolls (there the chord is a set and the split another), and at sixteenth resolution the mean
  loss is the nats a token of arXiv:1809.04281. 382 chorales: train 229, eval 76, test 77.

  Args:
    length: T, a multiple of 4.
    resolution: "quarter" or "sixteenth".
    hold: writes a held note as 2 instead of repeating it.
    transpose: training chorales are moved by up to so many semitones up or down.
    data_dir: where it is prepared (by music21, about a minute); see `prepare.data_dir`.
  """

  length: int = 512
  resolution: str = "quarter"
  hold: bool = False
  transpose: int = 0
  data_dir: str | None = None

  def __post_init__(self):
    at_least("length", self.length, 4)
    at_least("transpose", self.transpose, 0)
    if self.length % 4:
      raise ValueError(f"length={self.length} must be a multiple of 4, the number of voices")
    if self.resolution not in STEPS:
      raise ValueError(f"resolution={self.resolution!r} must be one of {', '.join(STEPS)}")

  @property
  def rows(self) -> Fitted:
    return Fitted(self.length)

  def describe(self) -> Description:
    return Description(
      kind="tokens",
      splits=tuple(SIZES),
      vocab=PITCH + HIGHEST - LOWEST + 1 + 2 * self.transpose,
      length=self.length,
      decode=self.decode,
    )

  def decode(self, ids: Sequence[int]) -> str:
    """One line a step: the notes from soprano to bass, "." for a rest and "-" for a hold."""
    names = ("C", "C#", "D", "E-", "E", "F", "F#", "G", "G#", "A", "B-", "B")
    words = {START: "|", REST: ".", HOLD: "-"}
    midi = [int(i) - PITCH + LOWEST - self.transpose for i in ids]
    texts = [words.get(int(i), f"{names[m % 12]}{m // 12 - 1}") for i, m in zip(ids, midi)]
    return "\n".join(" ".join(texts[i : i + 4]) for i in range(0, len(texts), 4))

  def source(self, split: str, seed: int) -> Source:
    texts = chorales(split, self.resolution, self.hold, self.data_dir)
    return Pieces([moved(text, self.transpose) for text in texts], self.length)

  def augment(self, example: Example, rng: np.random.Generator) -> Example:
    by = int(rng.integers(-self.transpose, self.transpose, endpoint=True))
    return dict(example) | {name: moved(example[name], by) for name in ("inputs", "targets")}


def moved(ids: np.ndarray, by: int) -> np.ndarray:
  """The same music some semitones up."""
  return np.where(ids >= PITCH, ids + by, ids).astype(np.int32)


DATASET = BachChorales
