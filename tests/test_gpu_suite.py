"""The suite for a machine with a GPU: what it does without one, and that its stages run (on a CPU, interpreted)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.py"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def loaded():
    specification = importlib.util.spec_from_file_location("gpu_suite", SUITE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)  # also puts the checkout on sys.path
    return module


suite = loaded()
from benchmarks.gpu import children, report  # noqa: E402
from hope_kernels import MemorySpec  # noqa: E402
from hope_kernels.bench import gpu, parity  # noqa: E402
from hope_kernels.bench.decode import DECODE, DecodeShape  # noqa: E402


def run(*arguments: str, cwd: Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SUITE), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def report_of(tmp_path: Path, *stages: str) -> tuple[int, dict]:
    found = run("--dry-run", "--out", str(tmp_path), "--stage", *stages, cwd=tmp_path)
    assert (tmp_path / "gpu-suite.json").exists(), found.stdout + found.stderr
    text = json.loads((tmp_path / "gpu-suite.json").read_text())
    assert sorted(text["stages"]) == sorted(stages)
    return found.returncode, text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    found = run(cwd=tmp_path)
    assert found.returncode == 2
    assert "no GPU" in found.stdout
    assert not list(tmp_path.iterdir())


# ---- children --------------------------------------------------------------------------------------------------------

# What it leaves, then what becomes of it.
CHILD = """
import json, os, pathlib, sys, time
out, name = (pathlib.Path(sys.argv[sys.argv.index(option) + 1]) for option in ("--out", "--child"))
left = out / "parts" / f"{name}.json"
left.parent.mkdir(exist_ok=True)
left.write_text(json.dumps({"passed": False, "summary": "so far", "rows": [1, 2]}))
if str(name) == "endless":
    time.sleep(60)
if str(name) == "breaking":
    print("the reason"), sys.stdout.flush(), os.abort()
left.write_text(json.dumps({"passed": True, "summary": "all of it", "rows": [1, 2, 3]}))
"""


@pytest.fixture
def options(tmp_path, monkeypatch) -> Namespace:
    (tmp_path / "suite.py").write_text(CHILD)
    monkeypatch.setattr(children, "SUITE", tmp_path / "suite.py")
    return Namespace(out=tmp_path, dry_run=False)


def test_a_child_that_hangs_or_dies_keeps_what_it_left_and_costs_the_others_nothing(options):
    start = time.monotonic()
    starts = [
        partial(lambda left, name: children.Child(name, options, min(left, 4.0)), name=name)
        for name in ("endless", "breaking", "whole")
    ]
    found = children.run_children(starts, at_once=2, deadline=start + 100)
    assert time.monotonic() - start < 30
    assert found["endless"]["summary"] == "stopped after 4 s. so far"
    assert found["breaking"]["summary"] == "exit -6: the reason. so far"
    assert [found[name]["passed"] for name in ("endless", "breaking", "whole")] == [False, False, True]
    assert [found[name]["rows"] for name in ("endless", "breaking", "whole")] == [[1, 2], [1, 2], [1, 2, 3]]


def test_children_that_time_does_not_suffice_for_are_not_started(options):
    starts = [partial(lambda left, name: children.Child(name, options, left), name=name) for name in ("a", "b")]
    assert children.run_children(starts, at_once=1, deadline=time.monotonic() + 0.5) == {}
    assert not (options.out / "parts").exists()


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_bytes_of_a_token_are_those_of_the_kernel_notes():
    """128 KiB to read a memory of D=64, H=256; 256 KiB more for a due write, which at C=1 is all there is."""
    memories = 64 * 16 * (256 + (128 + 256 / 16) + (128 + 256 / 64)) * 1024
    assert DECODE.bytes_per_token(64) == memories + 2 * 1024 * 4096 * 2
    assert DecodeShape(heads=1, chunk_sizes=(16,)).bytes_per_token(1) == (128 + 16) * 1024


def test_what_the_reference_keeps_is_counted_before_it_is_run():
    from hope_kernels.bench.problems import shape_problem
    from hope_kernels.bench.shapes import SHAPES

    shape = SHAPES["S16"].scaled(tokens=160, heads=2)
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gpu.scan(shape_problem(shape).requires_grad(), "reference")
    counted = gpu.bytes_kept_by_reference(shape, torch.float32)
    assert counted == pytest.approx(sum(x.nbytes() for x in kept.values()), rel=0.02)


def test_float32_with_tf32_products_is_held_to_a_budget_of_its_own():
    case = parity.Case(MemorySpec("linear"))
    before = torch.get_float32_matmul_precision()
    full, relaxed = (parity.check_parity([case], ["reference"], ["float32"], tf32=tf32) for tf32 in (False, True))
    assert torch.get_float32_matmul_precision() == before
    assert [report.rows[0].dtype for report in (full, relaxed)] == ["float32", "tf32"]
    budgets = [min(report.rows[0].budgets.values()) for report in (full, relaxed)]
    assert budgets[1] == pytest.approx(budgets[0] * 2.0**-10 / torch.finfo(torch.float32).eps)


# ---- the tables ------------------------------------------------------------------------------------------------------


def measured_report(fraction: float) -> dict:
    row = {"shape": "G64", "mode": "forward", "implementation": "triton", "peak_fraction": fraction, "ratio": 8.0}
    return {"stages": {"bench": {"passed": True, "summary": "", "rows": [row]}}}


def test_the_table_says_met_missed_or_why_there_is_no_number():
    found = report.judged(measured_report(0.2), "triton")
    rows = {(t.row, t.goal): (measured, verdict) for t, measured, verdict in found}
    goal = "at least 18% of the GEMM peak (stretch 25%)"
    assert rows["G64 forward", goal] == ("20.0%", "met")
    assert rows["G64 forward", "at least 7x eager"] == ("8.0x", "met")
    assert rows["GL forward", "at least 78% of the GEMM peak"] == ("not measured: no such row in bench", "")
    decode = "decode, batch 1, median token", "at most 12 µs for the stack"
    assert rows[decode] == ("not measured: decode was not run", "")
    missed = {(t.row, t.goal): verdict for t, _, verdict in report.judged(measured_report(0.17), "triton")}
    assert missed["G64 forward", goal] == "missed"
    assert {measured for _, measured, _ in report.judged(None, "cuda")} == {"not measured: no GPU was at hand"}


def test_the_table_has_both_engines_side_by_side():
    both = measured_report(0.2)
    (row,) = both["stages"]["bench"]["rows"]
    both["stages"]["bench"]["rows"].append(row | {"implementation": "cuda", "peak_fraction": 0.31, "ratio": 12.0})
    lines = report.results_table(both).splitlines()
    assert lines[0] == "| row (bfloat16) | target | Triton | Triton: verdict | CUDA | CUDA: verdict |"
    assert "| G64 forward | at least 7x eager | 8.0x | met | 12.0x | met |" in lines
    assert any(line.startswith("| GL forward |") and line.count("no such row in bench") == 2 for line in lines)


def test_the_factored_plan_is_shown_beside_the_dense_one():
    rows = [
        {"shape": "GF", "mode": "forward", "implementation": name, "ms": ms}
        for name, ms in (("triton", 6.0), ("triton:factored", 4.0), ("reference:factored", 5.0))
    ]
    found = report.judged({"stages": {"factored": {"passed": True, "summary": "", "rows": rows}}}, "triton")
    values = {t.row: (measured, verdict) for t, measured, verdict in found}
    assert values["GF forward, factored"] == ("1.5x", "")
    assert values["GF forward+backward, factored"] == ("not measured: no such row in factored", "")


def test_the_faster_engine_of_each_shape_goes_into_a_table(tmp_path):
    from benchmarks.gpu.speed import faster_engines
    from hope_kernels.backends import choice

    times = {
        ("G64", "forward", "triton"): 2.0, ("G64", "forward", "cuda"): 1.0, ("G64", "forward", "reference"): 0.1,
        ("G16", "forward+backward", "triton"): 3.0, ("G16", "forward+backward", "cuda"): 4.0,
        ("GL", "forward", "triton"): 5.0,
    }  # fmt: skip
    rows = [{"shape": s, "mode": m, "implementation": i, "ms": ms} for (s, m, i), ms in times.items()]
    entries = faster_engines(rows, torch.bfloat16, "NVIDIA H200")
    choice.record(tmp_path / "engines.json", entries)
    found = choice.load(tmp_path / "engines.json")
    assert [(e.engine, e.measured["shape"], e.classes["gradients"]) for e in found] == [
        ("cuda", "G64 forward", (False,)),
        ("triton", "G16 forward+backward", (True,)),
    ]
    assert found[0].classes["block_chunk"] == (64,) and found[0].classes["block_dim"] == (64,)
    text = "\n".join(report._engines_section({"bench": {"engines": [e.as_dict() for e in entries]}}))
    assert "| G64 forward | cuda | 2.000 ms | 1.000 ms |" in text
    assert (
        report.markdown(report_of_stages({"bench": {"engines": [], "refusals": ["GL forward, cuda: dim"]}})).count(
            "Refused: GL forward, cuda: dim"
        )
        == 1
    )


def report_of_stages(stages: dict) -> dict:
    """The least that a report for people is made of."""
    stages = {name: {"passed": True, "summary": ""} | result for name, result in stages.items()}
    versions = dict.fromkeys(("python", "torch", "triton", "cuda"), "1")
    machine = {"gpu": "a GPU", "processor": "a processor"}
    head = {"dry_run": False, "machine": machine, "versions": versions, "date": "today", "command": "suite"}
    return head | {"stages": stages}


def test_the_published_table_is_that_of_the_published_run_or_of_none():
    document = ROOT / "benchmarks" / "results" / "README.md"
    run_file = document.with_name("gpu-suite.json")
    published = json.loads(run_file.read_text()) if run_file.exists() else None
    assert report.in_document(document.read_text(), published) == document.read_text()


def test_growth_is_judged_over_three_lengths():
    def row(tokens: int, ns: float, working: int) -> dict:
        return {
            "mode": "forward+backward", "implementation": "triton", "batch": 8, "tokens": tokens,
            "chunks": tokens // 64, "ns_per_head_token": ns, "working_bytes": working,
        }  # fmt: skip

    rows = [row(65536, 1.05, 2800), row(1024, 1.0, 100), row(8192, 1.02, 1000)]
    found = {
        t.row: (measured, verdict)
        for t, measured, verdict in report.judged({"stages": {"scale": {"summary": "", "rows": rows}}}, "triton")
    }
    assert found["time per token, 1k to 64k tokens, forward+backward"] == ("5.0%", "met")
    memory = found["working memory, 8k to 64k tokens, forward+backward"]
    assert memory == ("0.99 of that growth", "met")


# ---- the stages ------------------------------------------------------------------------------------------------------

CHECKS = ["build", "parity", "shapes", "opcheck", "compile", "graph", "sanitizer"]
MEASURED = ["bench", "decode", "scale", "compiled", "factored", "tune"]


def test_every_stage_has_a_test():
    assert sorted(CHECKS + MEASURED) == sorted(suite.STAGES)


@needs_triton
def test_a_dry_run_leaves_report_table_and_logs(tmp_path):
    """The shortest stages that use interpreted kernels; the slow tier runs all of them."""
    code, found = report_of(tmp_path, "build", "decode")
    assert code == 0, found["stages"]
    assert found["dry_run"] and found["plot"] == "No picture: the benchmark has no rows."
    rows = found["stages"]["decode"]["rows"]
    assert [row["backend"] for row in rows] == ["reference", "triton"]
    assert all(row["us_worst"] >= row["us_median"] > 0 and row["copy_fraction"] > 0 for row in rows)
    assert rows[1]["difference"] < 1e-4
    text = (tmp_path / "gpu-suite.md").read_text()
    assert "| decode | passed |" in text and "no number below means anything" in text
    assert (tmp_path / "logs" / "decode.log").exists() and (tmp_path / "logs" / "decode-2.log").exists()
    refused = run("--publish", "--out", str(tmp_path), cwd=tmp_path)
    assert refused.returncode == 2 and "dry run" in refused.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("stage", CHECKS + MEASURED)
def test_every_stage_runs(tmp_path, stage):
    code, found = report_of(tmp_path, stage)
    result = found["stages"][stage]
    assert code == 0 and result["passed"] is True, result["summary"]
    assert result["summary"] and result["seconds"] > 0
    text = (tmp_path / "gpu-suite.md").read_text()
    assert f"| {stage} | passed |" in text
    if stage == "bench":
        kinds = {(row["shape"], row["mode"]) for row in result["rows"]}
        assert kinds == {(shape, mode) for shape in ("G16", "G64", "GL") for mode in ("forward", "forward+backward")}
        assert result["peaks"]["gemm_tflops"] > 0 and "| triton |" in text
    if stage == "factored":
        names = {(row["implementation"], row["mode"]) for row in result["rows"]}
        plans = ("reference", "triton", "triton:factored", "reference:factored")
        assert names == {(plan, mode) for plan in plans for mode in ("forward", "forward+backward")}
    if stage == "opcheck":
        both = {f"hope_kernels::{kind}{way}" for kind in ("scan", "scans") for way in ("", "_backward")}
        assert {row["operator"] for row in result["rows"]} == both
    if stage == "sanitizer":
        tools = [row["tool"] for row in result["rows"]]
        assert tools[-4:] == ["memcheck", "racecheck", "initcheck", "synccheck"]
        assert tools[:-4] == [f"sanitized:none:{i}" for i in range(3)]
