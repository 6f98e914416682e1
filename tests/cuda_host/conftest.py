"""The CUDA engine's forward scan on the CPU, compiled once for all tests.

The kernels stand in for the CPU engine, so that the public functions prepare every problem as they would for a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from hope_kernels import backends
from hope_kernels.backends.interface import BackendStatus, ScanProblem
from tests.cuda_host import build, scan


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return scan.load(tmp_path_factory.mktemp("scan"))


@dataclass
class Host:
    """The kernels in the place of backend "cpu", on a device that can be changed; keeps the last problem."""

    library: ctypes.CDLL
    architecture: int = 90
    shared_memory: int = 0
    problem: ScanProblem | None = None

    def scan_forward(self, problem: ScanProblem, *, save: bool) -> tuple[Tensor, list, list, list]:
        assert not save
        self.problem = problem
        device = {"architecture": self.architecture, "shared_memory": self.shared_memory}
        return scan.scan_forward(self.library, problem, **device)


@pytest.fixture
def host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host(library)
    module = SimpleNamespace(
        status=lambda: BackendStatus("cpu", True, "the CUDA kernels"),
        refuses=lambda spec, dtype, device: None,
        scan_forward=found.scan_forward,
    )
    before = backends.implementation
    monkeypatch.setattr(backends, "implementation", lambda name: module if name == "cpu" else before(name))
    return found


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [*scan.SOURCES, build.HERE / "case_main.cpp"]
    return build.build(tmp_path_factory.mktemp("sanitized") / "scan", sources, thread_sanitizer=True)
