"""Causal attention against its formula, token by token, and under any split."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hope_kernels.layers import CausalAttention
from hope_kernels.layers.attention import AttentionState
from tests.layers.common import tokens

DIM, HEADS = 8, 2


def make(window: int | None, dtype: torch.dtype = torch.float64) -> CausalAttention:
    torch.manual_seed(0)
    return CausalAttention(DIM, HEADS, window=window, rope_base=100.0, dtype=dtype)


def rotated(x: Tensor, position: int) -> Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned by position * base^(-2 i / D)."""
    half = x.shape[-1] // 2
    turn = torch.tensor(
        [math.remainder(position * 100.0 ** (-i / half), 2 * math.pi) for i in range(half)], dtype=torch.float64
    )
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([pairs.real, pairs.imag], -1)


def oracle(layer: CausalAttention, x: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (x @ layer.qkv.weight.T).chunk(3, -1))
    outputs = []
    for t in range(x.shape[1]):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        scores = torch.stack(
            [(rotated(q[:, t], t) * rotated(k[:, s], s)).sum(-1) / math.sqrt(DIM // HEADS) for s in range(first, t + 1)]
        )
        outputs.append((scores.softmax(0)[..., None] * v[:, first : t + 1].transpose(0, 1)).sum(0).flatten(-2))
    return torch.stack(outputs, 1) @ layer.out.weight.T


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_output_and_gradients_follow_the_formula_under_any_split(window) -> None:
    layer, x = make(window), tokens(2, 11, DIM).requires_grad_()
    cotangent = tokens(2, 11, DIM, seed=5)
    wanted = [x, *layer.parameters()]
    expected = oracle(layer, x)
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), wanted)
    for lengths in ([11], [4, 7], [2, 0, 9], [1] * 11):
        state, outputs = layer.init_state(2), []
        for part in x.split(lengths, 1):
            y, state = layer.stream(part, state)
            outputs.append(y)
        found = torch.cat(outputs, 1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad((found * cotangent).sum(), wanted), expected_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert state.position == 11 and state.k.shape[2] == (11 if window is None else min(window - 1, 11))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_far_positions_keep_their_angle() -> None:
    """In float32 the angle of token ten million would be off by up to half a radian."""
    layer = make(None, torch.float32)
    for found, exact in zip(layer._rotation(10_000_000, 2, torch.device("cpu")), (math.cos, math.sin), strict=True):
        for row, position in enumerate((10_000_000, 10_000_001)):
            expected = [exact(math.fmod(position * 100.0 ** (-i / 2), 2 * math.pi)) for i in range(2)]
            assert found[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_states_are_selected_and_stored() -> None:
    layer, x = make(4), tokens(3, 9, DIM)
    _, state = layer.stream(x[:, :5], layer.init_state(3))
    whole, _ = layer.stream(x[:, 5:], state)
    torch.testing.assert_close(layer.stream(x[[2, 2], 5:], state.index_select([2, 2]))[0], whole[[2, 2]])
    again = AttentionState.from_state_dict(state.state_dict())
    assert torch.equal(layer.stream(x[:, 5:], again)[0], whole)
    assert not state.detach().k.requires_grad and state.to(torch.float32).v.dtype == torch.float32
    with pytest.raises(ValueError, match="state_dict: got names"):
        AttentionState.from_state_dict({"k": state.k})


def test_arguments_that_do_not_fit_are_named() -> None:
    for options, error, match in (
        ({"dim": 6, "heads": 2}, ValueError, "dim is 6 and heads is 2; want heads of an even width"),
        ({"dim": 8, "heads": 3}, ValueError, "dim is 8 and heads is 3"),
        ({"dim": 8, "heads": 2.0}, TypeError, "heads is 2.0; want a positive int"),
        ({"dim": 8, "heads": 2, "window": 0}, ValueError, "window is 0; want at least 1"),
        ({"dim": 8, "heads": 2, "rope_base": math.nan}, ValueError, "rope_base is nan; want a finite number above 0"),
    ):
        with pytest.raises(error, match=match):
            CausalAttention(**options)
    layer = make(None)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 7\); want \[B, T, 8\]"):
        layer.stream(torch.zeros(2, 3, 7, dtype=torch.float64), layer.init_state(2))
    with pytest.raises(TypeError, match=r"x is torch\.float32, the parameters are torch\.float64"):
        layer(torch.zeros(2, 3, DIM))
    x = torch.zeros(2, 3, DIM, dtype=torch.float64)
    with pytest.raises(TypeError, match="state is a NoneType; want an AttentionState"):
        layer.stream(x, None)
    _, seen = layer.stream(x, layer.init_state(2))
    for other, state in ((layer, layer.init_state(3)), (make(2), seen), (CausalAttention(DIM, 4).double(), seen)):
        with pytest.raises(ValueError, match=r"state has keys .*; want"):
            other.stream(x, state)
    for size, error in ((-1, ValueError), (True, TypeError)):
        with pytest.raises(error, match="batch_size is"):
            layer.init_state(size)
    assert seen.index_select([]).batch_size == 0
    with pytest.raises(IndexError):
        seen.index_select([2])
