"""Problems of the CUDA engine's forward scan and what their results are held against, for its tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hope_kernels import MemorySpec, memory_scan
from tests.cases import Evaluation, Problem, assert_within_budget, make_problem, package_results
from tests.cuda_host import build

needs_host_layer = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
needs_thread_sanitizer = pytest.mark.skipif(
    build.thread_sanitizer_unavailable() is not None, reason=str(build.thread_sanitizer_unavailable())
)


def slow(*values: object):
    """Parameters of a case that is left to the slow tier, where a like one is in the quick tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


FORMS = ["mlp", "glu"]
HALVES = [torch.bfloat16, torch.float16]
ONE_HALF = [torch.bfloat16, slow(torch.float16)]
ONE_FORM = ["mlp", slow("glu")]
DELTA_RULE = [build.ROOT / "csrc/cuda" / name for name in ("forward_delta_rule.h", "scan_delta_rule.h")]
KERNEL = [build.ROOT / "csrc/cuda" / name for name in ("forward_scan.h", "scan_block.h", "scan_sum.h")]


def results(problem: Problem, backend: str = "cpu", **options) -> dict[str, Tensor]:
    with torch.no_grad():
        return package_results(problem, backend=backend, **options)


def exact(problem: Problem) -> Problem:
    return problem.map(lambda _, t: t.double())


def assert_close_to_truth(problem: Problem, dtype: torch.dtype, truth: dict[str, Tensor] | None = None) -> None:
    """Within twice the eager reference's error and one rounding, both against float64."""
    problem = problem.cast(dtype)
    parts = results(problem), results(problem, "reference"), truth or results(exact(problem), "reference")
    assert_within_budget(*(Evaluation(part, {}) for part in parts), dtype)


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    changed = [name for name, want in expected.items() if not torch.equal(found[name], want)]
    assert not changed, f"not identical: {', '.join(changed)}"


def with_mild_retention(problem: Problem) -> Problem:
    """Retention in [0.96, 1] in place of [0.6, 1]: a chunk leaves something of the weights, so that a result is made by
    many tokens, and its error is no matter of how one number happens to be rounded."""
    return problem.map(lambda name, t: 1 - 0.1 * (1 - t) if name == "retention" else t)


def with_long_momentum(problem: Problem) -> Problem:
    """Momentum in [0.82, 0.98] in place of [0.1, 0.9], for the same reason: its speed is made by many tokens."""
    return problem.map(lambda name, t: 0.8 + 0.2 * t if name == "momentum" else t)


def small(spec: MemorySpec, **options) -> Problem:
    sizes = {"heads": 1, "dim": 32, "hidden": 128, "chunk_size": 20, "tokens": 46, "retention": True, "max_lr": 0.1}
    return with_mild_retention(make_problem(spec, **(sizes | options)))


def pieces(problem: Problem, rows: list[tuple[int, int]]) -> list[Problem]:
    """Tokens [start, end) of row b, for each b."""
    return [problem.row(b).span(start, end) for b, (start, end) in enumerate(rows)]


def scan_with(problem: Problem, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    gates = {name: tensors.get(name) for name in ("retention", "momentum")}
    with torch.no_grad():
        output, state = memory_scan(
            *(tensors[name] for name in ("q", "k", "v", "lr")),
            problem.weights,
            spec=problem.spec,
            chunk_size=problem.chunk_size,
            backend="cpu",
            **gates,
            **options,
        )
    named = {f"weight{i}": w for i, w in enumerate(state.weights)}
    named |= {f"momentum{i}": m for i, m in enumerate(state.momentum or ())}
    return {"output": output} | named


def written_barriers(name: str, headers: list[Path] = KERNEL) -> set[str]:
    """The places in these headers, each ``file.h:line``, that call a barrier of this name."""
    return {
        f"{header.name}:{number}"
        for header in headers
        for number, line in enumerate(header.read_text().splitlines(), 1)
        if re.search(rf"\b{name}\(", line)
    }
