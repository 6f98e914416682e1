"""The suite for a machine with a GPU: what it does without one, and that its stages run (on a CPU, interpreted)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.py"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


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
    report = json.loads((tmp_path / "gpu-suite.json").read_text())
    assert list(report["stages"]) == list(stages)
    return found.returncode, report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    found = run(cwd=tmp_path)
    assert found.returncode == 2
    assert "no GPU" in found.stdout
    assert not list(tmp_path.iterdir())


def suite_module():
    specification = importlib.util.spec_from_file_location("gpu_suite", SUITE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("stage", "limit", "summary"), [("build", 0.05, "stopped after 0 s"), ("no such stage", 60.0, "exit 1: KeyError")]
)
def test_a_stage_that_is_stopped_or_breaks_is_a_failure_with_its_reason(tmp_path, stage, limit, summary):
    result = suite_module().run_stage(stage, Namespace(out=tmp_path, dry_run=True), limit)
    assert result["passed"] is False
    assert result["summary"].startswith(summary)
    assert (tmp_path / f"{stage}.log").exists()


def test_what_a_stopped_stage_had_left_is_kept(tmp_path):
    """As the benchmark leaves its rows one by one."""
    suite = suite_module()
    script = tmp_path / "suite.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "(out / 'endless.json').write_text(json.dumps({'passed': False, 'summary': 'so far', 'rows': [1, 2]}))\n"
        "time.sleep(60)\n"
    )
    suite.__file__ = str(script)
    result = suite.run_stage("endless", Namespace(out=tmp_path, dry_run=False), 5.0)
    assert result["rows"] == [1, 2] and result["passed"] is False
    assert result["summary"] == "stopped after 5 s. so far"
    assert result["seconds"] < 20


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["build", "parity", "opcheck", "compile", "graph", "sanitizer", "bench"])
def test_every_stage_runs(tmp_path, stage):
    code, report = report_of(tmp_path, stage)
    result = report["stages"][stage]
    assert code == 0 and result["passed"] is True, result["summary"]
    assert result["summary"] and result["seconds"] > 0
    text = (tmp_path / "gpu-suite.md").read_text()
    assert f"| {stage} | passed |" in text
    if stage == "bench":
        assert {(row["shape"], row["mode"]) for row in result["rows"]} >= {
            ("G16", "forward"),
            ("GL", "forward+backward"),
        }
        assert result["gemm_tflops"] > 0 and "| G64 | forward | triton |" in text
