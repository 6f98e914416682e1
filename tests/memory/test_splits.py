"""Any split of a sequence into calls gives the outputs, states and gradients of one call: the token loop's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hope_kernels import MemorySpec, memory_scan
from tests.cases import (
    COMPILED_BACKENDS,
    FLOAT64_BACKENDS,
    assert_equal_to_rounding,
    assert_within_budget,
    evaluate,
    evaluate_oracle,
    evaluate_package,
    make_problem,
    oracle_results,
    scan_stream,
    state_results,
)
from tests.strategies import split_problems


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(case=split_problems())
def test_any_split_equals_the_token_loop_in_values_and_all_gradients(backend, case):
    problem, lengths = case
    assert_equal_to_rounding(evaluate_package(problem, backend, lengths=lengths), evaluate_oracle(problem))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(case=split_problems(max_tokens=18), bptt_chunks=st.integers(1, 4))
def test_bptt_chunks_cuts_the_same_gradients_under_any_split(backend, case, bptt_chunks):
    problem, lengths = case
    found = evaluate_package(problem, backend, lengths=lengths, bptt_chunks=bptt_chunks)
    assert_equal_to_rounding(found, evaluate_oracle(problem, bptt_chunks=bptt_chunks))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("bptt_chunks", [1, 2, 3, 7])
def test_bptt_chunks_in_one_call_over_many_checkpoints(backend, bptt_chunks):
    problem = make_problem(MemorySpec("mlp", "silu"), chunk_size=2, tokens=41, momentum=True, retention=True)
    found = evaluate_package(problem, backend, bptt_chunks=bptt_chunks)
    assert_equal_to_rounding(found, evaluate_oracle(problem, bptt_chunks=bptt_chunks))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("rule", ["gd", "dgd"])
def test_one_call_over_many_chunks_equals_the_token_loop(backend, rule):
    """Long enough for several checkpoints whatever their interval, with a length that no interval divides."""
    problem = make_problem(MemorySpec(rule=rule), chunk_size=1, tokens=67, batch=1, retention=True, max_lr=0.1)
    assert_equal_to_rounding(evaluate_package(problem, backend), evaluate_oracle(problem))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("length", [5, 6])  # two tokens into a chunk, and at its end
def test_gradients_reach_a_state_that_is_used_and_continued(backend, length):
    """The loss sees the state between two calls as well as the last one, its pending tokens included."""
    problem = make_problem(MemorySpec(), chunk_size=3, tokens=11, momentum=True, retention=True)

    def both(results_of_prefix, results):
        prefix = {f"prefix {name}": value for name, value in results_of_prefix.items() if name != "output"}
        return prefix | results

    def package(p):
        _, middle = scan_stream(p.span(0, length), [length], backend=backend)
        first, _ = scan_stream(p.span(0, length), [length], backend=backend)
        rest = p.span(length, p.tokens)
        output, last = _continue(rest, middle, backend)
        return both(state_results(middle, True), {"output": torch.cat([first, output], 1), **state_results(last, True)})

    def truth(p):
        return both(oracle_results(p.span(0, length)), oracle_results(p))

    assert_equal_to_rounding(evaluate(problem, package), evaluate(problem, truth))


def _continue(problem, state, backend):
    return memory_scan(
        problem["q"],
        problem["k"],
        problem["v"],
        problem["lr"],
        state,
        spec=problem.spec,
        chunk_size=problem.chunk_size,
        retention=problem.get("retention"),
        momentum=problem.get("momentum"),
        backend=backend,
    )


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("length", [0, 4, 6, 9])
def test_two_continuations_of_one_state_do_not_see_each_other(backend, length):
    problem = make_problem(MemorySpec("glu", "silu"), chunk_size=3, tokens=14, retention=True)
    other = make_problem(MemorySpec("glu", "silu"), chunk_size=3, tokens=14, retention=True, seed=9)
    other = other.with_tensors(**{f"weight{i}": w for i, w in enumerate(problem.weights)})
    _, state = scan_stream(problem.span(0, length), [length], backend=backend)
    before = {name: value.clone() for name, value in state_results(state).items()}
    first = _continue(problem.span(length, 14), state, backend)
    _continue(other.span(length, 14), state, backend)
    again = _continue(problem.span(length, 14), state, backend)
    for name, value in state_results(state).items():
        assert torch.equal(value, before[name]), f"{name} of the given state changed"
    assert torch.equal(first.output, again.output)
    for name, value in state_results(first.state).items():
        assert torch.equal(value, state_results(again.state)[name]), name


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("lengths", [[0], [13], [5, 8], [1] * 13, [4, 0, 9]], ids=str)
def test_position_counts_tokens_and_pending_holds_those_of_the_unfinished_chunk(backend, lengths):
    problem = make_problem(MemorySpec(), chunk_size=5, tokens=sum(lengths), retention=True)
    _, state = scan_stream(problem, lengths, backend=backend)
    assert state.position == sum(lengths) and isinstance(state.position, int)
    pending = sum(lengths) % 5
    if not pending:
        assert state.pending_k is None and state.pending_lr is None and state.pending_retention is None
    else:
        tail = problem.span(sum(lengths) - pending, sum(lengths))
        assert torch.equal(state.pending_k, tail["k"]) and torch.equal(state.pending_v, tail["v"])
        assert torch.equal(state.pending_lr, tail["lr"]) and torch.equal(state.pending_retention, tail["retention"])
    assert state.pending_momentum is None  # a gate that was never given is never kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("rule", ["gd", "dgd"])
def test_streaming_in_lower_precision_stays_within_the_budget_of_one_eager_call(rule, backend, dtype):
    problem = make_problem(
        MemorySpec(rule=rule), chunk_size=8, tokens=45, dim=16, hidden=24, retention=True, max_lr=0.1
    ).cast(dtype)
    found = evaluate_package(problem, backend, lengths=[3, 1, 17, 0, 8, 16])
    eager, truth = evaluate_package(problem, "reference"), evaluate_oracle(problem)
    assert_within_budget(found, eager, truth, dtype)
