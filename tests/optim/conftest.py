"""The engines an update is tested on; the CUDA kernel runs on the CPU, in the host layer."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import ModuleType

import pytest

from hope_kernels.backends import cuda, implementation
from tests.cuda_host import build


@pytest.fixture(scope="session")
def cuda_module() -> ModuleType:
    """The CUDA engine's part of the compiled core, its kernel running on the CPU."""
    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    pytest.importorskip("pybind11")
    return build.cuda_module()


@pytest.fixture(scope="session")
def cuda_host(cuda_module: ModuleType) -> ctypes.CDLL:
    """What that module says about its launches."""
    return ctypes.CDLL(cuda_module.__file__)


@pytest.fixture(scope="package")
def cuda_on_host(cuda_module: ModuleType) -> Iterator[None]:
    """Makes the `cuda` backend take CPU tensors, in all tests of this folder."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda, "_core", lambda: cuda_module)
    patch.setattr(cuda, "_device_refused", lambda core, device: None)
    patch.setattr(cuda, "_stream", lambda device: 0)
    yield
    patch.undo()


@pytest.fixture(scope="package", params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not (state := implementation("cpu").status()):
        pytest.skip(state.reason)
    if request.param == "cuda":
        request.getfixturevalue("cuda_on_host")
    return request.param


@pytest.fixture(scope="package", params=["cpu", "cuda"])
def engine(request: pytest.FixtureRequest) -> str:
    """A compiled backend."""
    if request.param == "cpu" and not (state := implementation("cpu").status()):
        pytest.skip(state.reason)
    if request.param == "cuda":
        request.getfixturevalue("cuda_on_host")
    return request.param
