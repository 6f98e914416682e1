"""``hope-kernels scaling``: a complete report whose numbers belong together, and what may never be timed."""

from __future__ import annotations

import json

import pytest
import torch

from hope_kernels.bench import machine
from hope_kernels.bench import shapes as shape_table
from hope_kernels.bench.scaling import measure_scaling, thread_counts
from hope_kernels.bench.shapes import MODES
from hope_kernels.bench.speed import DisagreementError
from tests.cli.support import TINY, needs_cpu_backend, run, sabotage_output


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A shape that runs in milliseconds, under the name ``tiny``, and copies that do."""
    monkeypatch.setitem(shape_table.SHAPES, TINY.name, TINY)
    monkeypatch.setattr("hope_kernels.bench.scaling.copy_bandwidth", lambda: machine.copy_bandwidth(1 << 20))
    return TINY


def measure(**options):
    settings = {"counts": [1, 2], "lengths": [8, 32], "repeats": 1, "memory": False} | options
    return measure_scaling([TINY], [TINY], **settings)


def test_thread_counts_double_up_to_the_most():
    assert [thread_counts(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]


@needs_cpu_backend
def test_the_report_is_complete_and_its_numbers_belong_together(tmp_path):
    path, picture, threads = tmp_path / "scaling.json", tmp_path / "scaling.png", torch.get_num_threads()
    words = ("--shape", "tiny", "--tokens", 8, "--tokens", 32, "--threads", 2, "--repeats", 3)
    result = run("scaling", *words, "--json", path, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(path.read_text())
    assert report["kind"] == "scaling" and report["peak_gflops"].keys() == report["copy_gbytes"].keys() == {"1", "2"}
    assert [(row["mode"], row["threads"]) for row in report["threads"]] == [(m, n) for m in MODES for n in (1, 2)]
    assert [(row["mode"], row["tokens"]) for row in report["lengths"]] == [(m, n) for m in MODES for n in (8, 32)]
    alone = {row["mode"]: row["ms"] for row in report["threads"] if row["threads"] == 1}
    for row in report["threads"]:
        assert row["speedup"] == pytest.approx(alone[row["mode"]] / row["ms"])
        assert row["gflops"] == pytest.approx(TINY.flops(row["mode"]) / row["ms"] / 1e6)
        assert row["peak_fraction"] == pytest.approx(row["gflops"] / report["peak_gflops"][str(row["threads"])])
    for row in report["lengths"]:
        assert row["sizes"] == TINY.scaled(tokens=row["tokens"]).sizes and row["chunks"] == row["tokens"] // 4
        assert row["ns_per_head_token"] == pytest.approx(row["ms"] * 1e6 / (2 * 2 * row["tokens"]))
        assert isinstance(row["peak_bytes"], int)


@needs_cpu_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.01, r"cpu at tiny \(.*\), forward: relative difference to the reference is 1\.0"),
        (lambda y: y + 1e-6 * (torch.get_num_threads() == 2), "forward, 2 threads: output is not the same bits"),
        (lambda y: y + 1e-6 * (y.shape[1] == 32), "forward, 32 tokens: output is not the same bits"),
    ],
)
def test_results_that_are_wrong_or_depend_on_what_they_must_not_are_never_timed(change, message, monkeypatch):
    sabotage_output(monkeypatch, change)
    with pytest.raises(DisagreementError, match=message):
        measure(modes=["forward"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": [2]}, r"counts is \[2\]; want numbers of threads from 1 on, 1 among them"),
        ({"counts": [0, 1]}, r"counts is \[0, 1\]"),
        ({"lengths": [0, 8]}, r"lengths is \[0, 8\]; want numbers of tokens from 1 on"),
    ],
)
def test_counts_and_lengths_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(**options)


@pytest.mark.parametrize("words", [("--shape", "XXL"), ("--dtype", "int8"), ("--backend", "abacus")])
def test_a_request_that_makes_no_sense_is_refused_with_exit_2(words):
    result = run("scaling", *words)
    assert result.exit_code == 2
    assert f"is {words[1]!r}; want one of" in " ".join(result.output.split())
