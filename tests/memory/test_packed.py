"""Packed sequences (`cu_seqlens`) and padded rows (`valid`) equal the same sequences one by one.

Backends without float64 are held to the `assert_..` of this file by tests of their own."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hope_kernels import MemorySpec, MemoryState, memory_scan
from tests.cases import (
    EXACT,
    FLOAT64_BACKENDS,
    GATES,
    PENDING,
    Problem,
    Results,
    assert_equal_to_rounding,
    evaluate,
    make_problem,
    momentum_of,
    oracle_results,
)
from tests.strategies import specs

TOKENS = ("q", "k", "v", *GATES)


def logical_state(state: MemoryState, momentum_in_use: bool) -> Results:
    """A per-sequence state's results by sequence: pending tensors are padded, a sequence's own are its first
    `position % C`."""
    positions = torch.as_tensor(state.position).expand(state.batch_size).tolist()
    results = {}
    for s, position in enumerate(positions):
        for i, weight in enumerate(state.weights):
            results[f"weight{i} of {s}"] = weight[s]
        for i, carried in enumerate(momentum_of(state, momentum_in_use)):
            results[f"momentum{i} of {s}"] = carried[s]
        count = position % state.chunk_size
        for name in PENDING if count else ():
            if getattr(state, name) is not None:
                results[f"{name} of {s}"] = getattr(state, name)[s, :count]
    return results


def sequence_results(
    problem: Problem, spans: list[list[tuple[int, int, int]]], bptt_chunks: int | None = None
) -> Results:
    """The oracle on sequences given as lists of (row, start, stop): what each got from every call, in order."""
    results = {}
    for s, pieces in enumerate(spans):

        def of_sequence(name, t, s=s, pieces=pieces):
            if name in TOKENS:
                return torch.cat([t[row : row + 1, start:stop] for row, start, stop in pieces], dim=1)
            return t[s : s + 1] if t.dim() == 4 else t

        one = problem.map(of_sequence)
        for name, value in oracle_results(one, bptt_chunks=bptt_chunks).items():
            results[f"{name} of {s}"] = value if name == "output" else value[0]
    return results


def call(problem: Problem, memory, backend: str, tokens: slice = slice(None), **layout):
    part = problem.map(lambda name, t: t[:, tokens] if name in TOKENS else t)
    layout = {n: x.to(part["q"].device) if isinstance(x, torch.Tensor) else x for n, x in layout.items()}
    return memory_scan(
        *(part[name] for name in ("q", "k", "v", "lr")),
        memory,
        spec=part.spec,
        chunk_size=part.chunk_size,
        retention=part.get("retention"),
        momentum=part.get("momentum"),
        backend=backend,
        **layout,
    )


@st.composite
def gated_specs(draw):
    spec = draw(specs)
    return spec, {"retention": draw(st.booleans()), "momentum": spec.rule == "gd" and draw(st.booleans())}


def initial_memory(problem: Problem, sequences: int, with_momentum: bool):
    if not with_momentum:
        return problem.weights
    return MemoryState.initial(
        problem.weights,
        problem.initial_momentum,
        spec=problem.spec,
        chunk_size=problem.chunk_size,
        batch_size=sequences if problem.weights[0].dim() == 3 else None,
    )


def packed_problem(spec, gates, lengths, *, shared, chunk_size, initial_momentum, heads) -> Problem:
    """All sequences in one row; weights and momentum, where not shared, one per sequence."""
    options = {**gates, "chunk_size": chunk_size, "heads": heads, "dim": 4, "hidden": 5}
    row = make_problem(spec, batch=1, tokens=sum(lengths), **options)
    states = make_problem(
        spec, batch=len(lengths), tokens=0, shared=shared, initial_momentum=initial_momentum, **options
    )
    return row.with_tensors(**{n: t for n, t in states.tensors.items() if n.startswith(("weight", "initial"))})


def offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


PACKED = {
    "gated": gated_specs(),
    "lengths": st.lists(st.integers(0, 9), min_size=1, max_size=5),
    "shared": st.booleans(),
    "carried": st.booleans(),
    "chunk_size": st.integers(1, 5),
    "dtype": st.sampled_from([torch.int32, torch.int64]),
    "bptt_chunks": st.sampled_from([None, None, 1, 2]),
}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(**PACKED)
def test_packed_sequences_equal_separate_ones(backend, **case):
    assert_packed_sequences_equal_separate_ones(backend, EXACT, **case)


def assert_packed_sequences_equal_separate_ones(
    backend, precision, *, gated, lengths, shared, carried, chunk_size, dtype, bptt_chunks, heads=2
):
    spec, gates = gated
    carried = carried and gates["momentum"]
    options = {"shared": shared, "chunk_size": chunk_size, "initial_momentum": carried, "heads": heads}
    problem = packed_problem(spec, gates, lengths, **options)
    bounds = offsets(lengths).tolist()

    def packed(p):
        memory = initial_memory(p, len(lengths), carried)
        output, state = call(p, memory, backend, cu_seqlens=offsets(lengths, dtype), bptt_chunks=bptt_chunks)
        assert state.position.tolist() == lengths and state.position.dtype == torch.int64
        pieces = {f"output of {s}": output[:, bounds[s] : bounds[s + 1]] for s in range(len(lengths))}
        return pieces | logical_state(state, "momentum" in p.tensors)

    spans = [[(0, bounds[s], bounds[s + 1])] for s in range(len(lengths))]
    precision.compare(backend, problem, packed, lambda p: sequence_results(p, spans, bptt_chunks))


PACKED_CALLS = {
    "gated": gated_specs(),
    "calls": st.integers(1, 4).flatmap(
        lambda s: st.lists(st.lists(st.integers(0, 6), min_size=s, max_size=s), min_size=2, max_size=3)
    ),
    "shared": st.booleans(),
    "chunk_size": st.integers(1, 5),
    "bptt_chunks": st.sampled_from([None, None, 1, 2]),
}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(**PACKED_CALLS)
def test_packed_calls_continue_each_sequence_from_its_own_position(backend, **case):
    assert_packed_calls_continue_each_sequence(backend, EXACT, **case)


def assert_packed_calls_continue_each_sequence(
    backend, precision, *, gated, calls, shared, chunk_size, bptt_chunks, heads=2
):
    spec, gates = gated
    flat = [length for lengths in calls for length in lengths]
    options = {"shared": True, "chunk_size": chunk_size, "initial_momentum": False, "heads": heads}
    problem = packed_problem(spec, gates, flat, **options)
    sequences = len(calls[0])
    if not shared:
        own = {
            f"weight{i}": torch.stack([(1 + 0.1 * s) * w for s in range(sequences)])
            for i, w in enumerate(problem.weights)
        }
        problem = problem.with_tensors(**own)
    starts = [0, *accumulate(sum(lengths) for lengths in calls)]

    def bounds(c):
        return [starts[c] + b for b in offsets(calls[c]).tolist()]

    def packed(p):
        memory, outputs = p.weights, [[] for _ in range(sequences)]
        for c, lengths in enumerate(calls):
            tokens = slice(starts[c], starts[c + 1])
            output, memory = call(p, memory, backend, tokens, cu_seqlens=offsets(lengths), bptt_chunks=bptt_chunks)
            for s in range(sequences):
                outputs[s].append(output[:, bounds(c)[s] - starts[c] : bounds(c)[s + 1] - starts[c]])
        assert memory.position.tolist() == [sum(lengths) for lengths in zip(*calls, strict=True)]
        return {f"output of {s}": torch.cat(parts, 1) for s, parts in enumerate(outputs)} | logical_state(
            memory, "momentum" in p.tensors
        )

    spans = [[(0, bounds(c)[s], bounds(c)[s + 1]) for c in range(len(calls))] for s in range(sequences)]
    precision.compare(backend, problem, packed, lambda p: sequence_results(p, spans, bptt_chunks))


@st.composite
def valid_ranges(draw, rows: int, tokens: int) -> list[tuple[int, int]]:
    """Left padding, right padding, both, none, and rows that are nothing but padding."""
    found = []
    for _ in range(rows):
        first = draw(st.integers(0, tokens))
        found.append((first, draw(st.integers(first, tokens))))
    return found


PADDED = {
    "gated": gated_specs(),
    "ranges": st.integers(0, 10).flatmap(lambda t: st.tuples(st.just(t), valid_ranges(3, t))),
    "shared": st.booleans(),
    "chunk_size": st.integers(1, 4),
    "carried": st.booleans(),
}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(**PADDED)
def test_padded_rows_equal_unpadded_ones_whatever_the_padding_holds(backend, **case):
    assert_padded_rows_equal_unpadded_ones(backend, EXACT, **case)


def assert_padded_rows_equal_unpadded_ones(
    backend, precision, *, gated, ranges, shared, chunk_size, carried, heads=2
):
    spec, gates = gated
    tokens, valid = ranges
    rows = len(valid)
    carried = carried and gates["momentum"]
    options = {**gates, "heads": heads, "dim": 4, "hidden": 5, "initial_momentum": carried, "shared": shared}
    problem = make_problem(spec, chunk_size=chunk_size, batch=rows, tokens=tokens, **options)
    inside = torch.zeros(rows, tokens, dtype=torch.bool)
    for b, (first, last) in enumerate(valid):
        inside[b, first:last] = True
    problem = problem.map(
        lambda name, t: (
            t.masked_fill(~inside.view(*inside.shape, *[1] * (t.dim() - 2)), float("nan")) if name in TOKENS else t
        )
    )

    def padded(p):
        memory = initial_memory(p, rows, carried)
        output, state = call(p, memory, backend, valid=torch.tensor(valid, dtype=torch.int32))
        assert torch.equal(output[~inside], torch.zeros_like(output[~inside])), "the output of padding is not 0"
        pieces = {f"output of {b}": output[b : b + 1, first:last] for b, (first, last) in enumerate(valid)}
        assert state.position.tolist() == [last - first for first, last in valid]
        return pieces | logical_state(state, "momentum" in p.tensors)

    spans = [[(b, first, last)] for b, (first, last) in enumerate(valid)]
    found = precision.compare(backend, problem, padded, lambda p: sequence_results(p, spans))
    for name in TOKENS:
        if name in found.gradients:
            assert (found.gradients[name][~inside] == 0).all(), f"gradient of {name} in the padding is not 0"


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
def test_padded_and_plain_calls_of_one_stream_can_follow_each_other(backend, momentum):
    """A prompt of unequal lengths (left-padded), tokens for everyone, then a padded call again."""
    problem = make_problem(
        MemorySpec("mlp", "silu"), chunk_size=4, batch=3, tokens=20, retention=True, momentum=momentum
    )
    calls = [
        (slice(0, 9), [(0, 9), (3, 9), (9, 9)]),
        (slice(9, 14), None),
        (slice(14, 20), [(0, 2), (0, 6), (0, 0)]),
    ]

    def stream(p):
        memory, outputs = p.weights, []
        for tokens, valid in calls:
            layout = {} if valid is None else {"valid": torch.tensor(valid, dtype=torch.int32)}
            output, memory = call(p, memory, backend, tokens, **layout)
            outputs.append(output)
        pieces = {}
        for b in range(3):
            parts = [
                o[b : b + 1] if valid is None else o[b : b + 1, slice(*valid[b])]
                for o, (_, valid) in zip(outputs, calls, strict=True)
            ]
            pieces[f"output of {b}"] = torch.cat(parts, 1)
        assert memory.position.tolist() == [9 + 5 + 2, 6 + 5 + 6, 0 + 5 + 0]
        return pieces | logical_state(memory, "momentum" in p.tensors)

    spans = [
        [(b, t.start + (v[b][0] if v else 0), t.start + v[b][1] if v else t.stop) for t, v in calls] for b in range(3)
    ]
    assert_equal_to_rounding(evaluate(problem, stream), evaluate(problem, lambda p: sequence_results(p, spans)))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_full_rows_given_as_valid_equal_the_call_without_it(backend):
    problem = make_problem(MemorySpec(), chunk_size=3, batch=2, tokens=8, momentum=True)

    def results(p, **layout):
        output, state = call(p, p.weights, backend, **layout)
        return {"output": output, **logical_state(state, "momentum" in p.tensors)}

    found = evaluate(problem, lambda p: results(p, valid=torch.tensor([[0, 8], [0, 8]], dtype=torch.int32)))
    assert_equal_to_rounding(found, evaluate(problem, results), 1e-12)
