"""One scan as a thing to run: a named implementation, forward or forward+backward, and whether two results agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hope_kernels.bench.problems import Problem
from hope_kernels.bench.shapes import MODES

if TYPE_CHECKING:
    from hope_kernels import MemoryState

Results = dict[str, Tensor]

# Relative difference (Frobenius norm) up to which two implementations count as the same computation at the benchmark
# shapes. Hundreds of writes follow one another there and rounding grows with each, hence wider than one rounding step.
AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Implementation:
    """A backend, plain or through ``torch.compile``."""

    backend: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.backend} + torch.compile" if self.compiled else self.backend


REFERENCE = Implementation("reference")


def scan(problem: Problem, backend: str | None) -> tuple[Tensor, MemoryState]:
    """``memory_scan`` of the problem: output and state."""
    from hope_kernels import memory_scan

    return memory_scan(
        problem.q,
        problem.k,
        problem.v,
        problem.lr,
        problem.weights,
        spec=problem.spec,
        chunk_size=problem.chunk_size,
        retention=problem.retention,
        momentum=problem.momentum,
        backend=backend,
    )


def make_call(implementation: Implementation, problem: Problem, mode: str) -> Callable[[], Results]:
    """A function without arguments that runs the scan once.

    ``"forward"`` runs without a graph and returns ``output``; ``"forward+backward"`` also returns ``d name`` for every
    input, from the output gradient ``problem.d_output``. With ``torch.compile`` the first call compiles.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; want one of {', '.join(map(repr, MODES))}")
    leaves = problem.requires_grad() if mode == "forward+backward" else problem
    inputs = leaves.inputs()

    def output_of(named: dict[str, Tensor]) -> Tensor:
        return scan(leaves.with_inputs(named), implementation.backend)[0]

    forward = torch.compile(output_of) if implementation.compiled else output_of

    def call() -> Results:
        if mode == "forward":
            with torch.no_grad():
                return {"output": forward(inputs)}
        output = forward(inputs)
        gradients = torch.autograd.grad(output, list(inputs.values()), leaves.d_output)
        return {"output": output.detach()} | {
            f"d {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)
        }

    return call


def difference(results: Results, expected: Results) -> float:
    """The largest relative difference ``|a - b| / |b|`` (Frobenius norms) over all results; inf if any is not finite.

    Raises:
        ValueError: the two hold different names or shapes.
    """
    if results.keys() != expected.keys():
        raise ValueError(f"results hold {sorted(results)}, expected {sorted(expected)}")
    worst = 0.0
    for name, want in expected.items():
        got = results[name]
        if got.shape != want.shape:
            raise ValueError(f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        if not (torch.isfinite(got).all() and torch.isfinite(want).all()):
            return float("inf")
        norm = want.double().norm().item()
        distance = (got.double() - want.double()).norm().item()
        worst = max(worst, distance / norm if norm > 0 else distance)
    return worst
