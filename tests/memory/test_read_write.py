"""`memory_read` and `memory_write` are the two halves of a scan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from hope_kernels import MemorySpec, MemoryState, memory_read, memory_scan, memory_write
from tests import oracle
from tests.cases import (
    COMPILED_BACKENDS,
    FLOAT64_BACKENDS,
    Problem,
    assert_equal_to_rounding,
    assert_within_budget,
    evaluate,
    make_problem,
    momentum_of,
    oracle_results,
    scan_stream,
)
from tests.strategies import problems


def write(problem: Problem, memory, backend: str) -> MemoryState:
    return memory_write(
        problem["k"],
        problem["v"],
        problem["lr"],
        memory,
        spec=problem.spec,
        retention=problem.get("retention"),
        momentum=problem.get("momentum"),
        backend=backend,
    )


def written_results(problem: Problem, state: MemoryState) -> dict[str, torch.Tensor]:
    results = {f"weight{i}": w for i, w in enumerate(state.weights)}
    return results | {f"momentum{i}": m for i, m in enumerate(momentum_of(state, "momentum" in problem.tensors))}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(problem=problems())
def test_a_read_is_the_memorys_network_token_by_token(backend, problem):
    def read(p):
        return {"output": memory_read(p["q"], p.weights, spec=p.spec, backend=backend)}

    def expected(p):
        weights = tuple(w if w.dim() == 4 else w.expand(p.batch, *w.shape) for w in p.weights)
        outputs = [oracle.apply_memory(p.spec, weights, p["q"][:, t])[0] for t in range(p.tokens)]
        return {"output": torch.stack(outputs, 1) if outputs else torch.zeros_like(p["q"])}

    relevant = Problem(
        problem.spec,
        problem.chunk_size,
        {n: t for n, t in problem.tensors.items() if n in ("q", "k") or n.startswith("weight")},
    )
    assert_equal_to_rounding(evaluate(relevant, read), evaluate(relevant, expected), 1e-12)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("length", [0, 3, 4, 6])
def test_reading_a_state_uses_its_weights_and_leaves_its_pending_tokens_alone(length, backend):
    problem = make_problem(MemorySpec("glu", "silu"), chunk_size=4, tokens=10, retention=True)

    def read(p):
        _, state = scan_stream(p.span(0, length), [length], backend=backend)
        return {"output": memory_read(p["q"], state, spec=p.spec, backend=backend)}

    def expected(p):
        part = p.span(0, length)
        finals = oracle_results(part)
        state = tuple(finals[f"weight{i}"] for i in range(3))
        return {"output": torch.stack([oracle.apply_memory(p.spec, state, p["q"][:, t])[0] for t in range(10)], 1)}

    assert_equal_to_rounding(evaluate(problem, read), evaluate(problem, expected))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(problem=problems(max_tokens=8))
def test_a_write_equals_a_scan_of_one_chunk(backend, problem):
    size = max(problem.tokens, 1)
    one_chunk = Problem(problem.spec, size, problem.tensors)

    def written(p):
        state = write(p, p.memory(), backend)
        assert state.position == p.tokens and state.pending_k is None
        return written_results(p, state)

    def expected(p):
        return {n: r for n, r in oracle_results(p).items() if n.startswith(("weight", "momentum"))}

    assert_equal_to_rounding(evaluate(one_chunk, written), evaluate(one_chunk, expected))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
def test_scans_writes_and_reads_of_one_stream_follow_each_other(momentum, backend):
    """Two chunks of 3 by a scan, 5 tokens as one chunk by a write, 7 tokens (two chunks and one pending) by a scan."""
    problem = make_problem(MemorySpec(), chunk_size=3, tokens=18, retention=True, momentum=momentum)

    def stream(p):
        first, state = scan_stream(p.span(0, 6), [6], backend=backend)
        state = write(p.span(6, 11), state, backend)
        assert state.position == 11 and state.chunk_size == 3
        rest = p.span(11, 18)
        last = memory_scan(
            *(rest[n] for n in ("q", "k", "v", "lr")),
            state,
            spec=p.spec,
            chunk_size=3,
            retention=rest["retention"],
            momentum=rest.get("momentum"),
            backend=backend,
        )
        assert last.state.position == 18
        return {"first": first, "last": last.output, **written_results(p, last.state)}

    def expected(p):
        weights, carried, outputs = p.weights, None, []
        for start, stop, size in ((0, 6, 3), (6, 11, 5), (11, 18, 3)):
            part = p.span(start, stop)
            output, weights, carried = oracle.scan(
                *(part[n] for n in ("q", "k", "v", "lr")),
                weights,
                spec=p.spec,
                chunk_size=size,
                retention=part["retention"],
                momentum=part.get("momentum"),
                initial_momentum=carried or None,
            )
            outputs.append(output)
        results = {"first": outputs[0], "last": outputs[2]}
        results |= {f"weight{i}": w for i, w in enumerate(weights)}
        return results | {f"momentum{i}": m for i, m in enumerate(carried)}

    assert_equal_to_rounding(evaluate(problem, stream), evaluate(problem, expected))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_the_chunk_size_may_change_between_chunks_of_a_stream(backend):
    problem = make_problem(MemorySpec(rule="dgd"), chunk_size=3, tokens=14)

    def stream(p):
        first, state = scan_stream(p.span(0, 6), [6], backend=backend)
        rest = p.span(6, 14)
        last = memory_scan(*(rest[n] for n in ("q", "k", "v", "lr")), state, spec=p.spec, chunk_size=4, backend=backend)
        assert last.state.position == 14 and last.state.chunk_size == 4 and last.state.pending_k is None
        return {"output": torch.cat([first, last.output], 1), **written_results(p, last.state)}

    def expected(p):
        head, rest = p.span(0, 6), p.span(6, 14)
        first = oracle.scan(*(head[n] for n in ("q", "k", "v", "lr")), p.weights, spec=p.spec, chunk_size=3)
        last = oracle.scan(*(rest[n] for n in ("q", "k", "v", "lr")), first.weights, spec=p.spec, chunk_size=4)
        weights = {f"weight{i}": w for i, w in enumerate(last.weights)}
        return {"output": torch.cat([first.output, last.output], 1), **weights}

    assert_equal_to_rounding(evaluate(problem, stream), evaluate(problem, expected))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_a_write_refuses_a_state_with_pending_tokens_and_leaves_it_as_it_was(backend):
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=10)
    _, state = scan_stream(problem.span(0, 6), [6], backend=backend)
    before = [w.clone() for w in state.weights]
    with pytest.raises(ValueError, match="pending"):
        write(problem.span(6, 10), state, backend)
    assert state.position == 6 and state.pending_k.shape[1] == 2
    assert all(torch.equal(a, b) for a, b in zip(state.weights, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("rule", ["gd", "dgd"])
def test_reads_and_writes_in_lower_precision_stay_within_the_budget(rule, backend, dtype):
    problem = make_problem(
        MemorySpec(rule=rule), chunk_size=19, tokens=19, dim=16, hidden=24, retention=True, max_lr=0.1
    ).cast(dtype)

    def halves(p, name):
        state = write(p, p.weights, name)
        return {"output": memory_read(p["q"], state, spec=p.spec, backend=name), **written_results(p, state)}

    def truth(p):
        results = {n: r for n, r in oracle_results(p).items() if n.startswith("weight")}
        state = tuple(results[f"weight{i}"] for i in range(2))
        results["output"] = torch.stack([oracle.apply_memory(p.spec, state, p["q"][:, t])[0] for t in range(19)], 1)
        return results

    exact = evaluate(problem.cast(torch.float64), truth)
    eager = evaluate(problem, lambda p: halves(p, "reference"))
    assert_within_budget(evaluate(problem, lambda p: halves(p, backend)), eager, exact, dtype)
