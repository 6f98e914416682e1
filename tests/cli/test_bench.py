"""``hope-kernels bench``: FLOPs by the formula, honest ratios, wrong results never timed, a complete report."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from hope_kernels import available_backends
from hope_kernels.bench import shapes as shape_table
from hope_kernels.bench.implementations import REFERENCE, difference, make_call
from hope_kernels.bench.peak_memory import measure_peak_memory
from hope_kernels.bench.problems import shape_problem
from hope_kernels.bench.shapes import MODES, SHAPES, Shape, products_per_token, rebuilt_products_per_token
from hope_kernels.bench.speed import DisagreementError, compare_speed, implementations_here
from hope_kernels.bench.timing import Timing, time_side_by_side
from tests.cli.support import TINY, needs_cpu_backend, run, sabotage_gradient, sabotage_output


@pytest.fixture
def tiny(monkeypatch):
    """A shape that runs in milliseconds, under the name ``tiny``."""
    monkeypatch.setitem(shape_table.SHAPES, TINY.name, TINY)
    return TINY


def test_flops_are_those_of_the_convention():
    # Per token and head of an mlp memory: forward 14 D H, backward 36 D H.
    d_h, head_tokens = 64 * 256, 2 * 1024 * 4
    assert SHAPES["S16"].flops("forward") == 14 * d_h * head_tokens == 1_879_048_192
    assert SHAPES["S16"].flops("forward+backward") == 50 * d_h * head_tokens
    assert SHAPES["S64"].flops("forward") == SHAPES["S16"].flops("forward")
    assert SHAPES["S1"].flops("forward") == 14 * d_h * 2 * 256 * 4
    assert SHAPES["L"].flops("forward+backward") == 50 * 768 * 3072 * 2048
    # glu: read 6, error 8, update 6; its backward has 26 products.
    assert SHAPES["L-glu"].flops("forward") == 20 * 768 * 3072 * 2048
    assert SHAPES["L-glu"].flops("forward+backward") == (20 + 52) * 768 * 3072 * 2048
    # linear: read, error and update are one product each.
    assert products_per_token("linear", "forward") == 3
    assert Shape("x", "", 1, 10, 1, 5, 99, 2, form="linear").flops("forward") == 6 * 5 * 5 * 10
    assert rebuilt_products_per_token("mlp") == 5  # 10 D H
    with pytest.raises(ValueError, match="mode is 'sideways'"):
        products_per_token("mlp", "sideways")


@pytest.mark.parametrize("form", ["linear", "mlp", "glu"])
def test_the_reference_executes_the_forward_products_of_the_convention(form):
    shape = TINY.scaled(form=form)
    report = compare_speed([shape], [REFERENCE], repeats=1, warmup=0, memory_modes=())
    row = report.find("tiny", "forward", "reference")
    assert row.executed_gflop == pytest.approx((row.gflop, row.gflop))
    least, most = report.find("tiny", "forward+backward", "reference").executed_gflop
    assert least == most > 2 * row.gflop  # eager keeps every intermediate and recomputes nothing


def test_the_report_is_complete_and_its_numbers_belong_together(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/hope-kernels", "bench", "--shape", "tiny"])
    path, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = run("bench", "--shape", "tiny", "--repeats", 3, "--no-memory", "--json", path, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(path.read_text())
    assert report["kind"] == "bench" and report["command"] == "hope-kernels bench --shape tiny"
    assert {"machine", "versions", "date", "seed", "peak_gflops"} <= report.keys() and report["copy_gbytes"] > 0
    backends = [name for name, status in available_backends().items() if status and not status.interpreted]
    assert [(row["mode"], row["implementation"]) for row in report["rows"]] == [
        (mode, name) for mode in MODES for name in backends
    ]
    by_mode = {row["mode"]: row["ms"] for row in report["rows"] if row["implementation"] == "reference"}
    for row in report["rows"]:
        assert row["shape"] == "tiny" and row["repeats"] == 3 and row["dtype"] == "float32"
        assert row["gflop"] == pytest.approx(tiny.flops(row["mode"]) / 1e9)
        assert row["gflops"] == pytest.approx(row["gflop"] / (row["ms"] / 1e3))
        assert row["ratio"] == pytest.approx(by_mode[row["mode"]] / row["ms"])
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["difference"] < 1e-5
        if report["peak_gflops"] is not None:
            assert row["peak_fraction"] == pytest.approx(row["gflops"] / report["peak_gflops"])


@pytest.mark.parametrize(("option", "mode"), [("--forward", "forward"), ("--backward", "forward+backward")])
def test_one_mode_alone(tiny, option, mode, tmp_path):
    path = tmp_path / "bench.json"
    words = ("--shape", "TINY", "--backend", "reference", "--repeats", 1, "--warmup", 0, "--no-memory")
    assert run("bench", *words, option, "--json", path).exit_code == 0
    assert {row["mode"] for row in json.loads(path.read_text())["rows"]} == {mode}


@needs_cpu_backend
def test_wrong_outputs_and_gradients_are_never_timed(tiny, monkeypatch):
    implementations = implementations_here(["cpu"])
    with monkeypatch.context() as broken:
        sabotage_output(broken, lambda output: output * 1.01)
        with pytest.raises(DisagreementError, match=r"cpu at tiny .* forward: relative difference .* 1\.0"):
            compare_speed([tiny], implementations, repeats=1, memory_modes=())
        result = run("bench", "--shape", "tiny", "--no-memory")
        assert result.exit_code == 1 and "wrong results" in result.output and "GFLOP" not in result.output
    with monkeypatch.context() as broken:
        sabotage_gradient(broken, "k", lambda gradient: gradient * float("nan"))
        with pytest.raises(DisagreementError, match=r"forward\+backward: relative difference .* inf"):
            compare_speed([tiny], implementations, modes=["forward+backward"], repeats=1, memory_modes=())


def test_difference_is_the_worst_relative_norm():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert difference({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.05])}, expected) == pytest.approx(0.1)
    assert difference({"a": torch.tensor([3.0, float("inf")]), "b": torch.tensor([1.0])}, expected) == float("inf")
    with pytest.raises(ValueError, match="results hold"):
        difference({"a": expected["a"]}, expected)


def test_forward_runs_without_a_graph_and_backward_returns_every_gradient():
    problem = shape_problem(TINY)
    assert set(make_call(REFERENCE, problem, "forward")()) == {"output"}
    results = make_call(REFERENCE, problem, "forward+backward")()
    assert set(results) == {"output", "d q", "d k", "d v", "d lr", "d W_in", "d W_out"}
    assert all(value.abs().max() > 0 and not value.requires_grad for value in results.values())


def test_rounds_alternate_and_warm_up_is_not_counted():
    calls: list[str] = []
    timings = time_side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert all(len(timing.samples) == 3 for timing in timings.values())
    timing = Timing((4.0, 1.0, 2.0, 3.0, 10.0))
    assert (timing.median, timing.minimum) == (3.0, 1.0)
    with pytest.raises(ValueError, match="repeats is 0"):
        time_side_by_side({}, repeats=0)


def test_peak_memory_of_the_naive_path_holds_every_chunks_weights_and_the_fast_path_does_not():
    shape = Shape("tokens", "tests", batch=1, tokens=96, heads=2, dim=64, hidden=128, chunk_size=1)
    weights_of_one_chunk = shape.heads * 2 * shape.dim * shape.hidden * 4  # bytes
    naive = measure_peak_memory(shape, "reference", "forward+backward")
    assert naive >= 0.9 * shape.tokens * weights_of_one_chunk
    if available_backends()["cpu"]:
        assert measure_peak_memory(shape, "cpu", "forward+backward") <= naive / 3


def test_a_failing_measurement_of_memory_says_what_the_child_said():
    with pytest.raises(RuntimeError, match=r"measuring the memory of abacus at tiny failed(.|\n)*abacus"):
        measure_peak_memory(TINY, "abacus", "forward")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "XXL"), "shape is 'XXL'; want one of S1, S16"),
        (("--dtype", "int8"), "dtype is 'int8'; want one of float64"),
        (("--backend", "abacus"), "backend is 'abacus'; want one of reference"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_exit_2(words, message):
    result = run("bench", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.slow
def test_torch_compile_of_the_reference_is_timed_beside_it(tiny, tmp_path):
    path = tmp_path / "bench.json"
    result = run("bench", "--shape", "tiny", "--compile", "--repeats", 2, "--no-memory", "--json", path)
    assert result.exit_code == 0, result.output
    names = [row["implementation"] for row in json.loads(path.read_text())["rows"] if row["mode"] == "forward"]
    assert names[:2] == ["reference", "reference + torch.compile"]
