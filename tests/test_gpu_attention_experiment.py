"""The measuring script runs where there is no GPU, checks what it times, and judges as it says."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.gpu_attention import cases, peers, plot, run
from experiments.gpu_attention.run import UNMEASURED

SETTING = run.Setting(repeats=2, sample=0.0, threads=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """results.json of the forward passes of all kinds, and the folder that it is in."""
  folder = tmp_path_factory.mktemp("gpu")
  out = folder / "results.json"
  run.main(["--smoke", "--repeats", "2", "--only", "forward", "--out", str(out)])
  return folder, json.loads(out.read_text())


def case(kind, mask, direction="backward"):
  chosen = [c for c in cases.planned(cases.SMOKE) if (c.kind, c.mask) == (kind, mask)]
  return next(c for c in chosen if c.direction == direction)


def test_every_kind_of_case_is_measured_and_right(found):
  rows = found[1]["rows"]
  masks = {row["mask"] for row in rows}
  assert masks == {"full", "causal", *cases.SPECIAL, *cases.RECURRENCES}
  assert {row["kind"] for row in rows} == set(peers.OF_KIND)
  for row in rows:
    own = peers.RECURRENT if row["kind"] == "recurrence" else peers.CHUNKED
    assert 0 < row["errors"][own] < run.TOLERANCE["forward"] and row["seconds"][own] > 0
  plain = next(row for row in rows if row["kind"] == "plain")
  assert {peers.AUTO, peers.CHUNKED, peers.XLA} <= set(plain["seconds"])


def test_peers_that_are_not_here_are_listed_with_a_reason(found):
  plain = next(row for row in found[1]["rows"] if row["kind"] == "plain")
  assert plain["left_out"][peers.RAW].startswith("absent: cuDNN runs on NVIDIA GPUs, not on cpu")
  assert set(plain["seconds"]) | set(plain["left_out"]) == set(peers.OF_KIND["plain"])
  assert not set(plain["seconds"]) & set(plain["left_out"])
  assert {"device", "driver", "jax", "torch"} <= set(found[1]["machine"])


def test_visible_pairs_are_counted(found):
  pairs = {row["mask"]: row["pairs"] for row in found[1]["rows"] if row["kind"] != "decode"}
  T = cases.SMOKE.special
  near, block = math.prod(cases.SMOKE.near), cases.SMOKE.block
  assert pairs["soft_cap_alibi"] == T * (T + 1) / 2 and pairs["neighbourhood"] == T * near
  assert pairs["top_k_blocks"] == T * block * max(1, T // block // 8)
  document = cases.documents(T)
  i, j = np.mgrid[:T, :T]
  seen = (i >= j) & (i - j < cases.SMOKE.window) & (document[i] == document[j])
  assert pairs["packed"] == seen.sum() and len(set(document)) == 8


def test_the_results_are_drawn(found):
  folder, results = found
  plot.main([str(folder / "results.json")])
  assert (folder / "plot.png").stat().st_size > 10_000
  table = plot.rates(results["rows"])
  assert all(len(row) == len(table[0]) for row in table)
  text = "a\n<!-- rates -->\nold\n<!-- /rates -->\nb"
  assert "old" not in plot.put(text, "rates", table, {"device": "x"})


@pytest.mark.parametrize("mask", ["causal", "gated_delta", "top_k_blocks"])
def test_gradients_are_measured_apart_and_right(mask):
  kind = {"causal": "plain", "gated_delta": "recurrence", "top_k_blocks": "special"}[mask]
  row = run.measured(case(kind, mask), SETTING)
  own = peers.RECURRENT if kind == "recurrence" else peers.CHUNKED
  assert 0 < row["errors"][own] < run.TOLERANCE["backward"] and row["seconds"][own] > 0
  assert row["flops"] == 10 * row["B"] * row["N"] * row["H"] * row["pairs"]


def test_a_series_that_is_wrong_or_fails_gets_no_time(monkeypatch):
  def wrong(case, given):
    mean = lambda q, k, v: jnp.broadcast_to(v.mean(1, keepdims=True), q.shape)
    return peers.compiled(case, given, mean)

  def fails(case, given):
    raise RuntimeError("no plan\nwas found")

  monkeypatch.setitem(peers.SERIES, peers.CHUNKED, wrong)
  monkeypatch.setitem(peers.SERIES, peers.XLA, fails)
  row = run.measured(case("plain", "causal", "forward"), SETTING)
  assert row["left_out"][peers.CHUNKED].startswith("wrong: relative error")
  assert row["left_out"][peers.XLA] == "RuntimeError: no plan"
  assert set(row["seconds"]) == {peers.AUTO}


def test_a_budget_that_is_spent_ends_the_run_with_what_there_is(tmp_path, capsys):
  out = tmp_path / "results.json"
  run.main(["--smoke", "--budget-s", "-1", "--out", str(out)])
  results = json.loads(out.read_text())
  assert results["rows"] == [] and {line[4] for line in results["bars"][1:]} == {UNMEASURED}
  assert "cases left out" in capsys.readouterr().err


def row(kind, mask="causal", direction="forward", T=8192, H=128, pairs=1.0, **seconds):
  times = {getattr(peers, name): value for name, value in seconds.items()}
  return dict(kind=kind, mask=mask, direction=direction, T=T, S=T, H=H, pairs=pairs,
              name=f"{kind} {mask} T={T}", seconds=times)  # fmt: skip


def verdicts(*rows):
  return {line[0]: (line[2], line[4]) for line in run.bars(list(rows))[1:]}


def test_bars_are_judged_at_their_worst_case():
  said = verdicts(
    row("plain", AUTO=1.0, RAW=0.98, OWN=1.0, TOKAMAX=0.95),
    row("plain", AUTO=1.0, RAW=1.5, OWN=1.0, TOKAMAX=2.0),
    row("plain", direction="backward", H=256, OWN=1.0, TOKAMAX=1.2),
    row("special", "packed", pairs=0.5 * 8192**2, OWN=1.0, PLAIN=1.8, FLEX=1.3),
    row("decode", "full", OWN=1.0, COPY=0.79),
    row("recurrence", "scalar_decay", T=4096, RECURRENT=1.0, AUTO=1.4, RAW=1.1),
    row("recurrence", "scalar_decay", T=2048, RECURRENT=1.0, AUTO=0.1),
    row("recurrence", "gated_delta", T=4096, RECURRENT=1.0, AUTO=1.4, RAW=0.9),
  )
  assert said["rate of attnx auto / JAX cuDNN, where cuDNN can run"] == ("0.98", "pass")
  assert said["rate of attnx mosaic_gpu / tokamax Mosaic, forward, H=128"] == ("0.95", "pass")
  assert said["rate of attnx mosaic_gpu / tokamax Mosaic, backward, H=256"] == ("1.2", "FAIL")
  assert said["packed: rate per visible FLOP / plain"] == ("0.9", "pass")
  assert said["packed: speed-up / bound of FLOPs"] == ("0.9", "pass")
  assert said["packed: rate of attnx mosaic_gpu / FlexAttention"] == ("1.3", "pass")
  assert said["decoding: bandwidth / that of a device copy"] == ("0.79", "FAIL")
  assert said["scalar_decay: best softmax / recurrence, from 4096 tokens"] == ("1.1", "pass")
  assert said["gated_delta: best softmax / recurrence, from 4096 tokens"] == ("0.9", "FAIL")
  assert said["top_k_blocks: speed-up / bound of FLOPs"] == ("", UNMEASURED)


def test_the_plan_begins_with_what_the_bars_hang_on():
  planned = cases.planned(cases.Sizes())
  assert len(planned) == len(set(planned)) > 100
  first = planned[:14]
  assert {c.H for c in first if c.kind == "plain"} == {64, 128, 256}
  assert {c.mask for c in first} >= {*cases.SPECIAL, *cases.RECURRENCES, "causal", "full"}
  assert all(c.B * c.T == 16384 or c.T > 16384 for c in planned if c.kind == "plain")
