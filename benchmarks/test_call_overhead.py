"""Regression benchmarks of what one-token calls take beside their arithmetic, in pytest-benchmark's tables.

Each row is one call of :mod:`hope_kernels.bench.call_overhead`; ``python benchmarks/call_overhead.py`` times them side
by side.
"""

from __future__ import annotations

import pytest
import torch

from hope_kernels import available_backends
from hope_kernels.bench.call_overhead import CALLS_IN_A_ROW, calls, check_agreement

pytestmark = pytest.mark.skipif(not available_backends()["cpu"], reason=available_backends()["cpu"].reason)


@pytest.fixture(scope="module")
def agreement() -> None:
    check_agreement()


@pytest.mark.parametrize("name", calls("reference"))
def test_call(benchmark, agreement, name: str) -> None:
    benchmark.group = "one token, one sequence, D = H = 16"
    with torch.inference_mode():
        benchmark.pedantic(calls("cpu")[name], rounds=50, iterations=CALLS_IN_A_ROW, warmup_rounds=2)
