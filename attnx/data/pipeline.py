"""From examples to batches with Grain: shuffle, shard, pad or pack, batch, prefetch."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import grain
import numpy as np

from attnx.data.dataset import Dataset, Example

FIELDS = ("inputs", "targets", "weights")


@dataclasses.dataclass(frozen=True)
class Padded:
  """One example a row, padded on the right to `length` tokens; random access."""

  length: int

  def pad(self, example: Example) -> Example:
    """Adds `positions` and `segments`; padding has position -1, segment 0 and weight 0."""
    size, room = len(example["inputs"]), self.length - len(example["inputs"])
    if room < 0:
      raise ValueError(f"an example of {size} tokens does not fit length={self.length}")
    row = {name: np.pad(example[name], (0, room)) for name in FIELDS}
    where = np.arange(self.length, dtype=np.int32)
    return row | dict(
      positions=np.where(where < size, where, -1), segments=(where < size).astype(np.int32)
    )


@dataclasses.dataclass(frozen=True)
class Fitted:
  """Several whole examples a row, first fit into `bins` rows at a time."""

  length: int
  bins: int = 16

  def pack(self, examples: grain.IterDataset, *, seed: int | None) -> grain.IterDataset:
    """Rows in the order of filling, or shuffled among the bins by `seed`."""
    return grain.experimental.FirstFitPackIterDataset(
      examples,
      length_struct=dict.fromkeys(FIELDS, self.length),
      num_packing_bins=self.bins,
      seed=seed or 0,
      shuffle_bins=seed is not None,
    ).map(named)


@dataclasses.dataclass(frozen=True)
class Joined:
  """Examples end to end, cut every `length` tokens; nothing but the last row is padded."""

  length: int

  def pack(self, examples: grain.IterDataset, *, seed: int | None) -> grain.IterDataset:
    """Rows in the order of the examples."""
    del seed  # the examples are shuffled already
    return grain.experimental.ConcatThenSplitIterDataset(
      examples, length_struct=dict.fromkeys(FIELDS, self.length)
    ).map(named)


def named(row: Example) -> Example:
  """Grain's names of packed fields to ours; position -1 where there is no token."""
  segments = row["inputs_segment_ids"].astype(np.int32)
  positions = np.where(segments > 0, row["inputs_positions"], -1).astype(np.int32)
  return {name: row[name] for name in FIELDS} | dict(positions=positions, segments=segments)


class Rows(grain.MapDataset):
  """The rows of one process: rows p b .. (p + 1) b of every global batch of B = P b rows.

  So the global batch, and with it a run, is the same for any number of processes. A last batch that
  is not full is completed with rows of weight 0, in every process alike.
  """

  def __init__(self, parent: grain.MapDataset, *, batch: int, index: int, count: int):
    super().__init__(parent)
    self._batch, self._local, self._first = batch, batch // count, index * (batch // count)

  def __len__(self) -> int:
    if (size := len(self._parent)) == sys.maxsize:  # endless
      return size
    return -(-size // self._batch) * self._local

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    step, row = divmod(index, self._local)
    index = step * self._batch + self._first + row
    return self._parent[index] if index < len(self._parent) else empty(self._parent[0])


def empty(example: Example) -> Example:
  """A row like `example` with nothing in it."""
  row = {name: np.zeros_like(value) for name, value in example.items()}
  return row | ({"positions": row["positions"] - 1} if "positions" in row else {})


def completed(rows: list[Example], batch: int) -> dict[str, np.ndarray]:
  """Stacks rows, and empty ones up to `batch`."""
  rows = [*rows, *[empty(rows[0])] * (batch - len(rows))]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def unlike(seed: int) -> int:
  """A seed for Grain, which adds the epoch to it: neighbours must not be neighbours there."""
  return int(np.random.SeedSequence(seed).generate_state(1)[0])


class Batches(grain.DatasetIterator):
  """A Grain iterator whose state is JSON and says what it is a state of."""

  def __init__(self, parent: grain.DatasetIterator, **origin: Any):
    super().__init__(parent)
    self._origin = origin

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._parent)

  def get_state(self) -> dict[str, Any]:
    return self._origin | {"iterator": self._parent.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes where `state` was taken; refuses a state of other data or another batch size."""
    saved = {key: value for key, value in state.items() if key != "iterator"}
    if saved != self._origin:
      differ = [k for k in {**saved, **self._origin} if saved.get(k) != self._origin.get(k)]
      was, now = ({k: side.get(k) for k in differ} for side in (saved, self._origin))
      raise ValueError(f"this state of the data was saved with {was} and cannot go on with {now}")
    self._parent.set_state(tuples(state["iterator"]))


def tuples(state: Any) -> Any:
  """A state as Grain gave it: JSON made lists of tuples, which Grain compares with tuples."""
  if isinstance(state, dict):
    return {key: tuples(value) for key, value in state.items()}
  return tuple(map(tuples, state)) if isinstance(state, list) else state


def iterate(
  dataset: Dataset, *, batch: int, split: str, seed: int, index: int, count: int
) -> Batches:
  """Batches of one process, `batch // count` rows each; see `attnx.data.batches`."""
  examples = grain.MapDataset.source(dataset.source(split, seed))
  if train := split == "train":
    examples = examples.shuffle(seed=unlike(seed)).repeat()
    if dataset.augment is not None:
      examples = examples.random_map(dataset.augment, seed=unlike(seed))
  read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  local = batch // count
  origin = dict(dataset=type(dataset).__name__, split=split, seed=seed, batch=batch)

  # Examples that are rows stay random access: the state is one number, the same in every process.
  if dataset.rows is None or isinstance(dataset.rows, Padded):
    if dataset.rows is not None:
      examples = examples.map(dataset.rows.pad)
    rows = Rows(examples, batch=batch, index=index, count=count)
    return Batches(iter(rows.batch(local).to_iter_dataset(read)), **origin)

  # Packed rows are a stream. In training every process packs examples of its own; evaluation is
  # packed by every process alike, so that all have the same number of batches.
  if train:
    stream = dataset.rows.pack(examples[index::count].to_iter_dataset(read), seed=seed)
    return Batches(iter(stream.batch(local)), **origin, process=f"{index} of {count}")
  stream = dataset.rows.pack(examples.to_iter_dataset(read), seed=None)
  whole = stream.batch(batch, batch_fn=lambda rows: completed(rows, batch))
  mine = slice(index * local, (index + 1) * local)
  own = whole.map(lambda rows: {name: value[mine] for name, value in rows.items()})
  return Batches(iter(own), **origin)
