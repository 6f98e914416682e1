"""``hope-kernels verify`` passes on honest backends and fails on every kind of dishonest one."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import numpy
import pytest
import torch

from hope_kernels import available_backends
from hope_kernels.bench.parity import FLOAT64_BUDGET, check_parity, errors
from hope_kernels.bench.parity_cases import Case, cases, make_trial
from hope_kernels.memory import reference
from hope_kernels.memory.spec import MemorySpec
from tests.cli.support import needs_cpu_backend, run, sabotage_gradient, sabotage_output

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_small_set_passes_and_the_report_holds_every_backend_dtype_and_result(tmp_path):
    path = tmp_path / "report.json"
    result = run("verify", "--small", "--dtype", "float64", "--dtype", "bfloat16", "--json", path)
    assert result.exit_code == 0, result.output
    assert "parity holds" in result.output
    report = json.loads(path.read_text())
    assert report["kind"] == "verify" and report["passed"] is True
    assert {"machine", "versions", "command", "date", "seed", "refused"} <= report.keys()
    backends = [name for name, status in available_backends().items() if status and not status.interpreted]
    ran = {(row["backend"], row["dtype"], row["case"]) for row in report["rows"]}
    assert ran == set(product(backends, ("float64", "bfloat16"), [case.name for case in cases(small=True)]))
    for row in report["rows"]:
        assert {"output", "final W", "d q", "d k", "d v", "d lr"} <= {
            name if not name.startswith("final") else "final W" for name in row["errors"]
        }
        assert all(row["errors"][name] <= budget for name, budget in row["budgets"].items())
        if "momentum" in row["case"]:
            assert "d momentum" in row["errors"] and any(name.startswith("momentum ") for name in row["errors"])
        if row["dtype"] == "float64":
            assert set(row["budgets"].values()) == {FLOAT64_BUDGET}


@pytest.mark.parametrize("small", [False, True])
def test_the_cases_hold_every_form_objective_rule_gate_and_layout(small):
    chosen = cases(small=small)
    assert len({case.name for case in chosen}) == len(chosen)
    assert {case.layout for case in chosen} == {"whole", "split", "packed", "valid"}
    assert any(case.bptt_chunks for case in chosen) and any(case.momentum for case in chosen)
    specs = [case.spec for case in chosen]
    for name, values in {
        "form": ("linear", "mlp", "glu"),
        "objective": ("l2", "dot", "error", "self"),
        "rule": ("gd", "dgd"),
        "activation": ("gelu_tanh", "gelu", "silu", "relu2"),
        "residual": (True, False),
    }.items():
        assert {getattr(spec, name) for spec in specs} == set(values)
    if not small:
        combinations = {(spec.form, spec.objective, spec.rule) for spec in specs}
        assert len(combinations) == 3 * 4 * 2
    assert all(case.spec.form == "glu" for case in cases("glu", small=small))


def test_a_reference_that_is_wrong_by_one_part_in_a_million_fails(monkeypatch):
    honest = reference.activation_derivative
    monkeypatch.setattr(reference, "activation_derivative", lambda z, name: honest(z, name) * (1 + 1e-6))
    result = run("verify", "--small", "--form", "mlp", "--backend", "reference", "--dtype", "float64")
    assert result.exit_code == 1
    assert "parity is broken" in result.output


@needs_cpu_backend
@pytest.mark.parametrize("name", ["q", "k", "v", "step", "decay", "momentum_step"])
def test_a_backend_with_one_wrong_gradient_fails(monkeypatch, name):
    sabotage_gradient(monkeypatch, name, lambda gradient: gradient * (1 + 1e-6))
    case = Case(MemorySpec(), retention=True, momentum=True)
    report = check_parity([case], ["cpu"], ["float64"])
    assert not report.passed
    expected = {"step": "d lr", "momentum_step": "d lr", "decay": "d retention"}.get(name, f"d {name}")
    assert report.rows[0].failures == [expected] or expected in report.rows[0].failures


@needs_cpu_backend
def test_the_command_fails_and_names_the_wrong_gradient(monkeypatch):
    sabotage_gradient(monkeypatch, "v", lambda gradient: gradient * 1.2)
    result = run("verify", "--small", "--form", "glu", "--backend", "cpu", "--dtype", "bfloat16")
    assert result.exit_code == 1
    assert "error of d v is" in result.output and "parity is broken" in result.output


@needs_cpu_backend
def test_numbers_that_are_not_finite_fail(monkeypatch):
    def spoil(output):
        output = output.clone()
        output.view(-1)[0] = float("nan")
        return output

    sabotage_output(monkeypatch, spoil)
    report = check_parity([Case(MemorySpec())], ["cpu"], ["float32"])
    assert report.rows[0].errors["output"] == float("inf") and "output" in report.rows[0].failures


def test_errors_are_relative_to_the_largest_element_of_the_truth():
    truth = {"a": torch.tensor([4.0, -8.0], dtype=torch.float64), "zero": torch.zeros(2, dtype=torch.float64)}
    measured = errors({"a": torch.tensor([5.0, -8.0]), "zero": torch.tensor([0.0, 0.25])}, truth)
    assert measured == {"a": 0.125, "zero": 0.25}
    with pytest.raises(ValueError, match="a has shape"):
        errors({"a": torch.zeros(3), "zero": torch.zeros(2)}, truth)
    with pytest.raises(ValueError, match="results hold"):
        errors({"a": torch.zeros(2)}, truth)


def test_inputs_are_held_exactly_by_every_dtype():
    problem = make_trial(Case(MemorySpec(), retention=True, momentum=True)).problem
    for name, tensor in problem.inputs().items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(tensor.to(dtype).double(), tensor), (name, dtype)


def test_golden_cases_pass_and_a_tampered_one_fails(tmp_path):
    for name in ("mlp_gd_chunk1", "glu_gd_dot_momentum", "mlp_carried_state"):
        shutil.copy(GOLDEN / f"{name}.npz", tmp_path)
    result = run("verify", "--golden", tmp_path, "--dtype", "float64", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "mlp_carried_state" in result.output

    arrays = dict(numpy.load(tmp_path / "mlp_gd_chunk1.npz"))
    arrays["grad.lr"] = arrays["grad.lr"] * (1 + 1e-6)
    numpy.savez(tmp_path / "mlp_gd_chunk1.npz", **arrays)
    result = run("verify", "--golden", tmp_path, "--dtype", "float64")
    assert result.exit_code == 1
    assert "error of d lr" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--form", "cubic"), "form is 'cubic'; want one of 'linear', 'mlp', 'glu'"),
        (("--dtype", "int8"), "dtype is 'int8'; want one of float64"),
        (("--backend", "abacus"), "backend is 'abacus'; want one of reference"),
        (("--golden", "/nonexistent"), "no .npz file in /nonexistent"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_exit_2(words, message):
    result = run("verify", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_an_unavailable_backend_is_refused_with_its_reason():
    missing = next(name for name, status in available_backends().items() if not status)
    result = run("verify", "--backend", missing)
    assert result.exit_code == 2
    assert available_backends()[missing].reason in " ".join(result.output.split())
