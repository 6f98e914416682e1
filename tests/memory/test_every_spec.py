"""Every form, objective and rule with every set of gates it allows: float64 exact, lower precisions in budget."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch

from hope_kernels import MemorySpec
from tests.cases import (
    COMPILED_BACKENDS,
    FLOAT64_BACKENDS,
    assert_equal_to_rounding,
    assert_within_budget,
    evaluate_oracle,
    evaluate_package,
    make_problem,
)

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu2")
GATE_SETS = {
    "gd": [
        {},
        {"retention": True},
        {"momentum": True},
        {"retention": True, "momentum": True, "initial_momentum": True},
    ],
    "dgd": [{}, {"retention": True}],
}


def _cases() -> list:
    activations, residuals, shared = cycle(ACTIVATIONS), cycle([True, False, False]), cycle([True, True, False])
    cases = []
    for form, objective, rule in product(("linear", "mlp", "glu"), ("l2", "dot", "error", "self"), ("gd", "dgd")):
        for gates in GATE_SETS[rule]:
            spec = MemorySpec(form, next(activations), next(residuals), objective, rule)
            name = "-".join([*spec.key.split("/"), *gates])
            cases.append(pytest.param(spec, {**gates, "shared": next(shared)}, id=name))
    return cases


CASES = _cases()
assert len(CASES) == 3 * 4 * (4 + 2)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize(("spec", "gates"), CASES)
def test_values_and_gradients_equal_the_token_loop(spec, gates, backend):
    problem = make_problem(spec, chunk_size=4, tokens=11, dim=5, hidden=7, seed=1, **gates)
    assert_equal_to_rounding(evaluate_package(problem, backend), evaluate_oracle(problem), 1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("form", ["mlp", "glu"])
@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_every_activation_with_and_without_residual(form, activation, residual, backend):
    problem = make_problem(MemorySpec(form, activation, residual), chunk_size=3, tokens=8, retention=True, seed=2)
    # Scaled keys reach the tails of the activations, where approximations of tanh and erf differ from them.
    problem = problem.with_tensors(q=4 * problem["q"], k=3 * problem["k"], lr=0.1 * problem["lr"])
    assert_equal_to_rounding(evaluate_package(problem, backend), evaluate_oracle(problem), 1e-11)


@pytest.mark.interpreted_cases(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize(("spec", "gates"), CASES)
def test_lower_precision_budget(spec, gates, backend, dtype):
    problem = make_problem(spec, chunk_size=8, tokens=27, dim=16, hidden=24, seed=3, max_lr=0.1, **gates).cast(dtype)
    eager, truth = evaluate_package(problem, "reference"), evaluate_oracle(problem)
    assert_within_budget(evaluate_package(problem, backend), eager, truth, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "hidden", "chunk_size"), [(64, 256, 16), (64, 256, 64), (33, 100, 100), (100, 17, 7), (64, 256, 1)]
)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize(("spec", "gates"), CASES)
def test_real_sizes_in_float32(spec, gates, backend, dim, hidden, chunk_size):
    tokens = 2 * chunk_size + chunk_size // 2 + 1
    options = {"batch": 1, "heads": 1, "dim": dim, "hidden": hidden, "max_lr": 0.1, "seed": 4, **gates}
    problem = make_problem(spec, chunk_size=chunk_size, tokens=tokens, **options).cast(torch.float32)
    eager, truth = evaluate_package(problem, "reference"), evaluate_oracle(problem)
    # The gradient of a gate is a dot product of up to 64 x 256 terms: a blocked sum of them differs by some eps more
    # from the exact one than eager PyTorch's pairwise sum.
    assert_within_budget(evaluate_package(problem, backend), eager, truth, torch.float32, summation=8)
