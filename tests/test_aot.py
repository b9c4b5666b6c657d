"""`python -m pallas_kernels.aot`: what it reads of a schedule, and what it says of mistakes."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels import aot, cases, schedule

ROOT = pathlib.Path(__file__).parent.parent

# A loop (region 2) around a body (region 3) with matrix work, then a second body (region 5).
BUNDLES = """= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov 0 }
   0x1   :  { %s2 = smov 1 } /* Start region 2 */
   0x2 LB: > { %p1 = scmp.eq.s32 %s1, 0  ;;  %3 = sbr.rel (%p1) target = $region4 } /* phi
second line of a comment */ /* Start region 3 */
   0x3   : >> { %4 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %5 = vmatmul.bf16.gmra.mxu1 %v2 }
   0x4   : >> { %6 = vst [vmem:[#allocation1_spill] sm:$0xff] %v3 }
   0x5   : >> { %7 = vmatmul.mubr.f32.gmra.mrb[0].mxu0 %v1 } /* End region 3 */
   0x6 PF: > { %8 = sfence }
   0x7   : >> { %9 = vmatmul.f32.gmra.mxu0 %v1 } /* Start region 5 */ /* End region 5 */
   0x8   : > { %10 = vld [vmem:[%s1] sm:$0xff] } /* End region 2 */
   0x9   :  { %11 = sfence }
"""
UNITS = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
TAKEN = ["0"] * 3 + ["2", "0", "1", "0", "1", "0", "0"]
SPILLED = ["0"] * 4 + ["1"] + ["0"] * 5
UTILISATION = "\n".join([
  "== CAPACTIY:", UNITS, "    2     2     4     2     1     3     3     1     1     2",
  "== UTILIZATION:",
  *(f"{mxu} 0 4 0 0 0 0 {spill} {spill} 0" for mxu, spill in zip(TAKEN, SPILLED)),
])  # fmt: skip
REPORT = """<script> const DATA ={"global_info": {"vmem_capacity": 1024}, "hlo_breakdowns": {
  "flash.1": {"total_size": 300, "blocks": [{"allocations": [
    {"size": 200, "tag": "input window"}, {"size": 60, "tag": "SPILL"}]}]}}};
const more = {}; </script>"""


def test_bundles_are_told_apart_where_comments_span_lines():
  texts = schedule.bundles(BUNDLES)
  assert len(texts) == 10
  assert "second line" in texts[2] and "vmatmul" in texts[3]


def test_runs_are_unbroken_and_innermost():
  assert schedule.runs(schedule.bundles(BUNDLES)) == [
    (0, 0, 1), (2, 1, 2), (3, 2, 6), (2, 6, 7), (5, 7, 8), (2, 8, 9), (0, 9, 10),
  ]  # fmt: skip


def test_figures_of_the_kernel_its_hot_span_and_its_regions():
  figures = schedule.kernel(UTILISATION, BUNDLES)
  assert (figures["bundles"], figures["floor"], figures["spills"]) == (10, 2, 1)
  assert figures["products"] == {"bf16": 2, "f32": 2}
  assert figures["hot"]["bundles"] == 5
  assert figures["hot"]["share"]["MXU"] == pytest.approx(4 / (2 * 5))
  first, second = figures["regions"]
  assert (first["region"], first["first"], first["bundles"], first["spills"]) == (3, 2, 4, 1)
  assert first["products"] == {"bf16": 2, "f32": 1}
  assert first["share"]["MXU"] == pytest.approx(3 / (2 * 4))
  assert (second["region"], second["bundles"], second["share"]["MXU"]) == (5, 1, 0.5)


def test_without_matrix_work_the_hot_span_is_the_longest_region():
  idle = UTILISATION.replace("\n2 ", "\n0 ").replace("\n1 ", "\n0 ")
  figures = schedule.kernel(idle, BUNDLES)
  assert figures["regions"] == [] and figures["hot"]["bundles"] == 4


def test_a_dump_of_another_format_is_refused():
  with pytest.raises(ValueError, match="lists 10 bundles but the use of 9: this release of libtpu"):
    schedule.kernel(UTILISATION.rpartition("\n")[0], BUNDLES)


def test_vmem_and_the_part_that_spills_take():
  assert schedule.vmem(REPORT) == {"flash.1": dict(vmem=300, vmem_spilled=60)}


def test_a_folder_of_dumps_is_read_by_kernel(tmp_path):
  for number, (what, text) in enumerate(
    [(schedule.UTILISATION, UTILISATION), (schedule.BUNDLES, BUNDLES)]
  ):
    for name in ("flash.1", "TLP", "<late-initialization>"):
      (tmp_path / f"17-{name}-7{number}-{what}.txt").write_text(text)
  (tmp_path / "17-flash.1-73-schedule-analysis_final_bundles.txt").write_text("not this one")
  (tmp_path / "17-TLP-83-vmem_report.html").write_text(REPORT)
  figures = schedule.read(tmp_path)
  assert list(figures) == ["flash.1"]
  assert figures["flash.1"]["vmem"] == 300 and figures["flash.1"]["bundles"] == 10


def test_the_table_shows_every_span():
  kernel = schedule.kernel(UTILISATION, BUNDLES) | dict(vmem=2048, vmem_spilled=0, pallas=True)
  text = aot.table(dict(
    case="flash", chip="v5e", seconds=1.0, argument_bytes=2**21, output_bytes=1024, temp_bytes=0,
    collectives={"all-reduce": 2}, custom_calls={}, kernels={"flash.1": kernel}, assembled={},
  ))  # fmt: skip
  assert "arguments 2.00 MiB, outputs 1.0 KiB" in text and "2 all-reduce" in text
  spans = {line.split("  ")[2].strip(): line.split() for line in text.splitlines()[5:]}
  assert list(spans) == ["all", "hot", "region 3", "region 5"]
  assert spans["hot"][1:4] == ["5", "2", "0.400"]


def test_collectives_are_counted_once_where_they_are_asynchronous():
  text = """
    %a = f32[8] all-reduce(%x), to_apply=%add
    %b = (f32[8], f32[16]) all-gather-start(%x), dimensions={0}
    %c = f32[16] all-gather-done(%b)
    %d = f32[8] reduce-scatter(%x)"""
  assert aot.COLLECTIVE.findall(text) == ["all-reduce", "all-gather", "reduce-scatter"]


@pytest.mark.parametrize(
  "stderr, code, expected",
  [
    ("Traceback (most recent call last):\n  File\nValueError: two\n lines\n", 1,
     "ValueError: two lines"),
    ("log\nTraceback (most recent call last):\n  a\nKeyError: 1\n\nDuring:\n\n"
     "Traceback (most recent call last):\n  b\n    c\nTypeError: last\n", 1, "TypeError: last"),
    ('Traceback (most recent call last):\n  a\nOom: no room for %x.1 = f32[2]{0} custom-call(%y),'
     ' metadata={op_name="f" stack_frame_id=15}. 22M is above 16M.\n', 1,
     "Oom: no room for %x.1. 22M is above 16M."),
    ("check failed", -6, "the compiler was ended by signal 6; --traceback shows what it wrote"),
  ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_one_line(stderr, code, expected):
  assert aot.reason(stderr, code) == expected


def test_registers_and_spills_of_a_gpu_kernel_are_read():
  output = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'flash' for 'sm_90a'
ptxas info    : Function properties for flash
    0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
"""
  assert aot.assembled(output) == {"flash": dict(registers=168, stored=8, loaded=16)}


def test_names_carry_options():
  assert aot.split("a.b:c") == ("a.b:c", {})
  assert aot.split("a.b:c(n=512, mask='full')") == ("a.b:c", dict(n=512, mask="full"))


def test_patterns_stand_for_registered_names(monkeypatch):
  monkeypatch.setattr(cases, "CASES", {})
  for name in ("flash.full", "flash.causal", "decode"):
    cases.case(name)(lambda: None)
  assert aot.chosen(["flash.*", "flash.full", "decode(n=1)"]) == [
    "flash.causal", "flash.full", "decode(n=1)",
  ]  # fmt: skip
  with pytest.raises(ValueError, match="'decode' is registered already"):
    cases.case("decode")(lambda: None)


CASES = """
import jax, jax.numpy as jnp
def number(): return 3
def arrays(): return abs, [jnp.ones(3)]
def sized(n=128): return jnp.sin, jax.ShapeDtypeStruct((n,), jnp.float32)
"""


@pytest.mark.parametrize(
  "target, expected",
  [
    ("mistakes:number", "mistakes:number returned int; expected a tuple (fn, shapes)"),
    ("mistakes:arrays", "among its shapes; expected jax.ShapeDtypeStruct only"),
    ("mistakes:absent", "the module 'mistakes' has no function 'absent'"),
    ("mistakes:sized(m=1)", "unexpected keyword argument 'm'; its parameters are: n"),
    ("mistakes:sized(1)", "cannot read 'mistakes:sized(1)'; options look like"),
    ("mistakes:sized(n=", "cannot read 'mistakes:sized(n='; options look like"),
    ("nowhere:case", "no module 'nowhere' can be imported from"),
    ("nowhere.deep:case", "no module 'nowhere.deep' can be imported from"),
    ("unregistered", "'unregistered' is no registered case"),
  ],
)
def test_a_mistake_in_a_case_is_one_sentence(target, expected, tmp_path, monkeypatch):
  (tmp_path / "mistakes.py").write_text(CASES)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(aot.UsageError) as error:
    aot.build(target, devices=[])
  assert expected in str(error.value) and "\n" not in str(error.value)


def run(*arguments, folder=ROOT):
  """The command line, from a folder."""
  return subprocess.run(
    [sys.executable, "-m", "pallas_kernels.aot", *arguments], capture_output=True, text=True,
    cwd=folder, env=os.environ | dict(PYTHONPATH=str(ROOT)),
  )  # fmt: skip


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (["nowhere:case", "--chips", "v4"], "error: --chips 'v4' is not one of v5e, v5p, v6e, tpu7x"),
    ([], "error: name a case"),
  ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, expected):
  done = run(*arguments)
  assert done.returncode == aot.USAGE and done.stdout == ""
  assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1


def test_help_shows_examples():
  text = run("--help").stdout
  assert "my.flash:case" in text and "jax.ShapeDtypeStruct" in text and "==SUPPRESS==" not in text


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_libtpu_is_named_with_the_way_to_install_it():
  done = run("nowhere:case", "--chips", "v5e")
  assert done.returncode == aot.USAGE
  assert done.stderr == (
    "error: compiling for v5e needs libtpu, which is not installed here: pip install 'jax[tpu]'\n"
  )


TINY = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
def kernel(a, b, out):
  out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
def case(n=256):
  shape = jax.ShapeDtypeStruct((n, n), jnp.float32)
  return pl.pallas_call(kernel, out_shape=shape, name="product"), [shape, shape]
def broken():
  raise RuntimeError("not today")
"""


@pytest.mark.libtpu
def test_a_kernel_is_compiled_for_a_chip_that_is_not_there(tmp_path):
  (tmp_path / "tiny.py").write_text(TINY)
  done = run("tiny:case(n=128)", "tiny:broken", "--chips", "v5e", "--json", folder=tmp_path)
  assert done.returncode == 1
  good, bad = json.loads(done.stdout)
  assert bad == dict(case="tiny:broken", chip="v5e", error="RuntimeError: not today")
  assert (good["argument_bytes"], good["output_bytes"]) == (2 * 4 * 128**2, 4 * 128**2)
  (product,) = (k for name, k in good["kernels"].items() if name.startswith("product"))
  assert product["pallas"] and product["vmem"] > 0
  assert product["products"] == {"f32": 128 // 8}  # 8 rows each, through one array of 128 x 128
  assert product["hot"]["share"]["MXU"] > 0 and product["spills"] == 0


@pytest.mark.libtpu
def test_a_mistake_in_the_case_ends_the_run_with_one_line(tmp_path):
  (tmp_path / "tiny.py").write_text(TINY)
  done = run("tiny:absent", "--chips", "v5e,v6e", folder=tmp_path)
  assert done.returncode == aot.USAGE
  assert done.stderr.splitlines()[-1] == "error: the module 'tiny' has no function 'absent'"
