"""Data: `batches` gives Grain iterators of NumPy batches, `describe` says what a model must know.

One dataset is one file, `attnx/data/sources/<name>.py`, found by its name; it ends with
`DATASET = ` the class that its arguments build. Real data are TFDS builders, prepared once as
array_record files and read without TensorFlow; synthetic tasks are functions of (seed, index).
"""

from __future__ import annotations

from collections.abc import Mapping
import importlib
import pkgutil
from typing import Any

from attnx.core import registry
from attnx.data import pipeline
from attnx.data.dataset import Dataset, Description

FOLDER = "attnx.data.sources"


def names() -> list[str]:
  """Every dataset, without importing any."""
  return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(FOLDER).__path__))


def build(config: Mapping[str, Any]) -> tuple[Dataset, int | None]:
  """The dataset of a config and its batch size.

  "tfds:mnist" is short for the dataset `tfds` with the argument `dataset="mnist"`.
  """
  chosen = dict(config)
  if not isinstance(name := chosen.pop("name", None), str):
    raise ValueError(f"a data config wants a name, got {dict(config)}")
  name, _, argument = name.partition(":")
  if name not in (known := names()):
    raise KeyError(f"there is no dataset {name!r}; {registry.suggestion(name, known)}")
  make = importlib.import_module(f"{FOLDER}.{name}").DATASET
  wanted = registry.arguments(make)
  if argument and "dataset" not in wanted:
    raise ValueError(f"the dataset {name} takes nothing after a colon, got {argument!r}")
  chosen |= {"dataset": argument} if argument else {}
  batch = chosen.pop("batch", None)
  for key in chosen:
    if key not in wanted:
      raise TypeError(
        f"the dataset {name} takes no {key!r}; {registry.suggestion(key, [*wanted, 'batch'])}"
      )
  missing = [k for k, p in wanted.items() if p.default is p.empty and k not in chosen]
  if missing:
    raise TypeError(f"the dataset {name} needs {' and '.join(map(repr, missing))}")
  return registry.construct(f"the dataset {name}", make, chosen), batch


def describe(config: Mapping[str, Any]) -> Description:
  """What a model must know about the dataset of a config."""
  return build(config)[0].describe()


def batches(
  config: Mapping[str, Any],
  *,
  split: str,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> pipeline.Batches:
  """An iterator of batches, with `get_state` and `set_state`; the state is JSON.

  A batch is a dict of NumPy arrays. Tokens: `inputs`, `targets` (b, T) int32 and `weights` (b, T)
  float32; where rows are padded or packed also `positions` (-1 where there is no token) and
  `segments` (b, T) int32 (0 where there is no token). Images: `inputs` (b, H, W, C) float32,
  `targets` (b,) int32, `weights` (b,) float32. Row j of process p is row p b + j of the global
  batch.

  Args:
    config: `name`, `batch` (rows of the global batch) and the arguments of the dataset.
    split: "train" never ends and is shuffled anew in every epoch; every other split is one pass in
      order, the last batch filled up with rows of weight 0.
    seed: of the shuffles and of generated training examples. Other splits do not depend on it.
    process_index: p, which of the processes asks.
    process_count: b = batch / process_count rows go to each.

  Raises:
    ValueError, TypeError or KeyError for values, arguments or names that do not fit.
  """
  dataset, batch = build(config)
  if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
    raise ValueError(f"batch={batch!r} must be a positive integer, the rows of the global batch")
  if process_count < 1 or batch % process_count:
    raise ValueError(f"batch={batch} must be a multiple of process_count={process_count}")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index={process_index} must be in 0 .. {process_count - 1}")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed} must be in 0 .. 2**32 - 1")
  if split not in (splits := dataset.describe().splits):
    raise ValueError(f"split={split!r} must be one of {', '.join(map(repr, splits))}")
  return pipeline.iterate(
    dataset, batch=batch, split=split, seed=seed, index=process_index, count=process_count
  )
