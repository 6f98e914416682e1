"""The CUDA engine's scans on the CPU, compiled once for all tests of a process.

The kernels stand in for the CPU engine, so that the public functions and their autograd prepare every problem as they
would for a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from hope_kernels import MemorySpec, backends
from hope_kernels.backends.interface import BackendStatus, ScanGradients, ScanProblem
from tests.cuda_host import build, scan


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels behind the functions of scan_driver.cpp."""
    return scan.load(tmp_path_factory.mktemp("scan"))


@dataclass
class Host:
    """The kernels in the place of backend "cpu", on a device that can be changed.

    Keeps the last problem, what the last backward was given, and the gradients of all.
    """

    library: ctypes.CDLL
    architecture: int = 90
    shared_memory: int = 0
    problem: ScanProblem | None = None
    arguments: tuple = ()
    gradients: list[ScanGradients] = field(default_factory=list)

    @property
    def device(self) -> dict[str, int]:
        return {"architecture": self.architecture, "shared_memory": self.shared_memory}

    def scan_forward(self, problem: ScanProblem, *, save: bool) -> tuple[Tensor, list, list, list]:
        self.problem = problem
        return scan.scan_forward(self.library, problem, save=save, **self.device)

    def read(self, q: Tensor, weights: tuple[Tensor, ...], spec: MemorySpec, chunk_size: int) -> Tensor:
        problem = ScanProblem(q, *[None] * 10, weights, (), None, spec, chunk_size, 0, 0, 0)
        return self.scan_forward(problem, save=False)[0]

    def scan_backward(self, *arguments) -> ScanGradients:
        self.arguments = arguments
        self.gradients.append(self.again())
        return self.gradients[-1]

    def again(self, **options) -> ScanGradients:
        """The last backward, on another device or with other gradients."""
        return scan.scan_backward(self.library, *self.arguments, **(self.device | options))


@pytest.fixture
def host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host(library)
    module = SimpleNamespace(
        status=lambda: BackendStatus("cpu", True, "the CUDA kernels"),
        refuses=lambda request: None,
        scan_forward=found.scan_forward,
        scan_backward=found.scan_backward,
        read=found.read,
    )
    before = backends.implementation
    monkeypatch.setattr(backends, "implementation", lambda name: module if name == "cpu" else before(name))
    return found


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that runs the cases of scan_driver.cpp under ThreadSanitizer."""
    return build.build(tmp_path_factory.mktemp("sanitized") / "scan", scan.CASES, thread_sanitizer=True)
