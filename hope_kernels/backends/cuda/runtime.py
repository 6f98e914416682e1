"""What every part of the CUDA engine needs: the compiled module, the device it may run on, the stream it runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from hope_kernels.backends.interface import BackendStatus, build_info


def load() -> ModuleType | str:
    """The compiled module with its CUDA part, or why it is not here."""
    try:
        core = import_module("hope_kernels._core")
    except ImportError as error:
        return f"the compiled core does not load: {error}"
    if not hasattr(core, "cuda_device"):
        reason = build_info().get("cuda_reason") or "no reason recorded"
        return f"the compiled core was built without CUDA kernels: {reason}; a reinstall where nvcc compiles adds them"
    return core


def loaded() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not here; the message says why.
    """
    core = load()
    if isinstance(core, str):
        raise RuntimeError(f"backend 'cuda' is not available: {core}")
    return core


def built() -> BackendStatus:
    """Whether the kernels are built, for which architectures, or why they are not."""
    core = load()
    if isinstance(core, str):
        return BackendStatus("cuda", False, core)
    return BackendStatus("cuda", True, f"compiled for {_architectures(core)} and PTX of the newest")


def _architectures(core: ModuleType) -> str:
    return ", ".join(f"sm_{architecture}" for architecture in core.cuda_architectures.split())


def no_device() -> str | None:
    """Why torch has no device for this engine, or None."""
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU, or no driver for it"
    return "torch runs on AMD GPUs here, and the engine needs an NVIDIA GPU" if torch.version.hip else None


def device_refused(core: ModuleType, device: torch.device) -> str | None:
    """Why kernels do not run on tensors of ``device``, or None."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device}"
    if (reason := no_device()) is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    architectures = [int(architecture) for architecture in core.cuda_architectures.split()]
    # Machine code runs on later minor versions of its major one; the PTX of the newest on everything later.
    code = any(a // 10 == major and a % 10 <= minor for a in architectures)
    if code or 10 * major + minor >= max(architectures):
        return None
    built_for = f"{_architectures(core)} and PTX of the newest"
    return f"it was built for {built_for}; {name_of(device)} is sm_{major}{minor}"


def current_device() -> torch.device:
    """Where tensors of no device in particular go."""
    return torch.device("cuda", torch.cuda.current_device())


def name_of(device: torch.device) -> str:
    """As the driver gives it, ``"NVIDIA H200"``."""
    return torch.cuda.get_device_name(device)


def number(device: torch.device) -> int:
    """The device's number among those the runtime sees."""
    return 0 if device.index is None else device.index


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, the device is this thread's current one; afterwards it is the one before, whatever a launch made it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream(device: torch.device) -> int:
    """The address of the stream that work on the device goes to now."""
    return torch.cuda.current_stream(device).cuda_stream
