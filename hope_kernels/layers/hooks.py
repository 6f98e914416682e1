"""Whether calling a module computes what its class says, or more."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as everywhere


def is_hooked(module: nn.Module) -> bool:
    """Whether a call runs hooks around the module's ``forward``, or a ``forward`` of this one instance's own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    )
