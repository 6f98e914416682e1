"""The reference's token loop against the oracle, and its closed chunk forms against its token loop."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import MemorySpec
from hope_kernels.memory.reference import recurrent_scan
from tests.cases import (
    Problem,
    Results,
    assert_equal_to_rounding,
    evaluate,
    evaluate_oracle,
    make_problem,
    package_results,
)
from tests.golden_cases import GOLDEN, load_golden
from tests.memory.test_every_spec import CASES


def recurrent_results(problem: Problem, bptt_chunks: int | None = None) -> Results:
    output, weights, momentum = recurrent_scan(
        *(problem[name] for name in ("q", "k", "v", "lr")),
        problem.weights,
        spec=problem.spec,
        chunk_size=problem.chunk_size,
        retention=problem.get("retention"),
        momentum=problem.get("momentum"),
        initial_momentum=problem.initial_momentum,
        bptt_chunks=bptt_chunks,
    )
    results = {"output": output, **{f"weight{i}": w for i, w in enumerate(weights)}}
    return results | {f"momentum{i}": m for i, m in enumerate(momentum or ())}


def without_pending(evaluation):
    return evaluation._replace(values={n: v for n, v in evaluation.values.items() if not n.startswith("pending")})


def whole_chunks(problem: Problem) -> Problem:
    """Without the tokens of an unfinished chunk: `recurrent_scan` returns none, so their cotangents have no
    counterpart."""
    return problem.span(0, problem.tokens - problem.tokens % problem.chunk_size)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_token_loop_reproduces_the_golden_cases(name):
    case = load_golden(name)
    case.assert_matches(case.evaluate(recurrent_results), tolerance=1e-12)


@pytest.mark.parametrize(("spec", "gates"), CASES)
def test_the_token_loop_equals_the_oracle(spec, gates):
    problem = whole_chunks(make_problem(spec, chunk_size=3, tokens=10, dim=4, hidden=5, seed=5, **gates))
    assert_equal_to_rounding(evaluate(problem, recurrent_results), evaluate_oracle(problem), 1e-12)


@pytest.mark.parametrize("bptt_chunks", [1, 2, 3])
@pytest.mark.parametrize("momentum", [False, True])
def test_the_token_loop_cuts_gradients_like_the_oracle(bptt_chunks, momentum):
    problem = make_problem(MemorySpec(), chunk_size=2, tokens=12, momentum=momentum)
    found = evaluate(problem, lambda p: recurrent_results(p, bptt_chunks))
    assert_equal_to_rounding(found, evaluate_oracle(problem, bptt_chunks=bptt_chunks), 1e-12)


def test_the_token_loop_reads_an_unfinished_chunk_and_writes_nothing():
    problem = make_problem(MemorySpec("glu", "silu"), chunk_size=4, tokens=11, retention=True)
    found, expected = evaluate(problem, recurrent_results), without_pending(evaluate_oracle(problem))
    assert_equal_to_rounding(found._replace(gradients={}), expected._replace(gradients={}), 1e-12)
    shorter, _ = recurrent_results(problem.span(0, 8)), None
    assert torch.equal(found.values["weight0"], shorter["weight0"])


def test_the_token_loop_needs_no_gradients_turned_on():
    problem = make_problem(MemorySpec(objective="self"), chunk_size=4, tokens=8)
    with torch.no_grad():
        found = recurrent_results(problem)
    for name, want in evaluate_oracle(problem).values.items():
        assert (found[name] - want).abs().max() <= 1e-13 and not found[name].requires_grad


@pytest.mark.parametrize("chunk_size", [16, 33, 64])
@pytest.mark.parametrize("rule", ["gd", "dgd"])
def test_closed_forms_of_long_chunks_equal_the_token_loop(rule, chunk_size):
    """Long suffix products, and a triangular system of the whole chunk."""
    spec = MemorySpec("mlp", "gelu_tanh", objective="self", rule=rule)
    problem = make_problem(
        spec,
        chunk_size=chunk_size,
        batch=1,
        tokens=2 * chunk_size,
        heads=1,
        retention=True,
        momentum=rule == "gd",
        max_lr=0.1,
    )
    found = evaluate(problem, lambda p: package_results(p, backend="reference"))
    assert_equal_to_rounding(found, evaluate(problem, recurrent_results), 1e-12)
