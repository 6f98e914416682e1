"""Finite differences: first derivatives everywhere, second ones of the reference, a clear refusal elsewhere."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import MemorySpec
from tests.cases import COMPILED_BACKENDS, FLOAT64_BACKENDS, Problem, device_of, make_problem, package_results

CASES = [
    pytest.param(
        MemorySpec(form, activation, residual, objective, rule), gates, id="-".join([form, objective, rule, *gates])
    )
    for form, activation, residual, objective, rule, gates in [
        ("linear", "silu", False, "l2", "gd", {"retention": True}),
        ("linear", "silu", True, "self", "dgd", {"retention": True}),
        ("mlp", "gelu_tanh", True, "l2", "gd", {"retention": True, "momentum": True, "initial_momentum": True}),
        ("mlp", "gelu", True, "self", "gd", {}),
        ("mlp", "silu", True, "l2", "dgd", {"retention": True}),
        ("mlp", "gelu_tanh", True, "self", "dgd", {"retention": True}),
        ("glu", "silu", False, "dot", "gd", {"momentum": True}),
        ("glu", "gelu_tanh", True, "l2", "dgd", {}),
    ]
]


def _function_and_inputs(problem: Problem, backend: str):
    names = list(problem.tensors)

    def function(*tensors):
        found = package_results(problem.with_tensors(**dict(zip(names, tensors, strict=True))), backend=backend)
        return tuple(value for value in found.values() if value.requires_grad)

    return function, [t.clone().requires_grad_() for t in problem.tensors.values()]


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize(("spec", "gates"), CASES)
def test_gradients_agree_with_finite_differences(spec, gates, backend):
    problem = make_problem(spec, chunk_size=2, batch=2, tokens=5, heads=1, dim=2, hidden=3, **gates)
    function, inputs = _function_and_inputs(problem, backend)
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("spec", "gates"), CASES)
def test_second_derivatives_of_the_reference_agree_with_finite_differences(spec, gates):
    problem = make_problem(spec, chunk_size=2, batch=1, tokens=4, heads=1, dim=2, hidden=2, **gates)
    function, inputs = _function_and_inputs(problem, "reference")
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("tokens", [3, 9])  # a read, and reads with writes
def test_a_compiled_backend_refuses_second_derivatives_and_names_the_way_out(backend, tokens):
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=tokens).cast(torch.float32).to(device_of(backend))
    function, inputs = _function_and_inputs(problem, backend)
    first = torch.autograd.grad(function(*inputs)[0].square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"backend='reference'"):
        first.square().sum().backward()
