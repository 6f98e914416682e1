"""``hope-kernels demo``: its three claims, the folder it leaves, and that it says so when a claim does not hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from hope_kernels.bench import shapes as shape_table
from hope_kernels.bench.parity import ParityReport, ParityRow
from hope_kernels.cli import demo as demo_command
from hope_kernels.cli import demo_training
from hope_kernels.cli.demo import DemoSize, claims, run_demo
from hope_kernels.cli.demo_training import (
    FAST,
    NAIVE,
    PLAIN,
    TrainingReport,
    TrainingSize,
    train_side_by_side,
)
from tests.cli.support import TINY, needs_cpu_backend, run, sabotage_gradient

TRAINING = TrainingSize(steps=6, batch=2, context=64, dim=32, depth=1, held_out_windows=4)
FILES = {"results.json", "summary.md", "parity.png", "speed.png", "losses.png", "throughput.png"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(shape_table.SHAPES, TINY.name, TINY)
    monkeypatch.setattr(demo_command, "cases", lambda small: _few(small))
    return DemoSize(all_cases=False, shapes=("tiny",), repeats=1, memory_modes=(), training=TRAINING)


def _few(small):
    from hope_kernels.bench.parity_cases import cases

    return cases("mlp", small=small)[:2]


def test_it_trains_three_models_alike_and_leaves_a_folder(small, tmp_path):
    run_demo(small, tmp_path / "out", seed=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    for path in (tmp_path / "out").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {
        "machine",
        "versions",
        "command",
        "date",
        "seed",
        "claims",
        "parity",
        "speed",
        "training",
    } <= results.keys()
    training = results["training"]
    assert training["curves_coincide"] and training["curve_distance"] <= training["tolerance"]
    for name in (PLAIN, NAIVE, FAST):
        assert len(training["losses"][name]) == TRAINING.steps
        assert 1 < training["bits_per_byte"][name] < 8  # 8 is what a model needs that knows nothing
    assert training["parameters"][NAIVE] == training["parameters"][FAST] != training["parameters"][PLAIN]
    page = (tmp_path / "out" / "summary.md").read_text()
    assert f"{training['bits_per_byte'][FAST]:.3f}" in page and "(losses.png)" in page


def test_the_same_seed_gives_the_same_curves_and_another_one_does_not():
    first, again = (train_side_by_side(TRAINING, seed=3) for _ in range(2))
    assert first.losses == again.losses and first.bits_per_byte == again.bits_per_byte
    other = train_side_by_side(replace(TRAINING, steps=1), seed=4)
    assert other.losses[NAIVE][0] != first.losses[NAIVE][0]


@needs_cpu_backend
def test_a_fast_path_with_a_wrong_gradient_is_found_out_by_its_curve(monkeypatch):
    sabotage_gradient(monkeypatch, "v", lambda gradient: -gradient)
    report = train_side_by_side(TRAINING)
    assert report.fast_backend == "cpu"
    assert not report.curves_coincide
    passed = ParityReport([ParityRow("x", "cpu", "float64", {"output": 0.0}, {"output": 1.0}, "output", [])], {})
    assert [ok for ok, _ in claims(passed, report)][:2] == [True, False]


def _training(losses_fast: list[float], seconds_fast: list[float]) -> TrainingReport:
    return TrainingReport(
        size=TrainingSize(steps=2, batch=3, context=5),
        fast_backend="cpu",
        train_bytes=1,
        held_out_bytes=1,
        tolerance=1e-4,
        losses={PLAIN: [2.0, 1.0], NAIVE: [2.0, 1.0], FAST: losses_fast},
        seconds={PLAIN: [1.0, 1.0], NAIVE: [2.0, 4.0], FAST: seconds_fast},
    )


def test_throughput_distance_and_ratio_by_hand():
    report = _training([2.0, 1.00005], [1.0, 1.0])
    assert report.tokens_per_second == {PLAIN: 15.0, NAIVE: 5.0, FAST: 15.0}
    assert report.ratio == 3.0
    assert report.curve_distance == pytest.approx(5e-5) and report.curves_coincide
    assert not _training([2.0, 1.001], [1.0, 1.0]).curves_coincide
    assert not _training([2.0, math.nan], [1.0, 1.0]).curves_coincide


def test_a_fast_path_that_is_slower_does_not_hold():
    passed = ParityReport([ParityRow("x", "cpu", "float64", {"output": 0.0}, {"output": 1.0}, "output", [])], {})
    assert all(ok for ok, _ in claims(passed, _training([2.0, 1.0], [1.0, 1.0])))
    assert not all(ok for ok, _ in claims(passed, _training([2.0, 1.0], [9.0, 9.0])))


def test_without_a_compiled_backend_the_demo_says_so_and_claims_no_speed():
    passed = ParityReport([ParityRow("x", "reference", "float64", {"output": 0.0}, {"output": 1.0}, "output", [])], {})
    checks = claims(passed, replace(_training([2.0, 1.0], [9.0, 9.0]), fast_backend="reference"))
    assert all(ok for ok, _ in checks)
    assert "no compiled backend runs here" in checks[-1][1]
    assert not any("as fast as" in claim for _, claim in checks)


def test_a_claim_that_does_not_hold_is_exit_1(small, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_command, "QUICK", small)
    monkeypatch.setattr(TrainingReport, "curves_coincide", False)
    result = run("demo", "--quick", "--out", tmp_path)
    assert result.exit_code == 1
    assert "NO" in result.output
    assert json.loads((tmp_path / "results.json").read_text())["claims"][1]["holds"] is False


def test_without_the_examples_it_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_training, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    monkeypatch.chdir(tmp_path)
    result = run("demo", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "examples/byte_transformer.py is in neither" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_demo_from_end_to_end(tmp_path):
    result = run("demo", "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == FILES
    training = json.loads((tmp_path / "results.json").read_text())["training"]
    uniform = math.log2(256)
    assert all(bits < 0.7 * uniform for bits in training["bits_per_byte"].values())
    assert torch.tensor(training["losses"][FAST]).isfinite().all()
