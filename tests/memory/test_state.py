"""`MemoryState`: immutable, portable, reorderable, and never a view into what the caller may change."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch

from hope_kernels import MemorySpec, MemoryState, memory_scan, memory_write
from tests.cases import (
    BACKENDS,
    FLOAT64_BACKENDS,
    PENDING,
    Problem,
    assert_equal_to_rounding,
    device_of,
    evaluate,
    make_problem,
    scan_stream,
    state_results,
)

SPEC = MemorySpec("mlp", "silu")


def problem_of(dtype: torch.dtype = torch.float64, **options) -> Problem:
    options = {"chunk_size": 4, "batch": 3, "tokens": 14, "retention": True, "momentum": True, **options}
    return make_problem(SPEC, **options).cast(dtype)


def advance(problem: Problem, state, start: int, stop: int, backend: str, **layout):
    part = problem.span(start, stop)
    return memory_scan(
        *(part[n] for n in ("q", "k", "v", "lr")),
        state,
        spec=part.spec,
        chunk_size=part.chunk_size,
        retention=part.get("retention"),
        momentum=part.get("momentum"),
        backend=backend,
        **layout,
    )


def assert_same_state(a: MemoryState, b: MemoryState) -> None:
    found, expected = state_results(a), state_results(b)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(found[name], want) and found[name].dtype == want.dtype, name
    assert torch.equal(torch.as_tensor(a.position), torch.as_tensor(b.position))
    assert (a.spec, a.chunk_size, a.batch_size) == (b.spec, b.chunk_size, b.batch_size)


# Stages of a stream: nothing seen, pending only, at the end of a chunk, written and pending.
STAGES = [0, 3, 8, 10]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_call_changes_neither_the_state_it_is_given_nor_its_inputs(stage, backend):
    problem = problem_of(torch.float32).to(device_of(backend))
    kept = problem.map(lambda _, t: t.clone())
    _, state = scan_stream(problem.span(0, stage), [stage], backend=backend)
    before = {name: value.clone() for name, value in state_results(state).items()}
    position = state.position
    advance(problem, state, stage, 14, backend)
    assert state.position == position
    for name, want in before.items():
        assert torch.equal(state_results(state)[name], want), name
    for name, want in kept.tensors.items():
        assert torch.equal(problem[name], want), name


def test_attributes_cannot_be_assigned():
    state = MemoryState.initial(problem_of().weights, spec=SPEC, chunk_size=4)
    for name in ("position", "spec", "chunk_size", "batch_size", "pending_k"):
        with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
            setattr(state, name, None)
    with pytest.raises((AttributeError, TypeError)):
        state.weights = ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pending_tokens_are_copies_the_caller_may_reuse_its_buffers(backend):
    problem = problem_of(torch.float32).to(device_of(backend))
    buffers = problem.map(lambda _, t: t.clone())
    output, state = advance(buffers, problem.memory(), 0, 10, backend)
    for name in ("q", "k", "v", "lr", "retention", "momentum"):
        buffers[name].fill_(float("nan"))
    expected, untouched = scan_stream(problem.span(0, 10), [10], backend=backend)
    assert torch.equal(output, expected)
    assert_same_state(state, untouched)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("per_row", [False, True])
def test_state_dict_round_trip_through_a_file_continues_bit_for_bit(stage, per_row, backend):
    problem = problem_of(torch.float32).to(device_of(backend))
    layout = {"valid": torch.tensor([[0, stage], [stage // 2, stage], [stage, stage]])} if per_row else {}
    layout = {name: t.to(problem["q"].device) for name, t in layout.items()}
    _, state = advance(problem, problem.memory(), 0, stage, backend, **layout)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    loaded = MemoryState.from_state_dict(torch.load(file, weights_only=True))
    assert_same_state(loaded, state)
    found, expected = advance(problem, loaded, stage, 14, backend), advance(problem, state, stage, 14, backend)
    assert torch.equal(found.output, expected.output)
    assert_same_state(found.state, expected.state)


def test_from_state_dict_names_what_is_missing_or_unknown():
    state = MemoryState.initial(problem_of().weights, spec=SPEC, chunk_size=4).state_dict()
    with pytest.raises(ValueError, match="surplus"):
        MemoryState.from_state_dict({**state, "surplus": 1})
    with pytest.raises(ValueError, match="chunk_size"):
        MemoryState.from_state_dict({name: value for name, value in state.items() if name != "chunk_size"})


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shared", [True, False])
def test_index_select_reorders_and_repeats_sequences_with_their_gradients(stage, shared, backend):
    """Beam search: the continuation of a selected state is that of the rows it came from."""
    problem = problem_of(shared=shared)
    order = [2, 0, 0, 1]

    def selected_rows(p):  # the whole stream on selected rows: inputs selected before the scan
        rows = p.map(lambda n, t: t if n.startswith("weight") and shared else t[order])
        _, state = scan_stream(rows, [14], backend=backend)
        return state_results(state, True)

    def selected_state(p):
        _, state = scan_stream(p.span(0, stage), [stage], backend=backend)
        chosen = state.index_select(torch.tensor(order))
        assert chosen.batch_size == 4 and chosen.position == stage
        rows = p.map(lambda n, t: t if n.startswith("weight") else t[order])
        return state_results(advance(rows, chosen, stage, 14, backend).state, True)

    assert_equal_to_rounding(evaluate(problem, selected_state), evaluate(problem, selected_rows), 1e-12)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_index_select_keeps_per_row_positions_with_their_rows(backend):
    problem = problem_of()
    _, state = advance(problem, problem.memory(), 0, 7, backend, valid=torch.tensor([[0, 7], [1, 7], [5, 7]]))
    chosen = state.index_select([2, 0])
    assert chosen.position.tolist() == [2, 7]
    rows = problem.map(lambda n, t: t if n.startswith("weight") else t[[2, 0]])
    found, expected = advance(rows, chosen, 7, 14, backend), advance(problem, state, 7, 14, backend)
    assert ((found.output - expected.output[[2, 0]]).abs() <= 1e-13).all()
    assert found.state.position.tolist() == [9, 14]


def test_index_select_refuses_what_is_no_index():
    state = MemoryState.initial(problem_of().weights, spec=SPEC, chunk_size=4, batch_size=3)
    for bad in (torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([True, False, True])):
        with pytest.raises((ValueError, TypeError), match="indices"):
            state.index_select(bad)
    written = MemoryState.initial(problem_of(shared=False).weights, spec=SPEC, chunk_size=4)
    for rows, bad in ((written, [3]), (state, [3]), (state, [0, -1])):
        with pytest.raises(IndexError, match=r"indices: .* want all in \[0, 2\]"):
            rows.index_select(bad)
    assert state.index_select([]).batch_size == 0


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_detach_keeps_the_values_and_cuts_the_gradient(stage, backend):
    problem = problem_of()
    leaves = problem.map(lambda _, t: t.clone().requires_grad_())
    _, state = scan_stream(leaves.span(0, stage), [stage], backend=backend)
    cut = state.detach()
    assert_same_state(cut, state)
    assert not any(value.requires_grad for value in state_results(cut).values())
    if stage:
        # Before the first write there is no momentum to differentiate, only the zeros it starts from.
        learned = {name for name in state_results(state) if stage >= 4 or not name.startswith("momentum")}
        assert all(state_results(state)[name].requires_grad for name in learned)
    output, last = advance(leaves, cut, stage, 14, backend)
    (output.sum() + sum(w.sum() for w in last.weights)).backward()
    assert leaves["weight0"].grad is None
    for name in ("k", "lr"):
        assert (leaves[name].grad[:, :stage] == 0).all() and (leaves[name].grad[:, stage:12] != 0).any()


@pytest.mark.parametrize("stage", STAGES)
def test_to_moves_tokens_to_a_dtype_and_the_state_to_its_state_dtype(stage):
    problem = problem_of(torch.float32)
    _, state = scan_stream(problem.span(0, stage), [stage], backend="reference")
    double = state.to(torch.float64)
    assert all(value.dtype == torch.float64 for value in state_results(double).values())
    for name, value in state_results(double).items():
        assert torch.equal(value.float(), state_results(state)[name]), name
    low = state.to(torch.bfloat16)
    for name, value in state_results(low).items():
        assert value.dtype == (torch.bfloat16 if name in ("pending_k", "pending_v") else torch.float32), name
    assert double.position == low.position == stage
    assert_same_state(state.to("cpu"), state)
    # The moved state continues a stream in its new dtype.
    advance(problem.cast(torch.float64), double, stage, 14, "reference")
    continued = advance(problem.cast(torch.bfloat16), low, stage, 14, "reference")
    assert continued.output.dtype == torch.bfloat16 and continued.state.weights[0].dtype == torch.float32


def test_an_initial_state_refers_to_the_parameters_and_takes_its_batch_from_them_or_the_first_call():
    problem = problem_of()
    state = MemoryState.initial(problem.weights, spec=SPEC, chunk_size=4)
    assert state.batch_size is None and state.position == 0 and state.momentum is None
    assert all(getattr(state, name) is None for name in PENDING)
    assert [w.data_ptr() for w in state.weights] == [w.data_ptr() for w in problem.weights]
    output, after = advance(problem, state, 0, 14, "reference")
    assert after.batch_size == 3 and state.batch_size is None
    expected, _ = scan_stream(problem, [14], backend="reference")
    assert torch.equal(output, expected)
    own = problem_of(shared=False)
    assert MemoryState.initial(own.weights, spec=SPEC, chunk_size=4).batch_size == 3


def test_a_copy_of_a_state_stands_on_its_own():
    problem = problem_of()
    _, state = scan_stream(problem.span(0, 10), [10], backend="reference")
    copied = copy.deepcopy(state)
    assert_same_state(copied, state)
    for weight in state.weights:
        weight.zero_()
    assert all((w != 0).any() for w in copied.weights)


def test_the_text_of_a_state_says_where_it_stands():
    problem = problem_of()
    _, state = scan_stream(problem.span(0, 10), [10], backend="reference")
    assert "position=10" in repr(state) and "pending=2" in repr(state) and "mlp" in repr(state)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_momentum_in_use_is_zero_before_the_first_write_however_the_rows_lie(backend):
    problem = problem_of()
    part = problem.span(0, 3)
    call = {"spec": SPEC, "chunk_size": 4, "backend": backend}
    tokens = [part[name] for name in ("q", "k", "v", "lr")]
    gates = {"retention": part.get("retention"), "momentum": torch.full_like(part["lr"], 0.5)}
    rows = torch.tensor([[0, 3]] * tokens[0].shape[0], dtype=torch.int32)
    for valid in (None, rows):
        state = memory_scan(*tokens, problem.weights, **call, **gates, valid=valid).state
        assert [tuple(m.shape) for m in state.momentum] == [tuple(w.shape) for w in state.weights]
        assert not any(m.any() for m in state.momentum)
    gates["momentum"] = None
    assert memory_scan(*tokens, problem.weights, **call, **gates).state.momentum is None


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_rows_at_different_positions_without_a_pending_token_may_be_written_or_change_chunk_size(backend):
    problem = problem_of().span(0, 9)
    tokens = [problem[name] for name in ("q", "k", "v", "lr")]
    rows = len(tokens[0])
    call = {"spec": SPEC, "backend": backend}
    gates = {name: problem.get(name) for name in ("retention", "momentum")}
    shifted = torch.tensor([[i % 2, i % 2 + 8] for i in range(rows)], dtype=torch.int32)
    state = memory_scan(*tokens, problem.weights, **call, **gates, chunk_size=4, valid=shifted).state
    written = memory_write(*tokens[1:], state, **call, **gates)
    scanned = memory_scan(*tokens, state, **call, **gates, chunk_size=9).state
    for one, other in zip(written.weights, scanned.weights, strict=True):
        torch.testing.assert_close(one, other)
    short = torch.tensor([[0, 8 - i] for i in range(rows)], dtype=torch.int32)
    pending = memory_scan(*tokens, problem.weights, **call, **gates, chunk_size=4, valid=short).state
    with pytest.raises(ValueError, match="pending"):
        memory_write(*tokens[1:], pending, **call, **gates)
    with pytest.raises(ValueError, match="pending"):
        memory_scan(*tokens, pending, **call, **gates, chunk_size=9)


def test_weights_take_the_dtype_of_the_state_once_the_tokens_tell_it():
    problem = problem_of().span(0, 3).cast(torch.float64)
    weights = [w.float() for w in problem.weights]
    tokens = [problem[name] for name in ("q", "k", "v", "lr")]
    gates = {name: problem.get(name) for name in ("retention", "momentum")}
    state = memory_scan(*tokens, weights, spec=SPEC, chunk_size=4, **gates, backend="reference").state
    assert all(w.dtype == torch.float64 for w in state.weights)


@dataclasses.dataclass(frozen=True)
class Named(MemoryState):
    """A state of a class of its own."""


def test_a_state_of_another_class_stays_of_that_class():
    spec, weights = MemorySpec(), [torch.randn(1, 3, 5), torch.randn(1, 5, 3)]
    first = MemoryState.initial(weights, spec=spec, chunk_size=2, batch_size=1)
    state = Named(**{field.name: getattr(first, field.name) for field in dataclasses.fields(first)})
    k, lr = torch.randn(1, 3, 1, 3), torch.full((1, 3, 1), 0.1)
    assert type(memory_scan(k, k, k, lr, state, spec=spec, chunk_size=2).state) is Named
