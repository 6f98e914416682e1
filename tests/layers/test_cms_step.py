"""Serving: one token at a time from a buffer that is updated in place gives what a stream gives."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import CMS, CMSLevel
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
)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_the_stream_and_the_whole_call_at_every_token(variant, momentum, backend) -> None:
    cms = make_cms(variant, momentum=momentum, backend=backend)
    x = tokens(3, 15)
    whole = cms(x)
    buffer = cms.make_buffer(3)
    state = cms.init_state(3)
    for t in range(15):
        output = cms.step(x[:, t], buffer)
        streamed, state = cms.stream(x[:, t : t + 1], state)
        torch.testing.assert_close(output, whole[:, t], rtol=1e-10, atol=1e-11)
        now = buffer.to_state()
        assert positions_of(now) == positions_of(state)
        assert_same(results_of(output, now), results_of(streamed[:, 0], state))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seen", [0, 1, 5, 6, 9])
def test_steps_go_on_from_any_state_and_a_stream_from_any_buffer(variant, seen) -> None:
    cms = make_cms(variant, momentum=True)
    x = tokens(2, 24)
    whole = cms(x)
    _, state = cms.stream(x[:, :seen], cms.init_state(2))
    buffer = cms.make_buffer(state)
    stepped = torch.stack([cms.step(x[:, t], buffer) for t in range(seen, seen + 7)], 1)
    torch.testing.assert_close(stepped, whole[:, seen : seen + 7], rtol=1e-10, atol=1e-11)
    rest, _ = cms.stream(x[:, seen + 7 :], buffer.to_state())
    torch.testing.assert_close(rest, whole[:, seen + 7 :], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_change_neither_the_state_the_parameters_nor_a_state_taken_earlier(variant) -> None:
    cms = make_cms(variant, momentum=True)
    x = tokens(2, 20)
    with torch.no_grad():
        _, state = cms.stream(x[:, :5], cms.init_state(2))
        before = {k: v.clone() for k, v in results_of(x, state).items()}
        parameters = {k: v.clone() for k, v in cms.state_dict().items()}
        buffer = cms.make_buffer(state)
        for t in range(5, 10):
            cms.step(x[:, t], buffer)
        middle = buffer.to_state()
        copy = {k: v.clone() for k, v in results_of(x, middle).items()}
        for t in range(10, 20):
            cms.step(x[:, t], buffer)
        assert_same(results_of(x, state), before, tolerance=0.0)
        assert_same(results_of(x, middle), copy, tolerance=0.0)
        assert_same(dict(cms.state_dict()), parameters, tolerance=0.0)
        # the buffer did move on
        late, early = buffer.to_state().levels[2].weights[0], middle.levels[2].weights[0]
        assert (late - early).abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_update_storage_in_place(variant) -> None:
    cms = make_cms(variant, momentum=True)
    buffer = cms.make_buffer(2)

    def pointers() -> list[int]:
        found = []
        for level in buffer.levels[:3]:
            held = [*level.weights, *(level.momentum or ()), level.k, level.v, level.lr]
            found += [t.data_ptr() for t in held]
        return found

    before = pointers()
    x = tokens(2, 13)
    for t in range(13):
        cms.step(x[:, t], buffer)
    assert pointers() == before
    assert buffer.position == 13


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences_that_take_the_place_of_others_go_on_from_their_own_token(variant, momentum, backend) -> None:
    """Some begin anew, some behind a prompt; outputs and states are those of each sequence alone."""
    cms = make_cms(variant, momentum=momentum, backend=backend)
    x = tokens(4, 15)
    with torch.no_grad():
        _, prompt = cms.stream(x[:2, :5], cms.init_state(2))
        buffer = cms.make_buffer(4)
        alone = {row: cms.init_state(1) for row in range(4)}
        storage = [w.data_ptr() for level in buffer.levels[:3] for w in (*level.weights, level.k, level.v)]
        for t in range(15):
            if t == 3:
                cms.replace_sequences(buffer, torch.tensor([1]))
                alone[1] = cms.init_state(1)
            if t == 4:
                cms.replace_sequences(buffer, [3, 0], prompt)
                alone[3], alone[0] = prompt.index_select([0]), prompt.index_select([1])
            output = cms.step(x[:, t], buffer)
            for row in range(4):
                streamed, alone[row] = cms.stream(x[row : row + 1, t : t + 1], alone[row])
                now = buffer.to_state([row])
                assert positions_of(now) == positions_of(alone[row])
                assert_same(results_of(output[row : row + 1], now), results_of(streamed[:, 0], alone[row]))
    assert buffer.position.tolist() == [16, 12, 15, 16]
    assert positions_of(buffer.to_state([3, 0]))[:2] == [16, 2]
    assert storage == [w.data_ptr() for level in buffer.levels[:3] for w in (*level.weights, level.k, level.v)]
    with pytest.raises(
        ValueError, match=r"rows: its sequences stand at tokens \[16, 12, 15, 16\]; want some that stand"
    ):
        buffer.to_state()
    cms.replace_sequences(buffer, range(4), cms.init_state(4))
    assert buffer.position == 0 and buffer.to_state().batch_size == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences_in_bfloat16_start_again_each_at_its_own_token(variant) -> None:
    """Parameters of 16 bits go into a buffer of 32."""
    levels = [CMSLevel(2), CMSLevel(4, momentum=True), CMSLevel(None)]
    cms = spread(CMS(DIM, levels, heads=HEADS, variant=variant, dtype=torch.bfloat16))
    x = tokens(2, 13, dtype=torch.bfloat16)
    together, alone = cms.make_buffer(2), [cms.make_buffer(1), cms.make_buffer(1)]
    for t in range(13):
        if t == 3:
            cms.replace_sequences(together, [1])
            alone[1] = cms.make_buffer(1)
        output = cms.step(x[:, t], together)
        for row in range(2):
            expected = cms.step(x[row : row + 1, t], alone[row])
            torch.testing.assert_close(output[row : row + 1], expected, rtol=0.02, atol=0.02)
    for row in range(2):
        found, expected = together.to_state([row]), alone[row].to_state()
        assert positions_of(found) == positions_of(expected)
        for name, value in results_of(output, found).items():
            wanted = results_of(output, expected)[name]
            torch.testing.assert_close(value, wanted, rtol=0.02, atol=0.02, msg=name)


def test_a_position_that_was_read_does_not_move() -> None:
    cms = make_cms("sequential")
    buffer = cms.make_buffer(2)
    cms.step(tokens(2, 1)[:, 0], buffer)
    cms.replace_sequences(buffer, [0])
    position = buffer.position
    cms.step(tokens(2, 1)[:, 0], buffer)
    assert position.tolist() == [0, 1] and buffer.position.tolist() == [1, 2]
    position += 5
    assert buffer.position.tolist() == [1, 2]
    assert buffer.to_state([]).batch_size == 0


def test_sequences_that_do_not_fit_take_nobodys_place() -> None:
    cms = make_cms("nested")
    buffer = cms.make_buffer(3)
    for t in range(5):
        cms.step(tokens(3, 5)[:, t], buffer)
    before = {k: v.clone() for k, v in results_of(torch.zeros(()), buffer.to_state()).items()}
    with pytest.raises(IndexError, match=r"rows: got \[0, 3\]; want numbers from 0 to 2"):
        cms.replace_sequences(buffer, [0, 3])
    with pytest.raises(IndexError, match=r"rows: got \[-1\]; want numbers from 0 to 2"):
        cms.replace_sequences(buffer, [-1])
    with pytest.raises(ValueError, match=r"rows: got \[1, 1\]; want each sequence once"):
        cms.replace_sequences(buffer, [1, 1])
    with pytest.raises(ValueError, match=r"rows: got torch\.float32 of shape \(1,\); want whole numbers"):
        cms.replace_sequences(buffer, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="state has batch size 1, rows are 2; want the same"):
        cms.replace_sequences(buffer, [0, 1], cms.init_state(1))
    with pytest.raises(TypeError, match="state is a CMSBuffer; want a CMSState"):
        cms.replace_sequences(buffer, [0, 1], cms.make_buffer(2))
    for rows in (None, "01", 3):
        with pytest.raises(TypeError, match=r"rows: got .*; want whole numbers"):
            cms.replace_sequences(buffer, rows)
    away = cms.init_state(1).to("meta")
    for call in (lambda: cms.replace_sequences(buffer, [0], away), lambda: cms.make_buffer(away)):
        with pytest.raises(ValueError, match="state of level 0 is on meta; want cpu, with the parameters"):
            call()
    with pytest.raises(ValueError, match="state has 1 levels; want 4"):
        cms.replace_sequences(buffer, [0], CMS(DIM, [CMSLevel(2)], heads=HEADS, dtype=torch.float64).init_state(1))
    cms.replace_sequences(buffer, [])
    assert buffer.position == 5
    assert_same(results_of(torch.zeros(()), buffer.to_state()), before, tolerance=0.0)


def test_step_takes_both_shapes_and_builds_no_graph() -> None:
    cms = make_cms("sequential")
    x = tokens(2, 1).requires_grad_()
    flat = cms.step(x[:, 0], cms.make_buffer(2))
    kept = cms.step(x, cms.make_buffer(2))
    assert flat.shape == (2, DIM)
    assert kept.shape == (2, 1, DIM)
    assert torch.equal(flat, kept[:, 0])
    assert not flat.requires_grad


def test_step_without_sequences() -> None:
    cms = make_cms("nested")
    buffer = cms.make_buffer(0)
    for _ in range(7):
        assert cms.step(tokens(0, 1)[:, 0], buffer).shape == (0, DIM)
    assert positions_of(buffer.to_state()) == positions_of(run_stream(cms, tokens(0, 7), [7])[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_steps_equal_the_stream_in_bfloat16(autocast) -> None:
    torch.manual_seed(0)
    cms = spread(CMS(DIM, [CMSLevel(2, momentum=True), CMSLevel(4), CMSLevel(None)], heads=HEADS, variant="nested"))
    x = tokens(2, 11, dtype=torch.float32)
    if not autocast:
        cms, x = cms.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole, state = cms.stream(x, cms.init_state(2))
        buffer = cms.make_buffer(2)
        stepped = torch.stack([cms.step(x[:, t], buffer) for t in range(11)], 1)
    assert stepped.dtype == whole.dtype == torch.bfloat16
    # A one-row product may sum in another order than a longer one: one unit of bfloat16 per operation, few of them.
    torch.testing.assert_close(stepped.float(), whole.float(), rtol=0.05, atol=0.05)
    kept, expected = buffer.to_state().levels[0], state.levels[0]
    assert kept.pending_k.dtype == expected.pending_k.dtype == torch.bfloat16
    assert kept.weights[0].dtype == torch.float32


def test_a_buffer_is_refused_by_another_layer_batch_or_dtype_and_stays_as_it_was() -> None:
    cms = make_cms("nested")
    x = tokens(2, 3)
    buffer = cms.make_buffer(2)
    cms.step(x[:, 0], buffer)
    before = {k: v.clone() for k, v in results_of(x, buffer.to_state()).items()}
    with pytest.raises(ValueError, match=r"buffer has batch size 2, x has 3 rows"):
        cms.step(tokens(3, 1), buffer)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 6\); want \[B, 6\] or \[B, 1, 6\]"):
        cms.step(x, buffer)
    with pytest.raises(TypeError, match="buffer is a CMSState; want a CMSBuffer"):
        cms.step(x[:, 0], buffer.to_state())
    with pytest.raises(TypeError, match=r"x is torch\.float32, the parameters are torch\.float64"):
        cms.step(x[:, 0].float(), buffer)
    with pytest.raises(ValueError, match="buffer has 4 levels; want 1"):
        CMS(DIM, [CMSLevel(2)], heads=HEADS, dtype=torch.float64).step(x[:, 0], buffer)
    buffer_of_six = make_cms("nested").make_buffer(2)
    for t in range(3):
        cms.step(x[:, t], buffer_of_six)
    with pytest.raises(
        ValueError, match=r"level 0 starts again every 2 tokens; want never, as in variant 'sequential'"
    ):
        make_cms("sequential").step(x[:, 0], buffer_of_six)
    assert_same(results_of(x, buffer.to_state()), before, tolerance=0.0)
    low = make_cms("nested").float()
    with torch.autocast("cpu", torch.bfloat16):
        made_under_autocast = low.make_buffer(2)
    with pytest.raises(ValueError, match=r"buffer keeps torch\.bfloat16 tokens, this call has torch\.float32"):
        low.step(x[:, 0].float(), made_under_autocast)
    with pytest.raises(TypeError, match=r"state: weights are torch\.float64; want torch\.float32"):
        low.make_buffer(make_cms("nested").init_state(2))
