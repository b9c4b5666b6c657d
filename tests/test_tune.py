"""Tables of block sizes, and the search that makes them."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import aot, blocks, tune
from pallas_kernels.algebra import LANES
from pallas_kernels.tpu.walk import Blocks

CHIPS = sorted(aot.TOPOLOGIES)
LENGTHS = [1, 100, 128, 130, 384, 500, 512, 1000, 1024, 1500, 2048, 4096, 5000, 32768]
WIDTHS = [(1, 1), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)]
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]


def test_every_chip_has_a_table():
  assert set(CHIPS) <= {path.stem for path in blocks.FOLDER.glob("*.json")}
  assert set(blocks.CHIPS.values()) == set(CHIPS)


@pytest.mark.parametrize("chip", CHIPS)
def test_entries_cut_their_own_tiles(chip):
  entries = blocks.table(chip)
  assert len({(e["H"], e["V"], e["dtype"]) for e in entries}) == len(entries)
  for entry in entries:
    for name in blocks.Chosen._fields:
      cut = blocks.cut(entry["q"], entry["k"], entry[name])
      assert (cut.rows, cut.columns) == (entry[name]["rows"], entry[name]["columns"])
      assert cut.ahead < len(cut.pieces())


@pytest.mark.parametrize("chip", CHIPS)
def test_entries_are_what_was_measured(chip):
  for entry in blocks.table(chip):
    assert entry["jax"] and entry["libtpu"]
    for name in blocks.Chosen._fields:
      told = entry[name]
      assert told["bundles"] > 0 and 0 < told["mxu"] <= 1 and told["spills"] >= 0
      assert 0 < told["vmem"] <= tune.VMEM[chip]


@pytest.mark.parametrize("chip", CHIPS)
def test_blocks_for_lengths_of_any_kind(chip):
  for T in LENGTHS:
    for S in LENGTHS:
      for H, V in WIDTHS:
        for dtype in DTYPES:
          chosen = blocks.choose(T, S, H, V, dtype, chip)  # Blocks raises where it is not valid
          assert len({(cut.q, cut.k) for cut in chosen}) == 1
          entry = blocks.nearest(blocks.table(chip), H, V, jnp.dtype(dtype).itemsize)
          for length, block, most in ((T, chosen[0].q, entry["q"]), (S, chosen[0].k, entry["k"])):
            count = -(-length // block)
            assert block <= most and count == -(-length // most)
            assert count * block - length < count * LANES


ENTRY = dict(
  H=128, V=128, dtype="bfloat16", q=512, k=1024,
  forward=dict(rows=256, columns=1024, ahead=1, lying=True),
  backward=dict(rows=512, columns=512, ahead=2, lying=False),
)  # fmt: skip


@pytest.fixture
def tables(tmp_path, monkeypatch):
  """A folder of tables to be written, which `choose` reads."""
  monkeypatch.setattr(blocks, "FOLDER", tmp_path)
  blocks.table.cache_clear()
  yield lambda *entries: (tmp_path / "v5e.json").write_text(json.dumps(dict(entries=entries)))
  blocks.table.cache_clear()


def test_lengths_of_whole_tiles_are_cut_as_the_table_says(tables):
  tables(ENTRY)
  assert blocks.choose(1024, 4096, 128, 128, jnp.bfloat16, "v5e") == (
    Blocks(512, 1024, 256, 1024, 1, True), Blocks(512, 1024, 512, 512, 2),
  )  # fmt: skip


def test_lengths_shorter_than_a_tile_have_one_smaller_tile(tables):
  tables(ENTRY)
  chosen = blocks.choose(200, 700, 128, 128, jnp.bfloat16, "v5e")
  assert chosen.forward == Blocks(256, 768, 256, 768, 1, True)
  assert chosen.backward == Blocks(256, 768, 256, 384, 2)
  one = blocks.choose(1, 1, 128, 128, jnp.bfloat16, "v5e")
  assert one == (Blocks(128, 128, 128, 128, 1), Blocks(128, 128, 128, 128, 2))  # nothing to fill


@pytest.mark.parametrize("length, q, rows", [
  (512, 512, 256), (513, 384, 384), (600, 384, 384), (1100, 384, 384), (1537, 512, 256),
  (1300, 512, 256), (4097, 512, 256),
])  # fmt: skip
def test_lengths_that_do_not_divide_have_even_tiles(tables, length, q, rows):
  tables(ENTRY)
  cut = blocks.choose(length, 1024, 128, 128, jnp.bfloat16, "v5e").forward
  assert (cut.q, cut.rows) == (q, rows)


@pytest.mark.parametrize("pairs, tile", [(0, (512, 1024)), (1, (512, 1024)), (2, (512, 512)),
                                         (3, (512, 256))])  # fmt: skip
def test_arrays_of_pairs_share_a_tile(tables, pairs, tile):
  tables(ENTRY)
  cut = blocks.choose(4096, 4096, 128, 128, jnp.bfloat16, "v5e", pairs=pairs).backward
  assert (cut.q, cut.k) == tile and cut.q * cut.k * pairs <= blocks.PAIRS


def test_the_nearest_shape_serves_those_that_have_none(tables):
  of = lambda H, V, dtype, q: ENTRY | dict(H=H, V=V, dtype=dtype, q=q)
  tables(
    of(128, 128, "bfloat16", 512), of(64, 64, "bfloat16", 1024), of(256, 256, "bfloat16", 256),
    of(128, 128, "float32", 2048),
  )  # fmt: skip
  q = lambda H, V, dtype: blocks.choose(2048, 2048, H, V, dtype, "v5e").forward.q
  assert q(64, 64, jnp.bfloat16) == q(40, 72, jnp.float16) == 1024
  assert q(128, 128, jnp.bfloat16) == q(120, 100, jnp.bfloat16) == 512
  assert q(192, 192, jnp.bfloat16) == q(576, 512, jnp.bfloat16) == 256
  assert q(256, 256, jnp.float32) == 2048  # bytes come before widths


def test_a_chip_without_a_table_is_refused_by_name(tables):
  tables(ENTRY)
  with pytest.raises(ValueError, match=r"chip='v4' has no table of blocks; known: v5e"):
    blocks.choose(128, 128, 128, 128, jnp.bfloat16, "v4")


class Paper:
  """In place of a `Bench`: figures by a formula, None where it returns None."""

  chip = "v5e"

  def __init__(self, formula):
    self.formula, self.asked = formula, []

  def of(self, kernel, shape, cuts):
    self.asked += [(kernel, cut) for cut in cuts]
    told = {cut: self.formula(kernel, cut) for cut in cuts}
    return {cut: figures for cut, figures in told.items() if figures is not None}


def flat(bundles: float, spills: float = 0) -> tune.Figures:
  return tune.Figures(bundles, 0.5, spills, 2**20)


def valley(kernel: str, cut: Blocks) -> tune.Figures:
  """Least at rows of 256 and one piece ahead; tiles of 2048 keys take 30 % less."""
  price = abs(cut.rows - 256) + 50 * abs(cut.ahead - 1)
  return flat((1000 + price) * (0.7 if cut.k == 2048 else 1.0))


def test_the_search_finds_the_floor_of_a_valley(tables):
  bench = Paper(valley)
  tile = tune.settle(tune.search(bench, tune.Shape(128, 128)))
  assert tile.k == 2048
  for cut, told in tile.chosen.values():
    assert (cut.rows, cut.ahead) == (256, 1) and told.bundles == 700
  assert len(set(bench.asked)) < 120  # of more than a thousand


def test_a_later_shape_begins_where_the_first_ended(tables):
  first = tune.search(Paper(valley), tune.Shape(128, 128))
  bench = Paper(valley)
  tile = tune.settle(tune.search(bench, tune.Shape(64, 64), first))
  assert (tile.q, tile.k) == tune.settle(first)[:2]
  assert len(set(bench.asked)) < 40


def test_larger_tiles_pay_for_fewer_steps():
  of = lambda q, k, bundles: tune.Tile(q, k, {"forward": (Blocks(q, k, 512, 512), flat(bundles))})
  small, large = of(512, 1024, 1000), of(1024, 2048, 1100)
  assert (small.cost, large.cost) == pytest.approx((1150, 1137.5))
  assert tune.settle([small, large]) == large
  assert tune.settle([small, of(1024, 2048, 1120)]) == small


def test_a_search_begins_at_what_the_table_says(tables):
  tables(ENTRY)
  bench = Paper(valley)
  tune.search(bench, tune.Shape(128, 128))
  assert bench.asked[0] == ("forward", Blocks(512, 1024, 256, 1024, 0, True))


def test_fewer_spills_are_preferred_within_a_tie():
  cuts = [Blocks(512, 1024, rows, 512, 0) for rows in (128, 256, 512)]
  found = dict(zip(cuts, (flat(1000, 300), flat(1009, 100), flat(1020, 0))))
  assert tune.best(found) == (cuts[1], found[cuts[1]])


def test_tiles_that_hold_a_tile_which_does_not_fit_are_not_tried(tables):
  formula = lambda kernel, cut: flat(1000) if cut.q * cut.k < 2**20 else None
  bench = Paper(formula)
  tiles = tune.search(bench, tune.Shape(128, 128))
  assert {(tile.q, tile.k) for tile in tiles} == {(512, 512), (512, 1024), (1024, 512)}
  assert not any(cut.q * cut.k > 2**20 for _, cut in bench.asked)
  assert tune.search(Paper(lambda kernel, cut: None), tune.Shape(128, 128)) == []


SPAN = dict(share={"MXU": 0.75}, spills=40)
REPORT = dict(kernels={
  "attnx_forward.1": dict(regions=[SPAN | dict(bundles=3000)], vmem=5 * 2**20),
  "copy.2": dict(regions=[], vmem=0),
})  # fmt: skip


def test_figures_are_per_512_x_512_scores():
  told = tune.figures(REPORT, Blocks(512, 2048, 512, 512, 0))
  assert told == tune.Figures(bundles=750.0, mxu=0.75, spills=10.0, vmem=5 * 2**20)


@pytest.fixture
def measured(monkeypatch):
  """Cases handed to a compiler that answers at once; rows of 128 do not compile."""
  monkeypatch.setattr(tune, "releases", lambda: dict(jax="1", libtpu="2"))
  cases = []

  def measure(case, chip, folder):
    cases.append(case)
    return dict(error="no memory") if "rows=128" in case else REPORT

  monkeypatch.setattr(aot, "measure", measure)
  return cases


def test_figures_are_kept_and_read_again(tmp_path, measured):
  kept, shape = tmp_path / "new" / "kept.jsonl", tune.Shape(64, 64)
  cuts = [Blocks(512, 1024, rows, 512, 0) for rows in (128, 256)]
  for _ in range(2):
    found = tune.Bench("v5e", kept).of("backward", shape, cuts)
    assert list(found) == cuts[1:] and found[cuts[1]].bundles == 1500
  assert len(measured) == len(kept.read_text().splitlines()) == 2
  stale = kept.read_text().replace(tune.digest(), "of other sources")
  kept.write_text(stale)
  tune.Bench("v5e", kept).of("backward", shape, cuts)
  assert len(measured) == 4


def test_cases_carry_the_shape_and_the_blocks():
  case = tune.target("backward", tune.Shape(192, 128, "float32"), Blocks(512, 512, 256, 512, 1))
  name, options = aot.split(case)
  assert name == "streaming.softmax.backward"
  cut = {n: options.pop(n) for n in [field.name for field in dataclasses.fields(Blocks)]}
  assert Blocks(**cut) == Blocks(512, 512, 256, 512, 1)
  assert options == dict(H=192, V=128, dtype="float32")


def test_what_does_not_fit_the_memory_of_the_chip_is_out(tmp_path, measured, monkeypatch):
  monkeypatch.setitem(tune.VMEM, "v5e", 2**20)
  bench = tune.Bench("v5e", tmp_path / "kept.jsonl")
  assert bench.of("backward", tune.Shape(64, 64), [Blocks(512, 512, 512, 512, 0)]) == {}


def test_a_new_entry_replaces_the_one_of_its_shape_alone(tmp_path):
  path = tmp_path / "v5e.json"
  for q in (512, 1024):
    tune.write(path, ENTRY | dict(q=q))
    tune.write(path, ENTRY | dict(dtype="float32"))
  entries = json.loads(path.read_text())["entries"]
  assert [(e["dtype"], e["q"]) for e in entries] == [("bfloat16", 1024), ("float32", 512)]


@pytest.mark.parametrize("arguments, words", [
  (["--chip", "h100"], "--chip 'h100' is not one of v5e"),
  (["--chip", "v5e", "--shapes", "128"], "'128' is not like 128x128"),
  (["--chip", "v5e", "--shapes", "128x128:int8"], "bfloat16 or float32"),
  (["--chip", "v5e", "--jobs", "0"], "--jobs 0 must be at least 1"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(arguments, words, capsys):
  assert tune.main(arguments) == aot.USAGE
  told = capsys.readouterr().err
  assert told.count("\n") == 1 and words in told


def test_an_interrupted_search_says_how_to_go_on(tmp_path, monkeypatch, capsys):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(aot, "installed", lambda chip: None)
  monkeypatch.setattr(tune, "digest", lambda: "")
  monkeypatch.setattr(tune, "search", interrupted)
  kept = str(tmp_path / "kept.jsonl")
  assert tune.main(["--chip", "v5e", "--kept", kept]) == tune.INTERRUPTED
  assert "the same command goes on" in capsys.readouterr().err
