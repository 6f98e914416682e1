"""The CUDA kernel of `level_update` under ThreadSanitizer: no race, and each of its barriers is needed.

Its results are tested in tests/optim, where the same kernel is one of the backends.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cuda_host import build

pytestmark = pytest.mark.skipif(
    build.thread_sanitizer_unavailable() is not None, reason=str(build.thread_sanitizer_unavailable())
)

KERNEL = build.ROOT / "csrc/cuda/level_update.cu"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [KERNEL, build.HERE / "level_update_cases.cpp", build.HERE / "case_main.cpp"]
    return build.build(tmp_path_factory.mktemp("cases") / "level_update", sources, thread_sanitizer=True)


@pytest.mark.parametrize("case", ["free", "own", "common", "own_narrow", "common_shifted"])
def test_the_kernel_has_no_race(cases: Path, case: str) -> None:
    assert build.races(cases, case) == []


def test_taking_out_any_barrier_is_seen(cases: Path, tmp_path: Path) -> None:
    lines = enumerate(KERNEL.read_text().splitlines(), 1)
    written = {f"{KERNEL.name}:{n}" for n, line in lines if re.search(r"__sync\w+\(|\.sync\(", line)}
    assert set(build.barriers(cases, tmp_path / "barriers", "own")) == written
    assert len(written) == 4
    for barrier in sorted(written):
        assert build.races(cases, "own", without=barrier), f"taking out {barrier} goes unnoticed"
