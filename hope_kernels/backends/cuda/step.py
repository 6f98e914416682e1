"""The CUDA engine's step: one token of every sequence through all levels of a CMS, in one launch.

What it computes and where its state lies is told by tuples of numbers and addresses (csrc/bindings_cuda.cpp), which
``hope_kernels.layers.one_launch`` makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hope_kernels.backends.cuda import runtime

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAME = "cuda"
KEEPS_PREDICTIONS = True  # of a chunk's tokens: a write then needs nothing of a memory's other pieces
# Up to so many pairs of sequence and head a memory is read by several blocks: fewer would leave most of a GPU's 100 or
# more multiprocessors without work. Beyond, one block reads and writes a pair while its weights are in L2. The bits of
# the results are the same.
SPLIT_PAIRS = 64


def refuses(device: torch.device) -> str | None:
    """None when a step of tensors on ``device`` can run, else the reason it cannot."""
    core = runtime.load()
    return core if isinstance(core, str) else runtime.device_refused(core, device)


def refuses_stack(settings: tuple, levels: tuple, device: torch.device) -> str | None:
    """None when the kernel computes this stack of levels on ``device``, else the reason it does not.

    Raises:
        ValueError: the description contradicts itself.
    """
    core = runtime.loaded()
    reason = core.cuda_step_refusal(settings, levels)
    if reason is None:
        with runtime.on_device(device):
            _, available = core.cuda_device(runtime.number(device))
        needed = core.cuda_step_shared_memory(settings, levels)
        if needed > available:
            reason = (
                f"a block takes {needed} bytes of shared memory for its weights and tokens; {device} has {available}"
            )
    return reason


def workspace_bytes(settings: tuple, levels: tuple) -> int:
    """Bytes of device memory that steps of this stack need; nothing in it need survive between them."""
    return runtime.loaded().cuda_step_workspace(settings, levels)


def step(settings: tuple, levels: tuple, x: Tensor, output: Tensor, workspace: Tensor) -> None:
    """Starts a step on the current stream: ``x`` and ``output [B, dim]``, with contiguous rows."""
    with runtime.on_device(x.device):
        runtime.loaded().cuda_step(
            settings,
            levels,
            x.data_ptr(),
            x.stride(0),
            output.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            runtime.number(x.device),
            runtime.stream(x.device),
        )
