"""Rows and heads are strangers to each other: alone, together or permuted they give the same results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hope_kernels import MemorySpec
from tests.cases import (
    COMPILED_BACKENDS,
    FLOAT64_BACKENDS,
    Problem,
    assert_equal_to_rounding,
    evaluate,
    evaluate_oracle,
    evaluate_package,
    make_problem,
    package_results,
    scan_stream,
)
from tests.strategies import problems

# Sizes around the blocks of a compiled kernel: below one, one and a rest, several.
SIZES = [
    {"dim": 5, "hidden": 3, "chunk_size": 1, "tokens": 9},
    {"dim": 17, "hidden": 33, "chunk_size": 7, "tokens": 37},
    {"dim": 64, "hidden": 100, "chunk_size": 16, "tokens": 83},
]
SPECS = [
    MemorySpec("linear", objective="l2", rule="dgd"),
    MemorySpec("mlp", "gelu_tanh", objective="l2", rule="gd"),
    MemorySpec("mlp", "silu", objective="self", rule="dgd"),
    MemorySpec("glu", "silu", objective="dot", rule="gd"),
]


def spec_id(spec: MemorySpec) -> str:
    return spec.key.replace("/", "-")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"D{s['dim']}-H{s['hidden']}-C{s['chunk_size']}")
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_a_row_alone_equals_the_row_in_a_batch_bit_for_bit(backend, spec, sizes, dtype):
    momentum = spec.rule == "gd"
    problem = make_problem(spec, batch=3, heads=2, retention=True, momentum=momentum, max_lr=0.1, **sizes).cast(dtype)
    # Weights of its own for every row, so that every gradient belongs to a row.
    own = {f"weight{i}": w.expand(3, *w.shape).clone() for i, w in enumerate(problem.weights)}
    problem = problem.with_tensors(**own)
    # The same cotangents for a row wherever it is.
    together = evaluate(
        problem, lambda p: package_results(p, backend=backend), cotangents=_cotangents(problem, backend, 3)
    )
    for b in range(3):
        alone = evaluate(
            problem.row(b), lambda p: package_results(p, backend=backend), cotangents=_cotangents(problem, backend, 1)
        )
        for name, want in alone.named().items():
            assert torch.equal(together.named()[name][b : b + 1], want), f"{name} of row {b}"


def _cotangents(problem: Problem, backend: str, batch: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        shapes = {name: value.shape[1:] for name, value in package_results(problem.row(0), backend=backend).items()}
    one_row = {name: torch.randn(1, *shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: row.expand(batch, *row.shape[1:]) for name, row in one_row.items()}


@pytest.mark.parametrize("backend", [b for b in COMPILED_BACKENDS if "cpu" in b.values])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_the_thread_count_changes_no_bit(backend, spec):
    problem = make_problem(spec, batch=2, heads=3, retention=True, **SIZES[1]).cast(torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(evaluate_package(problem, backend).named())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, want in found[0].items():
            assert torch.equal(other[name], want), name


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("length", [1, 6, 7, 23, 36])
def test_the_length_of_a_call_changes_no_bit_of_the_tokens_before_its_end(backend, spec, length):
    problem = make_problem(spec, batch=2, heads=2, retention=True, **SIZES[1]).cast(torch.float32)
    whole, _ = scan_stream(problem, [problem.tokens], backend=backend)
    prefix, _ = scan_stream(problem.span(0, length), [length], backend=backend)
    assert torch.equal(whole[:, :length], prefix)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(problem=problems(min_batch=2, max_tokens=10), data=st.data())
def test_permuting_heads_permutes_results_and_gradients(backend, problem, data):
    heads = problem["q"].shape[2]
    order = torch.tensor(data.draw(st.permutations(range(heads))))

    def permuted(name, t):  # heads are the third axis of tokens and gates, the last but two of weights and momentum
        return t.index_select(2 if name in ("q", "k", "v", "lr", "retention", "momentum") else t.dim() - 3, order)

    def results_in_permuted_order(p):
        results = package_results(p, backend=backend)
        return {n: r.index_select(1 if n.startswith(("weight", "momentum")) else 2, order) for n, r in results.items()}

    expected = evaluate(problem, results_in_permuted_order)
    found = evaluate(problem.map(permuted), lambda p: package_results(p, backend=backend))
    gradients = {name: permuted(name, g) for name, g in expected.gradients.items()}
    assert_equal_to_rounding(found, expected._replace(gradients=gradients))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@given(problem=problems(min_batch=2, max_tokens=10))
def test_a_row_alone_equals_the_row_in_a_batch_for_any_spec(backend, problem):
    together = package_results(problem, backend=backend)
    for b in range(problem.batch):
        for name, want in evaluate_oracle(problem.row(b)).values.items():
            error = (together[name][b : b + 1] - want).abs().max().item() if want.numel() else 0.0
            bound = 1e-10 * max(1.0, want.abs().max().item()) if want.numel() else 0.0
            assert error <= bound, f"{name} of row {b}: error {error:.2e}, allowed {bound:.2e}"
