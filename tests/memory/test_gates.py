"""Gates at and near the ends of their ranges: exactly 0, underflowing products, neutral values, negative rates."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import MemorySpec
from tests.cases import (
    BACKENDS,
    COMPILED_BACKENDS,
    FLOAT64_BACKENDS,
    GATES,
    Evaluation,
    Problem,
    assert_equal_to_rounding,
    assert_within_budget,
    evaluate,
    evaluate_oracle,
    evaluate_package,
    make_problem,
    package_results,
)

RULES = {
    "gd": (MemorySpec("mlp", "gelu_tanh"), {"retention": True}),
    "momentum": (MemorySpec("mlp", "silu"), {"retention": True, "momentum": True, "initial_momentum": True}),
    "dgd": (MemorySpec("mlp", "gelu_tanh", rule="dgd"), {"retention": True}),
    "dgd-self": (MemorySpec("glu", "silu", objective="self", rule="dgd"), {"retention": True}),
}


def gated_problem(rule: str, **sizes) -> Problem:
    spec, gates = RULES[rule]
    return make_problem(spec, **{"chunk_size": 4, "tokens": 14, **gates, **sizes})


def set_gate(problem: Problem, name: str, value: float, tokens: slice) -> Problem:
    gate = problem[name].clone()
    gate[:, tokens] = value
    return problem.with_tensors(**{name: gate})


# Tokens whose gate is 0: with two in one chunk, every prefix and suffix product around them matters.
ZEROS = {
    "one": slice(5, 6),
    "two": slice(5, 8, 2),
    "first": slice(0, 1),
    "last": slice(11, 12),
    "chunk": slice(4, 8),
    "all": slice(None),
}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("where", ZEROS)
@pytest.mark.parametrize(("rule", "gate"), [(rule, g) for rule in RULES for g in ("lr", *RULES[rule][1]) if g in GATES])
def test_a_gate_of_exactly_zero_has_the_token_loops_values_and_gradients(rule, gate, where, backend):
    problem = set_gate(gated_problem(rule), gate, 0.0, ZEROS[where])
    assert_equal_to_rounding(evaluate_package(problem, backend), evaluate_oracle(problem), 1e-12)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_all_gates_zero_at_once(backend):
    problem = gated_problem("momentum")
    for gate in GATES:
        problem = set_gate(problem, gate, 0.0, slice(2, 10))
    assert_equal_to_rounding(evaluate_package(problem, backend), evaluate_oracle(problem), 1e-12)


@pytest.mark.parametrize("value", [1e-6, 1e-20, 1e-38, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_tiny_retention_keep_float32_accuracy(rule, backend, value):
    """Products keep every digit here; differences of logarithms or quotients of products would lose most of them."""
    problem = set_gate(gated_problem(rule), "retention", value, slice(1, 12, 3)).cast(torch.float32)
    found, truth = evaluate_package(problem, backend), evaluate_oracle(problem)
    # Some tens of float32 operations lie between the gates and each number.
    assert_equal_to_rounding(found, truth, 5e-6)
    gradient, want = found.gradients["retention"].double(), truth.gradients["retention"]
    assert ((gradient - want).norm() <= 5e-6 * want.norm()).item()


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_products_that_underflow_in_float32_leave_everything_finite_and_right(rule, backend):
    """160 tokens of retention 0.4: the product over a chunk is 2e-64, which float32 does not have."""
    problem = set_gate(gated_problem(rule, chunk_size=160, tokens=170, batch=1, heads=1), "retention", 0.4, slice(None))
    problem = problem.cast(torch.float32)
    eager, truth = evaluate_package(problem, "reference"), evaluate_oracle(problem)
    assert_within_budget(evaluate_package(problem, backend), eager, truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("rule", ["gd", "dgd"])
def test_a_rate_of_zero_keeps_the_weights_to_the_last_bit_and_still_has_a_gradient(rule, backend, dtype):
    problem = make_problem(MemorySpec(rule=rule), chunk_size=4, tokens=13).cast(dtype)
    problem = problem.with_tensors(lr=torch.zeros_like(problem["lr"]))
    found = evaluate_package(problem, backend)
    for i, weight in enumerate(problem.weights):
        assert torch.equal(found.values[f"weight{i}"], weight.expand_as(found.values[f"weight{i}"]))
    truth = evaluate_oracle(problem)
    assert truth.gradients["lr"][:, :12].abs().min() > 0
    assert_equal_to_rounding(found, truth, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_gradient_descent_holds_for_a_negative_rate(backend):
    problem = make_problem(MemorySpec("glu", "gelu"), chunk_size=3, tokens=10, momentum=True, retention=True)
    problem = problem.with_tensors(lr=-problem["lr"])
    assert_equal_to_rounding(evaluate_package(problem, backend), evaluate_oracle(problem))


def _without_gradients_of(evaluation, *names: str):
    return evaluation._replace(gradients={n: g for n, g in evaluation.gradients.items() if n not in names})


def _without_pending(evaluation, *gates: str):
    hidden = {f"pending_{gate}" for gate in gates}
    return evaluation._replace(values={n: v for n, v in evaluation.values.items() if n not in hidden})


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("rule", ["gd", "dgd"])
def test_retention_one_equals_no_retention(rule, backend):
    plain = make_problem(MemorySpec(rule=rule), chunk_size=4, tokens=14)
    gated = plain.with_tensors(retention=torch.ones_like(plain["lr"]))
    found = _without_pending(_without_gradients_of(evaluate_package(gated, backend), "retention"), "retention")
    assert_equal_to_rounding(found, evaluate_package(plain, backend), 1e-13)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_momentum_zero_equals_plain_gradient_descent(backend):
    plain = make_problem(MemorySpec(), chunk_size=4, tokens=14, retention=True)

    def output_and_weights(problem: Problem) -> Evaluation:
        return evaluate(
            problem,
            lambda p: {
                n: r for n, r in package_results(p, backend=backend).items() if n == "output" or n.startswith("weight")
            },
        )

    gated = plain.with_tensors(momentum=torch.zeros_like(plain["lr"]))
    found = _without_gradients_of(output_and_weights(gated), "momentum")
    assert_equal_to_rounding(found, output_and_weights(plain), 1e-13)
