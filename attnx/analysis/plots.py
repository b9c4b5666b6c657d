"""Pictures of what heads look at and of how a loss fell, written as files; no display is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import os
import textwrap
from typing import Any

import matplotlib as mpl
from matplotlib import colors, figure
import numpy as np

COLUMNS, PIXELS, LABELLED = 8, 128, 32  # heads and places that are drawn, tokens that are named
FAINTEST = 1e-3  # share of the largest weight of its row below which colours do not tell
SIGNS = {"\n": "↵", "\t": "⇥", " ": "␣", "": "∅"}


def heads(
  weights: Mapping[str, Any],
  path: str | os.PathLike,
  *,
  title: str,
  labels: Sequence[str] | None = None,
) -> None:
  """Draws w_ts / max_s |w_ts| of every layer (a row) and head (a column), on one log scale.

  Rows are divided by their largest magnitude, so that maps that do not sum to one, such as those of
  recurrences, read like those that do. Maps with negative weights have a diverging colour; grey is
  exactly zero. Of more than 8 heads, 8 evenly spaced ones are drawn, and of more than 128 places
  the largest magnitude of each block of them; both are written beside the layer.

  Args:
    weights: name of a layer to its maps (N, T, S), in the order that they are drawn in.
    path: of the PNG.
    title: above all.
    labels: a string for each key, and for each query where there are as many; drawn up to 32.

  Raises:
    ValueError: there is nothing to draw, or `labels` fit no map.
  """
  maps = {name: np.asarray(x, np.float32) for name, x in weights.items()}
  if not maps or any(x.ndim != 3 or 0 in x.shape for x in maps.values()):
    shapes = {name: x.shape for name, x in maps.items()}
    raise ValueError(f"weights have shapes {shapes}; expected (N, T, S), none of them 0")
  if labels is not None and all(len(labels) != x.shape[2] for x in maps.values()):
    raise ValueError(f"labels are {len(labels)}, and no map has as many keys; give one each")
  named = [] if labels is None or len(labels) > LABELLED else [visible(text) for text in labels]
  columns, side = min(COLUMNS, max(map(len, maps.values()))), max(1.5, 0.105 * len(named))
  height = len(maps) * (side + 0.25) + 0.6
  fig = figure.Figure((columns * side + 2, height), layout="constrained")
  grid, images = fig.subplots(len(maps), columns, squeeze=False), {}
  for i, (name, x) in enumerate(maps.items()):
    chosen = np.linspace(0, len(x) - 1, min(columns, len(x))).astype(int)
    block, signed = math.ceil(max(x.shape[1:]) / PIXELS), bool((x < 0).any())
    notes = [f"{len(chosen)} of {len(x)} heads"] * (len(chosen) < len(x))
    notes += [f"{block} x {block} places a pixel"] * (block > 1)
    grid[i, 0].set_ylabel("\n".join([name, *notes]), fontsize=7)
    for j, ax in enumerate(grid[i]):
      if j >= len(chosen):
        ax.set_axis_off()
        continue
      images[signed] = draw(ax, shrunk(x[chosen[j]], block), signed)
      ax.set_title(f"head {chosen[j]}", fontsize=7, pad=2)
      rows, keys = (named if len(named) == n else [] for n in x.shape[1:])
      text = dict(fontsize=6, family="monospace", parse_math=False)
      ax.set_yticks(range(len(rows) if j == 0 else 0), rows if j == 0 else [], **text)
      below = keys if i == len(maps) - 1 else []
      ax.set_xticks(range(len(below)), below, rotation=90, **text)
      ax.tick_params(length=0, pad=1)
  share = min(1.0, 4 / height)
  for signed, image in sorted(images.items()):
    bar = fig.colorbar(image, ax=grid, shrink=share, aspect=share * height / 0.12, pad=0.01)
    bar.set_label("weight / largest |weight| of its row", fontsize=7)
    bar.ax.tick_params(labelsize=7)
  words = textwrap.fill(title, int(11 * fig.get_figwidth()))
  fig.suptitle(words, fontsize=10, parse_math=False)
  save(fig, path)


def draw(ax, x: np.ndarray, signed: bool):
  """One map in the colours that all maps of its kind share."""
  norm: Any = colors.LogNorm(FAINTEST, 1, clip=True)
  if signed:
    norm = colors.SymLogNorm(10 * FAINTEST, vmin=-1, vmax=1)
  palette = mpl.colormaps["RdBu_r" if signed else "viridis"].with_extremes(bad="#d9d9d9")
  aspect = "equal" if x.shape[0] == x.shape[1] else "auto"
  style = dict(norm=norm, cmap=palette, interpolation="nearest", aspect=aspect)
  return ax.imshow(np.ma.masked_equal(x, 0), **style)


def shrunk(x: np.ndarray, block: int) -> np.ndarray:
  """Rows (T, S) over their largest magnitude, and of block x block places the largest of those."""
  largest = np.abs(x).max(-1, keepdims=True)
  x = np.pad(x / np.where(largest > 0, largest, 1), [(0, -n % block) for n in x.shape])
  t, s = (n // block for n in x.shape)
  tiles = x.reshape(t, block, s, block).swapaxes(1, 2).reshape(t, s, -1)
  return np.take_along_axis(tiles, np.abs(tiles).argmax(-1)[..., None], -1)[..., 0]


def visible(text: str) -> str:
  """A token as it can be read: white space as signs, what has no glyph as an escape."""
  sign = lambda c: SIGNS.get(c) or (c if c.isprintable() and ord(c) < 0x250 else ascii(c)[1:-1])
  return "".join(map(sign, text)) or SIGNS[""]


def curve(
  rows: Sequence[Mapping[str, Any]],
  path: str | os.PathLike,
  *,
  title: str = "",
  baselines: Mapping[str, float] | None = None,
  unit: str = "bits per byte",
  per_nat: float = 1 / math.log(2),
) -> None:
  """Draws the loss by step: of training raw and as a moving mean, points where it was held out.

  Args:
    rows: as in metrics.jsonl: `step`, and `loss` or `eval_loss` in nats; None is left out.
    path: of the PNG.
    title: above all.
    baselines: name to a value in `unit`, each a horizontal line.
    unit: of the vertical axis.
    per_nat: how many units a nat is.

  Raises:
    ValueError: no row has a loss.
  """
  series = lambda name: np.array(
    [(row["step"], row[name] * per_nat) for row in rows if row.get(name) is not None]
  ).reshape(-1, 2).T  # fmt: skip
  (steps, loss), (at, held_out) = series("loss"), series("eval_loss")
  if not steps.size + at.size:
    raise ValueError(f"rows are {len(rows)}, and none has a loss or an eval_loss")
  fig = figure.Figure((7, 4), layout="constrained")
  ax = fig.subplots()
  if steps.size:
    ax.plot(steps, loss, color="#b9c9dd", lw=0.8, label="training")
    ax.plot(steps, smoothed(loss), color="#2f6db3", lw=1.5, label="training, smoothed")
  if at.size:
    last = f"held out, {held_out[-1]:.3f} at last"
    ax.plot(at, held_out, color="#c8442a", marker="o", ms=3.5, lw=0.8, label=last)
  name_baselines(ax, baselines or {})
  ax.set(xlabel="step", ylabel=unit)
  ax.set_title(title, fontsize=10, parse_math=False)
  ax.grid(alpha=0.25)
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(frameon=False, fontsize=8)
  save(fig, path)


def name_baselines(ax, baselines: Mapping[str, float]) -> None:
  """A line for each, named at its right end; names that would meet stand above each other."""
  for value in baselines.values():
    ax.axhline(value, color="#555555", lw=0.9, ls=(0, (5, 3)))
  free, height = -math.inf, np.ptp(ax.get_ylim())
  for name, value in sorted(baselines.items(), key=lambda item: item[1]):
    text = [*textwrap.wrap(name, 16), f"{value:.3f}"]
    reach = 0.024 * len(text) * height
    place = max(value, free + reach)
    free = place + reach
    ax.text(1.01, place, "\n".join(text), transform=ax.get_yaxis_transform(), fontsize=8,
            color="#555555", va="center", parse_math=False)  # fmt: skip


def smoothed(x: np.ndarray, share: float = 0.04) -> np.ndarray:
  """Means of windows of `share` of all points, centred; shorter at both ends, to follow a fall."""
  place, reach = np.arange(len(x)), max(1, int(share * len(x) / 2))
  before = np.minimum(reach, place)
  after = np.minimum(before, place[::-1])
  total = np.r_[0, np.cumsum(x)]
  return (total[place + after + 1] - total[place - before]) / (before + after + 1)


def save(fig: figure.Figure, path: str | os.PathLike) -> None:
  """Writes a PNG, the same bytes for the same picture."""
  fig.savefig(path, format="png", dpi=130, metadata={"Software": None})
