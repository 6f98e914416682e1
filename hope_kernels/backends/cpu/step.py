"""The CPU engine's step: one token of every sequence through all levels of a CMS, in one call of the compiled core.

What it computes and where its state lies is told by tuples of numbers and addresses (csrc/bindings.h), which
``hope_kernels.layers.one_launch`` makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hope_kernels.backends import cpu

if TYPE_CHECKING:
    from torch import Tensor

NAME = "cpu"
SPLIT_PAIRS = 0  # threads share out pairs of sequence and head by themselves
KEEPS_PREDICTIONS = False  # a write asks the memory again, all tokens of a chunk in one product


def refuses(device: torch.device) -> str | None:
    """None when a step of tensors on ``device`` can run, else the reason it cannot."""
    state = cpu.status()
    if not state:
        return state.reason
    return None if device.type == "cpu" else f"it needs CPU tensors, got {device}"


def refuses_stack(settings: tuple, levels: tuple, device: torch.device) -> str | None:
    """None when the core computes this stack of levels, else the reason it does not.

    Raises:
        ValueError: the description contradicts itself.
    """
    return cpu.core().step_refusal(settings, levels)


def workspace_bytes(settings: tuple, levels: tuple) -> int:
    """Bytes that steps of this stack need; nothing in it need survive between them."""
    return cpu.core().step_workspace(settings, levels)


def step(settings: tuple, levels: tuple, x: Tensor, output: Tensor, workspace: Tensor) -> None:
    """One step: ``x`` and ``output [B, dim]``, with contiguous rows."""
    cpu.core().step(
        settings,
        levels,
        x.data_ptr(),
        x.stride(0),
        output.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )
