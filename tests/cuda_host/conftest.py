"""The CUDA scan compiled for the CPU, once for all tests of a process."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tests.cuda_host import build, scan


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels behind the functions of scan_driver.cpp."""
    return scan.load(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that runs the cases of scan_driver.cpp under ThreadSanitizer."""
    sources = [*scan.SOURCES, build.HERE / "case_main.cpp"]
    return build.build(tmp_path_factory.mktemp("sanitized") / "scan", sources, thread_sanitizer=True)
