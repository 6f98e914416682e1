"""Norms and the gate projection that layers share."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hope_kernels.layers.primitives import (
    CausalConvolution,
    GateProjection,
    HeadReadout,
    clip_norm,
    clip_spectral_norm,
    inverse_sigmoid,
    inverse_softplus,
    l2_norm,
    rms_norm,
)


@pytest.mark.parametrize(("norm", "size"), [(l2_norm, 1.0), (rms_norm, 7**0.5)])
def test_norms_give_the_stated_length_and_survive_zeros(norm, size) -> None:
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(norm(x).norm(dim=-1), torch.full((5,), size, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm(x), norm(1000 * x), rtol=1e-5, atol=0)
    zero = torch.zeros(2, 7, requires_grad=True)
    norm(zero).sum().backward()
    assert torch.equal(norm(zero), torch.zeros(2, 7))
    assert zero.grad.isfinite().all()
    assert torch.autograd.gradcheck(norm, x.clone().requires_grad_())


@pytest.mark.parametrize("norm", [l2_norm, rms_norm])
def test_norms_compute_in_float32_for_low_precision(norm) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert norm(x).dtype == torch.float32
    assert torch.equal(norm(x), norm(x.float()))


def test_gates_are_computed_in_float32_whatever_surrounds_them() -> None:
    torch.manual_seed(0)
    gates = GateProjection(16, 3, (0.5, -2.0))
    torch.nn.init.normal_(gates.weight)
    x = torch.randn(2, 4, 16)
    expected = F.linear(x, gates.weight, gates.bias).view(2, 4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, gates.weight).dtype == torch.bfloat16
        assert torch.equal(gates(x), expected)
    gates, x = gates.bfloat16(), x.bfloat16()
    expected = F.linear(x.float(), gates.weight.float(), gates.bias.float()).view(2, 4, 2, 3)
    assert torch.equal(gates(x), expected)


def test_rows_beyond_the_bound_are_shortened_and_zeros_survive() -> None:
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    torch.testing.assert_close(clip_norm(x, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(clip_norm(x, 1.0).sum(), x)
    torch.testing.assert_close(gradient[1:], torch.ones(2, 2))
    torch.testing.assert_close((gradient[0] * x[0]).sum(), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_matrices_beyond_the_bound_are_scaled_to_it_and_no_others() -> None:
    w = torch.randn(2, 3, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w[0] *= 1e-3
    norm = torch.linalg.matrix_norm(w, ord=2)
    bounded = clip_spectral_norm(w, 1.0)
    assert torch.equal(bounded[0], w[0])
    reached = torch.linalg.matrix_norm(bounded[1], ord=2)
    assert (reached <= 1).all() and (reached >= 5 ** (-1 / 16)).all()
    torch.testing.assert_close(bounded[1], w[1] * (reached / norm[1])[..., None, None], rtol=1e-12, atol=0)
    one = torch.outer(torch.arange(1.0, 9.0), torch.arange(4.0)).double()  # one singular value: its norm is exact
    torch.testing.assert_close(torch.linalg.matrix_norm(clip_spectral_norm(1e12 * one, 3.0), ord=2).item(), 3.0)
    assert torch.autograd.gradcheck(lambda x: clip_spectral_norm(x, 1.0), w[1].clone().requires_grad_())


def test_the_spectral_bound_survives_zeros_and_computes_in_float32() -> None:
    zero = torch.zeros(2, 6, 3, requires_grad=True)
    clip_spectral_norm(zero, 2.0).sum().backward()
    assert torch.equal(zero.grad, torch.ones(2, 6, 3))
    w = 3 * torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    expected = clip_spectral_norm(w, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip_spectral_norm(w, 2.0), expected)
    low = w.bfloat16()
    scale = clip_spectral_norm(low.float(), 2.0)[:, :1, :1] / low[:, :1, :1].float()
    assert torch.equal(clip_spectral_norm(low, 2.0), low * scale.bfloat16())


def test_the_convolution_is_that_of_pytorch_and_carries_its_tail() -> None:
    torch.manual_seed(0)
    conv = CausalConvolution(5, output_rms=2.0)
    x = torch.randn(2, 9, 5)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.conv1d(padded, conv.weight.flip(0).T.unsqueeze(1), groups=5).transpose(1, 2)
    tail, parts = conv.initial_tail(2), []
    for part in x.split([2, 0, 1, 6], 1):
        y, tail = conv(part, tail)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert torch.equal(tail, x[:, -3:])
    wide = CausalConvolution(5000, output_rms=2.0)
    y, _ = wide(torch.randn(1, 9, 5000), wide.initial_tail(1))
    assert 1.9 < y[:, 3:].square().mean().sqrt() < 2.1
    low, _ = conv.bfloat16()(x.bfloat16(), tail.bfloat16())
    exact, _ = conv.float()(x.bfloat16().float(), tail.bfloat16().float())
    assert torch.equal(low, exact.bfloat16())  # one rounding, at the end


def test_a_readout_is_one_inner_product_per_head_in_float32() -> None:
    torch.manual_seed(0)
    readout = HeadReadout(2, 3, start=-1.5)
    x = torch.randn(4, 2, 3)
    assert torch.equal(readout(x), torch.full((4, 2), -1.5))
    torch.nn.init.normal_(readout.weight)
    expected = torch.stack([x[:, n] @ readout.weight[n] + readout.bias[n] for n in range(2)], -1)
    torch.testing.assert_close(readout(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(readout(x), readout(x.float()))
        assert readout(x.bfloat16()).dtype == torch.float32


def test_gates_start_at_their_starting_values() -> None:
    gates = GateProjection(16, 3, (0.5, -2.0))
    x = torch.randn(2, 4, 16)
    assert torch.equal(gates(x)[..., 0, :], torch.full((2, 4, 3), 0.5))
    assert torch.equal(gates(x)[..., 1, :], torch.full((2, 4, 3), -2.0))


@pytest.mark.parametrize("value", [1e-3, 0.02, 0.5, 0.9])
def test_inverses(value) -> None:
    exact = torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(torch.sigmoid(torch.tensor(inverse_sigmoid(value), dtype=torch.float64)), exact)
    torch.testing.assert_close(F.softplus(torch.tensor(inverse_softplus(value), dtype=torch.float64)), exact)
