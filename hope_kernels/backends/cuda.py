"""The CUDA engine: hands problems to the part of ``hope_kernels._core`` that nvcc compiled.

It has the update of several levels; scans run on other backends so far.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from hope_kernels.backends.interface import BackendStatus, build_info

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.optim.problem import UpdateProblem


def _core() -> ModuleType | str:
    """The compiled module, or why it is not here."""
    try:
        core = import_module("hope_kernels._core")
    except ImportError as error:
        return f"the compiled core does not load: {error}"
    if not hasattr(core, "cuda_level_update"):
        reason = build_info().get("cuda_reason") or "no reason recorded"
        return f"the compiled core was built without CUDA kernels: {reason}; a reinstall where nvcc compiles adds them"
    return core


def _device_refused(core: ModuleType, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(architecture) for architecture in core.cuda_architectures.split()]
    # Machine code runs on later minor versions of its major one; the PTX of the newest on everything later.
    runs = any(a // 10 == major and a % 10 <= minor for a in built) or 10 * major + minor >= max(built)
    if runs:
        return None
    names = ", ".join(f"sm_{a}" for a in built)
    return f"it was built for {names} and PTX of the newest; {torch.cuda.get_device_name(device)} is sm_{major}{minor}"


def level_update_status() -> BackendStatus:
    """Whether the update of several levels is built, for which architectures, or why it is not."""
    core = _core()
    if isinstance(core, str):
        return BackendStatus("cuda", False, core)
    return BackendStatus("cuda", True, f"compiled for sm_{core.cuda_architectures.replace(' ', ', sm_')}")


def refuses_level_update(device: torch.device) -> str | None:
    """None when an update of tensors on ``device`` can run, else the reason it cannot."""
    core = _core()
    return core if isinstance(core, str) else _device_refused(core, device)


def level_update(problem: UpdateProblem) -> Tensor:
    """Starts the update on the current stream and returns the norms ``[levels]``, as ``hope_kernels.optim`` says."""
    core = _core()
    if isinstance(core, str):
        raise RuntimeError(f"backend 'cuda' is not available: {core}")
    tensors, levels = problem.tables()
    norms = torch.empty(len(levels), device=problem.device)
    sizes = tuple(p.numel() for level in problem.levels for p in level.params)
    workspace = torch.empty(
        core.cuda_level_update_workspace(sizes, len(levels)), dtype=torch.uint8, device=problem.device
    )
    core.cuda_level_update(
        tensors,
        levels,
        problem.grad_scale,
        problem.max_norm or 0.0,
        norms.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        problem.device.index or 0,
        _stream(problem.device),
    )
    # The memory is given to nobody else before the kernel has run: the allocator orders its uses along the stream.
    return norms


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
