"""The engines an update is tested on; the CUDA kernel runs on the CPU, in the host layer."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from hope_kernels.backends import implementation
from tests.cuda_host import backend as backend_on_host


@pytest.fixture(scope="package")
def cuda_on_host(cuda_module: ModuleType) -> Iterator[None]:
    """Makes the `cuda` backend take CPU tensors, in all tests of this folder."""
    with backend_on_host.on_host(cuda_module):
        yield


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
