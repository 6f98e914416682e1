"""The update of several levels in one launch; see :mod:`hope_kernels.optim`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hope_kernels.backends.cuda import runtime

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.optim.problem import UpdateProblem


def refuses_level_update(device: torch.device) -> str | None:
    """None when an update of tensors on ``device`` can run, else the reason it cannot."""
    core = runtime.load()
    return core if isinstance(core, str) else runtime.device_refused(core, device)


def level_update(problem: UpdateProblem) -> Tensor:
    """Starts the update on the current stream and returns the norms ``[levels]``, as ``hope_kernels.optim`` says."""
    core, device = runtime.loaded(), problem.device
    tensors, levels = problem.tables()
    norms = torch.empty(len(levels), device=device)
    sizes = tuple(p.numel() for level in problem.levels for p in level.params)
    workspace = torch.empty(core.cuda_level_update_workspace(sizes, len(levels)), dtype=torch.uint8, device=device)
    with runtime.on_device(device):
        core.cuda_level_update(
            tensors,
            levels,
            problem.grad_scale,
            problem.max_norm or 0.0,
            norms.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            runtime.number(device),
            runtime.stream(device),
        )
    # The memory is given to nobody else before the kernel has run: the allocator orders its uses along the stream.
    return norms
