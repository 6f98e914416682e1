"""Carrying the state of a Titans layer: any split of a sequence into calls is the same, and a state is a value."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hope_kernels.layers import TitansState
from tests.cases import FLOAT64_BACKENDS
from tests.layers.common import assert_same, run_stream, tokens, with_gradients
from tests.layers.titans_common import LAYERS, make_titans, positions_of, results_of
from tests.strategies import splits

CARRIED = ["titans", "gd", "fixed k and v", "all fixed", "plain"]


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=5)
@given(data=st.data())
def test_any_split_gives_the_same_outputs_states_and_gradients(name, backend, data) -> None:
    length = data.draw(st.integers(0, 13))
    # 4 is the convolution's width, 3 and 2 or 5 the chunk sizes: straddle each of them.
    lengths = data.draw(splits(length, data.draw(st.sampled_from([2, 3, 4, 5]))))
    options = {"bptt_chunks": data.draw(st.sampled_from([None, None, 1, 2])), "backend": backend}
    if not name.startswith("plain"):
        options["projection_chunk_size"] = data.draw(st.sampled_from([2, 5]))
    layer = make_titans(name, seed=data.draw(st.integers(0, 3)), **options)
    x = tokens(2, length)
    assert_same(with_gradients(layer, x, lengths, results_of), with_gradients(layer, x, [length], results_of))
    _, split = run_stream(layer, x, lengths)
    _, whole = run_stream(layer, x, [length])
    assert positions_of(split) == positions_of(whole)


@pytest.mark.parametrize("name", LAYERS)
def test_one_token_at_a_time_is_the_whole(name) -> None:
    layer = make_titans(name)
    x = tokens(2, 13)
    expected = layer(x)
    assert_same(
        with_gradients(layer, x, [1] * 13, results_of), with_gradients(layer, x, [13], results_of), tolerance=1e-10
    )
    with torch.no_grad():
        output, state = run_stream(layer, x, [1] * 13)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert (state.position, state.memory.position) == (13, 13)


@pytest.mark.parametrize("name", CARRIED)
def test_gradients_flow_through_a_carried_state_until_it_is_detached(name) -> None:
    layer = make_titans(name)
    first, second = tokens(2, 7, seed=1).requires_grad_(), tokens(2, 7, seed=2)
    _, state = layer.stream(first, layer.init_state(2))
    through, _ = layer.stream(second, state)
    cut, _ = layer.stream(second, state.detach())
    assert torch.equal(through, cut)
    (gradient,) = torch.autograd.grad(through.sum(), first)
    # Tokens 0 .. 5 were written, token 6 is pending, and the convolution still sees 4 .. 6.
    assert (gradient.abs().amax((0, 2)) > 1e-9).all()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(cut.sum(), first, allow_unused=False)


def all_tensors(value) -> list[Tensor]:
    """Every tensor in plain containers, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in all_tensors(item)]


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", CARRIED)
def test_stream_changes_nothing_in_the_state_or_tokens_it_is_given(name, backend) -> None:
    layer = make_titans(name, backend=backend)
    x = tokens(2, 20)
    for before, after in ((0, 1), (1, 2), (3, 3), (5, 0), (5, 8)):
        with torch.no_grad():
            _, state = layer.stream(x[:, :before], layer.init_state(2))
            held = all_tensors(state.state_dict())
            copies, versions = [t.clone() for t in held], [t._version for t in held]
            positions = positions_of(state)
            part = x[:, before : before + after].clone()
            output, after_part = layer.stream(part, state)
            assert all(torch.equal(t, c) for t, c in zip(held, copies, strict=True))
            assert [t._version for t in held] == versions
            assert positions_of(state) == positions
            assert torch.equal(layer.stream(part, state)[0], output)
            # and the new state holds no view of the tokens
            kept = {key: value.clone() for key, value in results_of(output, after_part).items()}
            part.zero_()
            assert_same(results_of(output, after_part), kept, tolerance=0.0)


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("seen", [0, 1, 5, 6])
def test_index_select_reorders_and_repeats_sequences(name, seen) -> None:
    layer = make_titans(name)
    x, more = tokens(3, seen), tokens(3, 8, seed=4)
    _, state = layer.stream(x, layer.init_state(3))
    expected, _ = layer.stream(more, state)
    for order in ([2, 0, 0, 1], torch.tensor([2, 0, 0, 1])):
        selected = state.index_select(order)
        assert selected.batch_size == 4
        got, _ = layer.stream(more[order], selected)
        torch.testing.assert_close(got, expected[order], rtol=0, atol=1e-12)
    with pytest.raises(IndexError, match="indices: got values from 0 to 3"):
        state.index_select([0, 3])


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("seen", [0, 1, 5, 6])
def test_a_saved_state_goes_on_where_it_was(name, seen) -> None:
    layer = make_titans(name)
    more = tokens(2, 8, seed=4)
    with torch.no_grad():
        _, state = layer.stream(tokens(2, seen), layer.init_state(2))
        file = io.BytesIO()
        torch.save(state.state_dict(), file)
        file.seek(0)
        loaded = TitansState.from_state_dict(torch.load(file, weights_only=True))
        assert positions_of(loaded) == positions_of(state)
        assert_same(results_of(*layer.stream(more, loaded)), results_of(*layer.stream(more, state)), tolerance=0.0)
    with pytest.raises(ValueError, match=r"state_dict: got names .*'tokens'.*want .*'position'"):
        TitansState.from_state_dict({"tokens": 3})


@pytest.mark.parametrize("name", CARRIED)
def test_a_state_moves_to_another_dtype_with_its_layer(name) -> None:
    layer = make_titans(name)
    x, more = tokens(2, 5), tokens(2, 9, seed=4)
    _, state = layer.stream(x, layer.init_state(2))
    expected, _ = layer.stream(more, state)
    got, _ = layer.float().stream(more.float(), state.to(torch.float32))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    low = state.to(torch.bfloat16)
    assert {low.tail.dtype, low.memory.pending_v.dtype} == {torch.bfloat16}
    assert low.memory.pending_lr.dtype == low.memory.weights[0].dtype == torch.float32
    if low.pending is not None:
        assert (low.pending.k.dtype, low.pending.lr.dtype) == (torch.bfloat16, torch.float32)


def test_the_initial_state_holds_the_parameters_themselves() -> None:
    layer = make_titans()
    state = layer.init_state(3)
    for held, weights in ((state.memory, layer.weights), (state.projections, layer.projections.weights)):
        assert all(a is b for a, b in zip(held.stored_weights, weights, strict=True))
    with pytest.raises(AttributeError):
        state.position = 4


@pytest.mark.parametrize("name", CARRIED)
def test_a_state_holds_on_to_no_more_than_its_own_tokens_however_long_the_stream(name) -> None:
    layer = make_titans(name)
    x = tokens(2, 31)
    sizes = []
    with torch.no_grad():
        for lengths in ([7], [1] * 7, [13], [31], [12, 19]):  # one token pending in each kind of chunk
            _, state = run_stream(layer, x[:, : sum(lengths)], lengths)
            sizes.append([t.untyped_storage().nbytes() for t in all_tensors(state.state_dict())])
    assert sizes.count(sizes[0]) == len(sizes)
