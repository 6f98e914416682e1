"""Every golden case on every backend: float64 to 1e-10, lower precisions within the budget of eager PyTorch."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.cases import (
    COMPILED_BACKENDS,
    FLOAT64_BACKENDS,
    Evaluation,
    Problem,
    assert_within_budget,
    evaluate_oracle,
    evaluate_package,
    package_results,
    relative_errors,
)
from tests.golden_cases import GOLDEN, load_golden


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_values_and_all_gradients_of_the_golden_cases_in_float64(name, backend):
    case = load_golden(name)
    found = case.evaluate(lambda p: package_results(p, backend=backend))
    case.assert_matches(found, tolerance=1e-10)


@cache
def low_precision(name: str, dtype: torch.dtype) -> tuple[Problem, Evaluation, Evaluation]:
    """The problem in `dtype`, the eager reference on it, and the truth for exactly those numbers."""
    problem = load_golden(name).problem.cast(dtype)
    return problem, evaluate_package(problem, "reference"), evaluate_oracle(problem)


LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_lower_precision_stays_within_twice_the_error_of_eager_pytorch(name, backend, dtype):
    problem, eager, truth = low_precision(name, dtype)
    assert_within_budget(evaluate_package(problem, backend), eager, truth, dtype)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", GOLDEN)
def test_the_reference_itself_is_accurate_in_lower_precision(name, dtype):
    """It sets the budget of all others, so its own error has a limit: 16 eps of the largest, or typical, entry."""
    _, eager, truth = low_precision(name, dtype)
    for result, want in truth.named().items():
        for error in relative_errors(eager.named()[result], want):
            assert error <= 16 * torch.finfo(dtype).eps, f"{result}: {error:.2e}"
