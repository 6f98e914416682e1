"""Carrying a CMS's state: any split of a sequence into calls is the same, and a state is a value."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hope_kernels import CMS, CMSLevel
from hope_kernels.layers import CMSState
from tests.cases import FLOAT64_BACKENDS
from tests.layers.common import (
    DIM,
    HEADS,
    VARIANTS,
    assert_same,
    make_cms,
    positions_of,
    results_of,
    run_stream,
    spread,
    tokens,
    with_gradients,
)
from tests.strategies import splits


def all_tensors(state: CMSState) -> list[Tensor]:
    """Every tensor a state holds, stored ones included, in a fixed order."""
    found: list[Tensor] = []

    def visit(value) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(state.state_dict())
    return found


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=8)
@given(data=st.data())
def test_any_split_gives_the_same_outputs_states_and_gradients(variant, momentum, backend, data) -> None:
    length = data.draw(st.integers(0, 17))
    # 1, 2, 6 are the chunk sizes (and 2, 6 the segments) of the layer: straddle each of them.
    lengths = data.draw(splits(length, data.draw(st.sampled_from([2, 3, 6]))))
    cms = make_cms(variant, momentum=momentum, backend=backend, seed=data.draw(st.integers(0, 3)))
    x = tokens(2, length)
    assert_same(with_gradients(cms, x, lengths), with_gradients(cms, x, [length]))
    _, split = run_stream(cms, x, lengths)
    _, whole = run_stream(cms, x, [length])
    assert positions_of(split) == positions_of(whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_call_is_a_stream_from_the_initial_state(variant) -> None:
    cms = make_cms(variant, momentum=True)
    x = tokens(2, 15).requires_grad_()
    leaves = [x, *cms.parameters()]
    output, _ = cms.stream(x, cms.init_state(2))
    torch.testing.assert_close(output, cms(x), rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(output.sin().sum(), leaves),
        torch.autograd.grad(cms(x).sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_flow_through_a_carried_state_until_it_is_detached() -> None:
    cms = make_cms("sequential")
    first, second = tokens(2, 7, seed=1).requires_grad_(), tokens(2, 7, seed=2)
    _, state = cms.stream(first, cms.init_state(2))
    through, _ = cms.stream(second, state)
    cut, _ = cms.stream(second, state.detach())
    assert torch.equal(through, cut)
    (gradient,) = torch.autograd.grad(through.sum(), first)
    # Tokens 0 .. 5 were written; token 6 is pending in the level with chunks of 2 and 6, and is written next.
    assert (gradient.abs().amax((0, 2)) > 1e-9).all()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(cut.sum(), first, allow_unused=False)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_changes_nothing_in_the_state_or_tokens_it_is_given(variant, backend) -> None:
    cms = make_cms(variant, momentum=True, backend=backend)
    x = tokens(2, 24)
    for before, after in itertools.product([0, 1, 5, 12], [0, 1, 3, 12]):
        with torch.no_grad():
            _, state = cms.stream(x[:, :before], cms.init_state(2))
            held = all_tensors(state)
            copies, versions = [t.clone() for t in held], [t._version for t in held]
            positions = positions_of(state)
            part = x[:, before : before + after]
            output, _ = cms.stream(part, state)
            assert all(torch.equal(t, c) for t, c in zip(held, copies, strict=True))
            assert [t._version for t in held] == versions
            assert positions_of(state) == positions
            # and so a second call from it gives the same again (beam search, retries)
            assert torch.equal(cms.stream(part, state)[0], output)


def test_a_state_does_not_change_when_the_tokens_it_came_from_do() -> None:
    cms = make_cms("sequential")
    x, more = tokens(2, 5), tokens(2, 8, seed=3)
    with torch.no_grad():
        _, state = cms.stream(x, cms.init_state(2))
        expected, _ = cms.stream(more, state)
        x.zero_()
        assert torch.equal(cms.stream(more, state)[0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_alone_has_the_state_of_the_row_in_a_batch(variant) -> None:
    cms = make_cms(variant, momentum=True)
    x = tokens(3, 11)
    _, together = cms.stream(x, cms.init_state(3))
    _, alone = cms.stream(x[1:2], cms.init_state(1))
    picked = results_of(x[:0], together.index_select([1]))
    assert_same(results_of(x[:0], alone), picked, tolerance=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seen", [0, 5, 6, 9])
def test_index_select_reorders_and_repeats_sequences(variant, seen) -> None:
    cms = make_cms(variant, momentum=True)
    x, more = tokens(3, seen), tokens(3, 8, seed=4)
    order = torch.tensor([2, 0, 0, 1])
    _, state = cms.stream(x, cms.init_state(3))
    expected, _ = cms.stream(more, state)
    selected = state.index_select(order)
    assert selected.batch_size == 4
    got, _ = cms.stream(more[order], selected)
    torch.testing.assert_close(got, expected[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seen", [0, 5, 6, 9])
def test_a_saved_state_goes_on_where_it_was(variant, seen) -> None:
    cms = make_cms(variant, momentum=True)
    more = tokens(2, 8, seed=4)
    with torch.no_grad():
        _, state = cms.stream(tokens(2, seen), cms.init_state(2))
        file = io.BytesIO()
        torch.save(state.state_dict(), file)
        file.seek(0)
        loaded = CMSState.from_state_dict(torch.load(file, weights_only=True))
        assert positions_of(loaded) == positions_of(state)
        assert_same(results_of(*cms.stream(more, loaded)), results_of(*cms.stream(more, state)), tolerance=0.0)
    with pytest.raises(ValueError, match=r"state_dict: got names .*'tokens'.*want .*'position'"):
        CMSState.from_state_dict({"tokens": 3})


def test_a_state_moves_to_another_dtype_with_its_layer() -> None:
    cms = make_cms("sequential", momentum=True)
    x, more = tokens(2, 5), tokens(2, 9, seed=4)
    _, state = cms.stream(x, cms.init_state(2))
    expected, _ = cms.stream(more, state)
    got, _ = cms.float().stream(more.float(), state.to(torch.float32))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def test_nested_state_is_the_initial_one_again_after_a_segment() -> None:
    cms = make_cms("nested", momentum=True)  # segments: 2, 6, none
    for lengths in ([12], [5, 7], [1] * 12, [2, 9, 1]):
        _, state = run_stream(cms, tokens(2, 12), lengths)
        for index in (0, 1):
            level = state.levels[index]
            assert (level.position, level.chunk_index, level.pending_count) == (0, 0, 0)
            assert level.momentum is None
            assert all(a is b for a, b in zip(level.stored_weights, cms.levels[index].weights, strict=True))
        assert state.levels[2].chunk_index == 2
        assert (state.levels[2].weights[0] - cms.levels[2].weights[0]).abs().max() > 1e-4


def test_the_last_written_level_of_a_nested_cms_is_never_reset() -> None:
    for last in ([], [CMSLevel(None)]):
        cms = CMS(DIM, [CMSLevel(2), CMSLevel(4), *last], heads=HEADS, variant="nested")
        assert [level.segment for level in cms.levels[:2]] == [4, None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_initial_state_holds_the_parameters_themselves(variant) -> None:
    cms = make_cms(variant)
    state = cms.init_state(3)
    for level, held in zip(cms.levels[:3], state.levels[:3], strict=True):
        for parameter, weight in zip(level.weights, held.stored_weights, strict=True):
            assert weight is parameter
    assert state.levels[3] is None
    assert [held.batch_size for held in state.levels[:3]] == [3, 3, 3]
    with pytest.raises(AttributeError):
        state.position = 4


def test_streaming_many_calls_keeps_memory_constant() -> None:
    torch.manual_seed(0)
    cms = spread(CMS(DIM, [CMSLevel(2), CMSLevel(6), CMSLevel(None)], heads=HEADS, variant="nested"))
    x = tokens(2, 12, dtype=torch.float32)
    sizes = []
    with torch.no_grad():
        state = cms.init_state(2)
        for _ in range(4):
            _, state = cms.stream(x[:, :7], state)
            _, state = cms.stream(x[:, 7:], state)
            sizes.append(sum(t.untyped_storage().nbytes() for t in all_tensors(state)))
    assert len(set(sizes)) == 1
