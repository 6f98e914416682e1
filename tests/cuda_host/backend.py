"""The backend "cuda" on CPU tensors: its Python side as it is, its kernels compiled for the CPU (see `build.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hope_kernels.backends.cpu import step as cpu_step
from hope_kernels.backends.cuda import runtime
from tests.cuda_host import build, scan

KERNELS = build.ROOT / "csrc/cuda"
SOURCES = [
    build.HERE / "module.cpp",
    KERNELS / "device.cpp",
    KERNELS / "level_update.cu",
    KERNELS / "step.cu",
    *scan.SCANS,
]


def compiled(folder: Path) -> ModuleType:
    """The CUDA part of the compiled core, its kernels running on the CPU."""
    return build.python_module(folder, "cuda_on_host", SOURCES)


@contextmanager
def on_host(module: ModuleType) -> Iterator[None]:
    """Inside, the backend "cuda" takes CPU tensors, and those alone."""

    def device_refused(core: ModuleType, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"the host layer takes CPU tensors, got {device}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_step, "refuses", lambda device: "the CUDA engine is under test")
        patch.setattr(runtime, "load", lambda: module)
        patch.setattr(runtime, "no_device", lambda: None)
        patch.setattr(runtime, "current_device", lambda: torch.device("cpu"))
        patch.setattr(runtime, "name_of", lambda device: "the host layer")
        patch.setattr(runtime, "device_refused", device_refused)
        patch.setattr(runtime, "stream", lambda device: 0)
        yield
