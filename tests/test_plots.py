"""Pictures are written, say what they leave out, and colour what they should."""

import math

from matplotlib import figure, image
import numpy as np
import pytest

from attnx.analysis import plots

T = 6
LOWER = np.tril(np.ones((T, T)))
RNG = np.random.default_rng(0)
ROWS = [dict(step=s, loss=3.0 / s if s != 3 else None, grad_norm=1.0) for s in range(1, 40)]
ROWS += [dict(step=s, eval_loss=math.log(2) * 3.5 / s) for s in (10, 20, 30)]


@pytest.fixture
def drawn(monkeypatch):
  """Figures that were saved, beside their files."""
  figures, save = [], plots.save
  monkeypatch.setattr(plots, "save", lambda fig, path: (figures.append(fig), save(fig, path)))
  return figures


def panels(fig: figure.Figure):
  return [ax for ax in fig.axes if ax.images]


def shown(ax) -> np.ndarray:
  return np.ma.filled(ax.images[0].get_array(), 0)


def test_there_is_a_panel_for_every_head_of_every_layer_and_a_png(tmp_path, drawn):
  maps = {"blocks/0": RNG.uniform(size=(3, T, T)) * LOWER, "blocks/1": np.ones((2, T, T))}
  plots.heads(maps, tmp_path / "heads.png", title="$x and _y")
  assert len(panels(drawn[0])) == 5 and image.imread(tmp_path / "heads.png").ndim == 3
  assert [ax.get_ylabel() for ax in panels(drawn[0]) if ax.get_ylabel()] == list(maps)


def test_the_same_maps_give_the_same_bytes(tmp_path):
  for name in "ab":
    plots.heads({"layer": LOWER[None]}, tmp_path / name, title="twice")
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rows_are_divided_by_their_largest_weight_so_that_scales_do_not_show(tmp_path, drawn):
  x = RNG.uniform(0.1, 1, size=(1, T, T)) * LOWER
  scaled = x * np.logspace(-8, 8, T)[:, None]
  plots.heads({"plain": x, "scaled": scaled}, tmp_path / "x.png", title="scales")
  plain, other = map(shown, panels(drawn[0]))
  np.testing.assert_allclose(plain, other, rtol=1e-5)
  np.testing.assert_allclose(plain.max(-1), 1.0, rtol=1e-6)


def test_signed_maps_diverge_around_zero_and_what_is_zero_is_grey(tmp_path, drawn):
  x = RNG.normal(size=(1, T, T)) * LOWER
  plots.heads({"signed": x, "plain": abs(x)}, tmp_path / "x.png", title="signs")
  signed, plain = (ax.images[0] for ax in panels(drawn[0]))
  assert (signed.norm.vmin, signed.norm.vmax) == (-1, 1) and plain.norm.vmin > 0
  zero, below, above = signed.to_rgba(np.ma.masked_equal([0.0, -0.5, 0.5], 0))
  assert np.ptp(zero[:3]) == 0 and below[2] > below[0] and above[0] > above[2]


def test_of_many_heads_and_places_some_are_drawn_and_it_says_so(tmp_path, drawn):
  x = np.zeros((32, 300, 300))
  x[:, 150:, 299] = -0.25
  x[:, :, 0] = 1.0
  plots.heads({"wide": x}, tmp_path / "x.png", title="many")
  axes = panels(drawn[0])
  assert len(axes) == 8 and (axes[0].get_title(), axes[-1].get_title()) == ("head 0", "head 31")
  assert axes[0].get_ylabel() == "wide\n8 of 32 heads\n3 x 3 places a pixel"
  assert shown(axes[0]).shape == (100, 100)
  assert set(shown(axes[0])[50:, -1]) == {-0.25} and not shown(axes[0])[:50, -1].any()


def test_tokens_are_named_where_they_are_few_and_fit(tmp_path, drawn):
  cross = RNG.uniform(size=(2, 3, T))
  labels = ["def", " f", "\n", "$a_", "中", ""]
  plots.heads({"cross": cross}, tmp_path / "x.png", title="tokens", labels=labels)
  first, second = panels(drawn[0])
  names = [text.get_text() for text in first.get_xticklabels()]
  assert names == ["def", "␣f", "↵", "$a_", "\\u4e2d", "∅"] and not first.get_yticklabels()
  plots.heads({"self": np.ones((2, T, T))}, tmp_path / "x.png", title="tokens", labels=labels)
  first, second = panels(drawn[1])
  assert len(first.get_yticklabels()) == T and not second.get_yticklabels()
  with pytest.raises(ValueError, match="labels are 5"):
    plots.heads({"cross": cross}, tmp_path / "x.png", title="tokens", labels=labels[:5])


@pytest.mark.parametrize("maps", [{}, {"a": np.ones((2, 2))}, {"a": np.ones((0, 2, 2))}])
def test_what_is_not_a_map_is_refused(tmp_path, maps):
  with pytest.raises(ValueError, match="expected"):
    plots.heads(maps, tmp_path / "x.png", title="nothing")


def test_the_curve_is_in_bits_and_names_its_baselines(tmp_path, drawn):
  plots.curve(ROWS, tmp_path / "x.png", title="run", baselines={"xz -9": 1.9, "order 0": 4.6})
  (ax,) = drawn[0].axes
  raw, smooth, held_out, *lines = ax.lines
  np.testing.assert_allclose(held_out.get_xydata(), [(10, 0.35), (20, 0.175), (30, 3.5 / 30)])
  assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 38  # None is left out
  np.testing.assert_allclose(raw.get_ydata()[0], 3 / math.log(2))
  assert [line.get_ydata()[0] for line in lines] == [1.9, 4.6]
  assert [text.get_text() for text in ax.texts] == ["xz -9\n1.900", "order 0\n4.600"]
  assert ax.get_ylabel() == "bits per byte" and (tmp_path / "x.png").stat().st_size


def test_names_of_baselines_that_are_near_stand_above_each_other(tmp_path, drawn):
  near = {"b": 2.0, "one name that is wrapped": 1.99, "c": 2.01}
  plots.curve(ROWS, tmp_path / "x.png", baselines=near)
  (ax,) = drawn[0].axes
  drawn[0].canvas.draw()
  boxes = [text.get_window_extent() for text in ax.texts]
  assert [text.get_text()[0] for text in ax.texts] == ["o", "b", "c"]
  assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:]))


def test_a_curve_without_a_loss_is_refused(tmp_path):
  with pytest.raises(ValueError, match="none has a loss"):
    plots.curve([dict(step=1, grad_norm=2.0)], tmp_path / "x.png")


def test_smoothing_keeps_lines_and_lessens_noise():
  np.testing.assert_allclose(plots.smoothed(np.arange(200.0))[:190], np.arange(190.0))
  noise = RNG.normal(size=1000)
  assert plots.smoothed(noise).std() < 0.3 * noise.std() and len(plots.smoothed(noise[:1])) == 1
