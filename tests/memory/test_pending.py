"""Pending tokens gather in place: no result, no earlier state and no gradient may tell."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hope_kernels import MemorySpec, MemoryState, memory_scan
from hope_kernels.memory import pending
from tests.cases import BACKENDS, make_problem, state_results

pytestmark = [m for p in BACKENDS if p.values == ("cpu",) for m in p.marks]

SPEC = MemorySpec("mlp", "silu")


def problem(momentum: bool = True):
    sizes = {"tokens": 40, "chunk_size": 16, "batch": 2, "heads": 3, "dim": 16, "hidden": 32}
    return make_problem(SPEC, **sizes, retention=True, momentum=momentum).cast(torch.float32)


P = problem()


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However few tokens are pending."""
    monkeypatch.setattr(pending, "WORTHWHILE", 0)


def scan(tokens: slice, memory, p=P, **options):
    options = {"spec": p.spec, "chunk_size": p.chunk_size, "backend": "cpu", **options}
    gates = {name: p[name][:, tokens] for name in ("retention", "momentum") if p.get(name) is not None}
    return memory_scan(*(p[name][:, tokens] for name in ("q", "k", "v", "lr")), memory, **gates, **options)


def stream(parts, p=P, **options) -> tuple[list[Tensor], list[MemoryState]]:
    """Outputs and states of calls of so many tokens each."""
    memory, outputs, states, first = p.weights, [], [], 0
    for count in parts:
        output, memory = scan(slice(first, first + count), memory, p, **options)
        outputs.append(output)
        states.append(memory)
        first += count
    return outputs, states


def snapshot(state: MemoryState) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in state_results(state).items() if isinstance(x, Tensor)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


PARTS = [[1] * 40, [3, 1, 1, 7, 1, 1, 1, 9, 1, 5, 1, 4], [15, 1, 2, 13, 1, 1]]


@pytest.mark.parametrize("options", [{}, {"backend": "cpu:factored"}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", PARTS, ids=["one by one", "some", "to the end of a chunk"])
def test_outputs_and_every_state_are_those_of_concatenated_tokens(parts, dtype, options, monkeypatch):
    p = problem(momentum=options.get("backend") != "cpu:factored").cast(dtype)
    with torch.no_grad():
        outputs, states = stream(parts, p, **options)
        assert any(state.room is not None for state in states)
        monkeypatch.setattr(pending, "WORTHWHILE", 1 << 60)
        expected, plain_states = stream(parts, p, **options)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    for state, want in zip(states, plain_states, strict=True):  # all of them at the end, the first among them
        assert_equal(snapshot(state), snapshot(want))


def test_tokens_that_are_there_are_not_moved_but_to_twice_their_room():
    with torch.no_grad():
        states = stream([1] * 15)[1]
    places = [state.pending_k.data_ptr() for state in states]
    assert states[0].room is None and len(set(places[1:3])) == 1  # room for 4
    assert len(set(places[4:9])) == 1 and len(set(places[10:])) == 1
    assert all(state.room.memory[0].shape[1] <= 15 for state in states[1:])  # 16 are a chunk


def test_only_the_newest_state_goes_on_in_place_and_only_once():
    with torch.no_grad():
        _, states = stream([1] * 5)
        kept = [snapshot(state) for state in states]
        branches = [scan(slice(first, first + 1), states[3]).state for first in (20, 21)]  # behind the newest
        twice = [scan(slice(first, first + 1), states[4]).state for first in (22, 23, 24)]
    first, second, third = (state.pending_k.data_ptr() == states[4].pending_k.data_ptr() for state in twice)
    assert first and not second and not third
    for state, at in zip((*branches, *twice), (20, 21, 22, 23, 24), strict=True):
        assert torch.equal(state.pending_k[:, -1], P["k"][:, at]) and torch.equal(
            state.pending_lr[:, -1], P["lr"][:, at]
        )
        assert torch.equal(state.pending_v[:, :4], P["v"][:, :4])
    for state, want in zip(states, kept, strict=True):
        assert_equal(snapshot(state), want)


def test_a_state_with_other_tokens_does_not_go_on_in_the_room_of_its_old_ones():
    with torch.no_grad():
        state = stream([1] * 5)[1][-1]
        other = state.replaced(pending_v=-state.pending_v, room=state.room)
        for made in (other, replace(state, pending_v=-state.pending_v)):
            after = scan(slice(5, 6), made).state
            assert torch.equal(after.pending_v[:, :5], -P["v"][:, :5])
        after = scan(slice(5, 6), state).state
    assert torch.equal(after.pending_v, P["v"][:, :6])
    assert after.pending_v.data_ptr() == state.pending_v.data_ptr()  # the turn was still its own


def test_a_graph_that_holds_earlier_tokens_does_not_mind_what_is_written_behind_them():
    with torch.no_grad():
        state = stream([1] * 5)[1][-1]
    weights = [w.clone().requires_grad_() for w in P.weights]
    held = state.replaced(stored_weights=tuple(weights), room=state.room)
    output, after = scan(slice(5, 30), held)  # writes the pending tokens
    assert after.room is None
    expected = torch.autograd.grad(output.square().sum(), weights, retain_graph=True)
    with torch.no_grad():
        for first in range(5, 9):
            state = scan(slice(first, first + 1), state).state
    found = torch.autograd.grad(output.square().sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["k", "pending_v"])
def test_tokens_whose_gradients_are_wanted_are_concatenated(name):
    with torch.no_grad():
        state = stream([1] * 5)[1][-1]
    p = P
    if name == "k":
        p = P.map(lambda n, x: x.clone().requires_grad_() if n == "k" else x)
        source = p["k"]
    else:
        source = state.pending_v.clone().requires_grad_()
        state = state.replaced(pending_v=source, room=state.room)
    after = scan(slice(5, 6), state, p).state
    assert after.room is None
    (gradient,) = torch.autograd.grad(getattr(after, "pending_" + name[-1]).sum(), source)
    assert gradient.sum() == (source.numel() if name != "k" else source[:, 5:6].numel())


@pytest.mark.parametrize(("first", "then"), [(torch.inference_mode, nullcontext), (nullcontext, torch.inference_mode)])
def test_inference_tensors_stay_among_themselves(first, then):
    with torch.no_grad():
        with first():
            state = stream([1] * 5)[1][-1]
        with then():
            after = scan(slice(5, 6), state).state
            assert after.pending_k.is_inference() == torch.is_inference_mode_enabled()
            again = scan(slice(6, 7), after).state
        assert again.room is not None and torch.equal(again.pending_k, P["k"][:, :7])


def test_threads_that_go_on_from_one_state_each_keep_their_own_tokens():
    with torch.no_grad():
        state = stream([1] * 5)[1][-1]
    start, found = threading.Barrier(8), [None] * 8

    def work(i: int) -> None:
        start.wait(60)
        memory = state
        with torch.no_grad():
            for step in range(6):
                at = 8 + (5 * i + step) % 32
                memory = scan(slice(at, at + 1), memory).state
        found[i] = memory

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, memory in enumerate(found):
        rows = [*range(5), *(8 + (5 * i + step) % 32 for step in range(6))]
        for name in ("k", "v", "lr", "retention", "momentum"):
            assert torch.equal(getattr(memory, f"pending_{name}"), P[name][:, rows]), (i, name)


def test_a_detached_state_goes_on_in_place():
    with torch.no_grad():
        state = stream([1] * 5)[1][-1].detach()
        after = scan(slice(5, 6), state).state
    assert after.pending_k.data_ptr() == state.pending_k.data_ptr()
    state = stream([1] * 5, P.map(lambda n, x: x.clone().requires_grad_() if n == "k" else x))[1][-1]
    assert state.pending_k.requires_grad and not state.detach().pending_k.requires_grad


def test_what_is_stored_is_what_is_used():
    with torch.no_grad():
        state = stream([1] * 9)[1][-1]
    assert state.room.memory[0].shape[1] > 9
    stored = state.state_dict()
    assert stored["pending_k"].untyped_storage().nbytes() == stored["pending_k"].nbytes
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    again = MemoryState.from_state_dict(torch.load(file, weights_only=True))
    assert_equal(snapshot(again), snapshot(state))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_and_its_original_go_on_apart(pickled):
    with torch.no_grad():
        state = stream([1] * 5)[1][-1]
        other = pickle.loads(pickle.dumps(state)) if pickled else copy.deepcopy(state)
        after = [scan(slice(first, first + 2), s).state for s, first in ((state, 5), (other, 20))]
        assert torch.equal(after[0].pending_k, P["k"][:, :7])
        assert torch.equal(after[1].pending_k, P["k"][:, [*range(5), 20, 21]])


def test_a_turn_is_taken_once():
    with torch.no_grad():
        state = stream([1] * 5)[1][-1]
    assert [state.room.take(state.pending) for _ in range(2)] == [True, False]
