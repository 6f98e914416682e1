"""Initial weights in every form a caller may hold them: shared, per sequence, transposed, in low precision."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import MemorySpec, MemoryState, memory_scan
from tests.cases import (
    BACKENDS,
    COMPILED_BACKENDS,
    FLOAT64_BACKENDS,
    assert_equal_to_rounding,
    assert_within_budget,
    cotangent,
    device_of,
    evaluate,
    evaluate_oracle,
    evaluate_package,
    make_problem,
    package_results,
    scan_stream,
)

SPECS = [MemorySpec("linear"), MemorySpec("mlp"), MemorySpec("glu", "silu", rule="dgd")]


def spec_id(spec: MemorySpec) -> str:
    return spec.key.replace("/", "-")


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("tokens", [2, 11])  # before and after the first write
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_shared_weights_equal_the_same_weights_given_per_sequence_and_their_gradient_is_the_sum(spec, tokens, backend):
    shared = make_problem(spec, chunk_size=4, batch=3, tokens=tokens)
    own = shared.with_tensors(**{f"weight{i}": w.expand(3, *w.shape).clone() for i, w in enumerate(shared.weights)})
    found, expected = evaluate_package(shared, backend), evaluate_package(own, backend)
    summed = {n: g.sum(0) if n.startswith("weight") else g for n, g in expected.gradients.items()}
    assert_equal_to_rounding(found, expected._replace(gradients=summed), 1e-13)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_transposed_weights_are_read_in_place_and_their_gradient_arrives_transposed(spec, backend, dtype, shared):
    """`linear.weight.T` is the normal way to hand over the weight of an `nn.Linear`."""
    problem = make_problem(spec, chunk_size=4, retention=True, shared=shared).cast(dtype)
    stored = problem.map(lambda name, t: t.mT.contiguous() if name.startswith("weight") else t)

    def results(p):
        return package_results(p.map(lambda name, t: t.mT if name.startswith("weight") else t), backend=backend)

    found, expected = evaluate(stored, results), evaluate_package(problem, backend)
    gradients = {n: g.mT if n.startswith("weight") else g for n, g in found.gradients.items()}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_equal_to_rounding(found._replace(gradients=gradients), expected, tolerance)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_weights_and_momentum_that_are_slices_of_larger_tensors_with_gaps_between_rows(backend):
    problem = make_problem(MemorySpec(), chunk_size=4, momentum=True, initial_momentum=True, shared=False)

    def spread(t):  # every second element of every axis
        wide = torch.full([2 * n for n in t.shape], float("nan"), dtype=t.dtype)
        wide[tuple(slice(None, None, 2) for _ in t.shape)] = t
        return wide

    names = [n for n in problem.tensors if n.startswith(("weight", "initial"))]
    stored = problem.map(lambda name, t: spread(t) if name in names else t)

    def results(p):
        thin = p.map(lambda name, t: t[tuple(slice(None, None, 2) for _ in t.shape)] if name in names else t)
        return package_results(thin, backend=backend)

    found, expected = evaluate(stored, results), evaluate_package(problem, backend)
    gradients = {
        n: g[tuple(slice(None, None, 2) for _ in g.shape)] if n in names else g for n, g in found.gradients.items()
    }
    assert_equal_to_rounding(found._replace(gradients=gradients), expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 14])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_weights_in_the_dtype_of_the_tokens_equal_the_same_numbers_in_float32(spec, tokens, backend, dtype):
    low = make_problem(spec, chunk_size=4, tokens=tokens, max_lr=0.1).cast(dtype, weight_dtype=dtype)
    full = low.map(lambda name, t: t.float() if name.startswith("weight") else t)
    found, expected = evaluate_package(low, backend), evaluate_package(full, backend)
    for name, want in expected.values.items():
        assert torch.equal(found.values[name], want), name  # the state is float32 either way
    for name, want in expected.gradients.items():
        got = found.gradients[name]
        if name.startswith("weight"):
            assert got.dtype == dtype
            # The float32 gradient, rounded to the weight's dtype in two terms: through the scan and the state.
            assert ((got.float() - want).abs() <= torch.finfo(dtype).eps * want.abs().max()).all(), name
        else:
            assert torch.equal(got, want), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_low_precision_weights_stay_within_the_budget(spec, backend, dtype):
    problem = make_problem(spec, chunk_size=4, tokens=14, dim=16, hidden=24, max_lr=0.1).cast(dtype, weight_dtype=dtype)
    eager, truth = evaluate_package(problem, "reference"), evaluate_oracle(problem)
    assert_within_budget(evaluate_package(problem, backend), eager, truth, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_call_that_completes_no_chunk_copies_no_weights(spec, backend):
    problem = make_problem(spec, chunk_size=8, tokens=20).cast(torch.float32).to(device_of(backend))
    _, first = scan_stream(problem.span(0, 5), [5], backend=backend)
    for held, given in zip(first.weights, problem.weights, strict=True):
        assert held.shape == (2, *given.shape) and held.data_ptr() == given.data_ptr() and held.stride(0) == 0

    def advance(state, start, stop):
        part = problem.span(start, stop)
        tokens = (part["q"], part["k"], part["v"], part["lr"])
        return memory_scan(*tokens, state, spec=spec, chunk_size=8, backend=backend).state

    written = advance(first, 5, 9)
    assert all(w.data_ptr() != g.data_ptr() for w, g in zip(written.weights, problem.weights, strict=True))
    read = advance(written, 9, 14)
    assert [w.data_ptr() for w in read.weights] == [w.data_ptr() for w in written.weights]


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_the_gradient_through_the_expanded_view_before_the_first_write_is_exact(backend):
    problem = make_problem(MemorySpec(), chunk_size=8, batch=3, tokens=5)
    weights = tuple(w.clone().requires_grad_() for w in problem.weights)
    problem = problem.with_tensors(**{f"weight{i}": w for i, w in enumerate(weights)})
    _, state = scan_stream(problem, [5], backend=backend)
    # Small integers: their sum over the batch has no rounding, so equality is exact.
    cotangents = [torch.randint(-8, 8, w.shape).to(w.dtype) for w in state.weights]
    gradients = torch.autograd.grad(state.weights, weights, cotangents)
    for got, c in zip(gradients, cotangents, strict=True):
        assert torch.equal(got, c.sum(0))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize(
    "wanted", ["q", "k", "v", "lr", "retention", "momentum", "weight0", "weight1", "initial_momentum0"]
)
def test_the_gradient_of_one_input_does_not_depend_on_which_others_want_theirs(wanted, backend):
    problem = make_problem(MemorySpec(), chunk_size=4, retention=True, momentum=True, initial_momentum=True)
    expected = evaluate_package(problem, backend).gradients[wanted]
    leaf = problem[wanted].clone().requires_grad_()
    results = package_results(problem.with_tensors(**{wanted: leaf}), backend=backend)
    loss = sum((value * cotangent(name, value)).sum() for name, value in results.items())
    (got,) = torch.autograd.grad(loss, leaf)
    assert ((got - expected).abs() <= 1e-13 * expected.abs().max().clamp(min=1)).all()


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_without_gradients_the_values_are_the_same_and_nothing_is_kept(backend):
    problem = make_problem(MemorySpec(), chunk_size=4, retention=True)
    expected = evaluate_package(problem, backend).values
    leaves = problem.map(lambda _, t: t.clone().requires_grad_())
    with torch.no_grad():
        found = package_results(leaves, backend=backend)
    for name, want in expected.items():
        assert torch.equal(found[name], want), name
        assert not found[name].requires_grad


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_initial_momentum_may_be_shared_like_the_weights(backend):
    problem = make_problem(MemorySpec(), chunk_size=3, momentum=True, initial_momentum=True)
    shared = problem.map(lambda name, t: t[0] if name.startswith("initial_momentum") else t)
    expanded = shared.map(lambda name, t: t.expand(2, *t.shape).clone() if name.startswith("initial") else t)

    def results(p):
        state = MemoryState.initial(p.weights, p.initial_momentum, spec=p.spec, chunk_size=3, batch_size=2)
        out = memory_scan(
            p["q"], p["k"], p["v"], p["lr"], state, spec=p.spec, chunk_size=3, momentum=p["momentum"], backend=backend
        )
        finals = {f"weight{i}": w for i, w in enumerate(out.state.weights)}
        return {"output": out.output, **finals, **{f"momentum{i}": m for i, m in enumerate(out.state.momentum)}}

    found, expected = evaluate(shared, results), evaluate(expanded, results)
    summed = {n: g.sum(0) if n.startswith("initial") else g for n, g in expected.gradients.items()}
    assert_equal_to_rounding(found, expected._replace(gradients=summed), 1e-13)
