"""Norms and the gate projection that layers share."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hope_kernels.layers.primitives import (
    GateProjection,
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
