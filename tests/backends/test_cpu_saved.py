"""What the CPU engine's forward saves, and the parts of its backward that are skipped or not computed again."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from hope_kernels import MemorySpec
from hope_kernels.backends import cpu
from hope_kernels.backends.interface import ScanProblem
from hope_kernels.memory import reference
from tests.backends.test_cpu import LARGE, SMALL, SPECS, STATUS, operator_problem, problem_for, spec_id
from tests.cases import package_results

pytestmark = pytest.mark.skipif(not STATUS, reason=f"cpu: {STATUS.reason}")


def operator_oracle(problem: ScanProblem) -> tuple[list[Tensor], list[Tensor]]:
    """Results and inputs of the eager path at the operator's level, the inputs requiring gradients."""
    names = [f.name for f in fields(problem) if isinstance(getattr(problem, f.name), Tensor)]
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in names}
    weights = tuple(w.clone().requires_grad_() for w in problem.weights)
    momentum = tuple(m.clone().requires_grad_() for m in problem.momentum)
    output, final, speeds = reference.chunked_scan(replace(problem, weights=weights, momentum=momentum, **leaves))
    return [output, *final, *speeds], [*leaves.values(), *weights, *momentum]


@pytest.mark.parametrize("upstream", ["output", "state", "both"])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_gradients_of_the_output_of_the_state_or_of_both(spec, chunks, upstream):
    """What no gradient reaches is skipped, and up to four chunks the last segment comes from the forward."""
    cases = [
        {"pending": 0, "tail": 0},
        {"pending": 3, "tail": 2, "momentum": False},
        {"pending": 3, "tail": 0, "bptt_chunks": 2},
        {"pending": 0, "tail": 2, "bptt_chunks": 3},
        {"pending": 0, "tail": 0, "bptt_chunks": 1},
    ]
    for case in cases:
        problem = operator_problem(spec, chunks=chunks, **case)
        results, leaves = operator_oracle(problem)
        random = torch.Generator().manual_seed(1)
        grads = [torch.randn(r.shape, generator=random, dtype=r.dtype) for r in results]
        given = [g if upstream in ("both", "output" if i == 0 else "state") else None for i, g in enumerate(grads)]
        # A state that bptt_chunks has detached has no gradient to pass on.
        used = [i for i, g in enumerate(given) if g is not None and results[i].requires_grad]
        want = [torch.zeros_like(x) for x in leaves]
        if used:
            want = torch.autograd.grad(
                [results[i] for i in used],
                leaves,
                [given[i] for i in used],
                allow_unused=True,
                materialize_grads=True,
            )

        output, weights, momentum, saved = cpu.scan_forward(problem, save=True)
        for got, expected in zip([output, *weights, *momentum], results, strict=True):
            assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10), case
        count = len(weights)
        for _ in range(2):  # what was saved is only read
            found = cpu.scan_backward(problem, saved, given[0], given[1 : 1 + count], given[1 + count :])
            tokens = [g for g in found[:11] if g is not None]
            got_all = [*tokens, *(w.sum(0) for w in found.weights), *found.momentum]
            for got, expected in zip(got_all, want, strict=True):
                assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10), (case, got.shape)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_keys_and_values_that_reach_no_gradient_get_none(spec):
    """Gradients of the output alone: what the last chunk wrote was read by nothing."""
    problem = operator_problem(spec, chunks=3, tail=0, pending=0)
    output, weights, _, saved = cpu.scan_forward(problem, save=True)
    none = [None] * len(weights)
    found = cpu.scan_backward(problem, saved, torch.ones_like(output), none, none)
    for gradient in (found.k, found.v):
        assert gradient[:, -4:].eq(0).all() and gradient[:, :-4].ne(0).any()
    last = found.step.unflatten(0, (2, 3))[:, -1]
    assert last.eq(0).all() and found.q[:, -4:].ne(0).all()


@pytest.mark.parametrize("sizes", [SMALL, {**SMALL, "tokens": 12}, LARGE], ids=["4 chunks", "2 chunks", "large"])
@pytest.mark.parametrize("form", ["mlp", "glu"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu2"])
def test_keeping_the_last_segment_changes_no_bit_of_the_forward(activation, form, sizes):
    problem = problem_for(MemorySpec(form, activation), **sizes).cast(torch.float32)
    with torch.no_grad():
        expected = package_results(problem, backend="cpu")
    leaves = problem.map(lambda _, t: t.requires_grad_())
    found = package_results(leaves, backend="cpu")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_what_is_saved_is_a_state_per_segment_and_little_else(spec, momentum):
    for chunks in (*range(1, 70), 300, 1024):
        problem = operator_problem(spec, chunks=chunks, chunk_size=2, pending=0, momentum=momentum)
        shapes = cpu.saved_shapes(problem)
        state = sum(w.numel() for w in (*problem.weights, *problem.momentum)) * problem.sequence_count
        count = len(problem.weights) + len(problem.momentum)
        checkpoints = sum(math.prod(shape) for shape in shapes[:count])
        assert checkpoints <= math.sqrt(chunks) * state
        # One state and one chunk's intermediates, with at most 31 columns of padding.
        kept = sum(math.prod(shape) for shape in shapes[count:])
        assert kept == 0 if chunks > 4 else kept <= 16 * state


def test_saved_memory_of_another_problem_is_refused():
    problem, smaller = (operator_problem(MemorySpec("mlp"), chunks=chunks) for chunks in (3, 2))
    output, _, _, saved = cpu.scan_forward(problem, save=True)
    _, _, _, too_small = cpu.scan_forward(smaller, save=True)
    assert saved[-1].numel() > too_small[-1].numel() == 0
    saved[-1] = saved[-1].chunk(2, -1)[0].contiguous()
    with pytest.raises(ValueError, match="segment"):
        cpu.scan_backward(problem, saved, torch.ones_like(output), [None] * 2, [None] * 2)
