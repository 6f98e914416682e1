"""Regression benchmarks: one scan per shape, mode and backend, in pytest-benchmark's tables.

``python -m pytest benchmarks`` runs S1, S16 and S64 in float32; ``-m slow`` the large memories, ``-m ""`` both. Results
are compared with the reference's before they are timed. For ratios within one run use ``hope-kernels bench``.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from hope_kernels import available_backends
from hope_kernels.bench.implementations import (
    AGREEMENT,
    REFERENCE,
    Implementation,
    Results,
    difference,
    make_call,
)
from hope_kernels.bench.machine import fma_peak
from hope_kernels.bench.problems import shape_problem
from hope_kernels.bench.shapes import CPU_SHAPES, MODES, SHAPES, Shape

BACKENDS = [name for name, status in available_backends().items() if status]
LARGE = ("L", "L-glu")
DTYPE = torch.float32


@pytest.fixture(scope="session")
def peak() -> float | None:
    """The multiply-add peak of this run, operations per second."""
    return fma_peak()


@lru_cache(maxsize=1)  # parameters run shape by shape, mode by mode: one result is alive at a time
def expected(shape: Shape, mode: str) -> Results:
    return make_call(REFERENCE, shape_problem(shape, dtype=DTYPE), mode)()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in CPU_SHAPES]
)
def test_scan(benchmark, peak, name: str, mode: str, backend: str) -> None:
    shape = SHAPES[name]
    call = make_call(Implementation(backend), shape_problem(shape, dtype=DTYPE), mode)
    assert difference(call(), expected(shape, mode)) <= AGREEMENT[DTYPE]
    benchmark.group = f"{name} {mode} ({shape.sizes})"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    rate = shape.flops(mode) / benchmark.stats.stats.median
    benchmark.extra_info |= {"gflops": rate / 1e9, "peak_fraction": None if peak is None else rate / peak}
