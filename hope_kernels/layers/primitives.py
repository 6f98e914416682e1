"""Small pieces that layers with memories share: norms and a projection whose results stay in float32.

Gates and norms decide how far a memory moves, so they are computed in the *state dtype* (float32, or float64 for
float64 inputs) whatever the dtype of the tokens or an enclosing autocast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hope_kernels.memory.state import state_dtype

NORM_EPS = 1e-6


def l2_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis, in the state dtype.

    ``eps`` is inside the root, so that a row of zeros gives zeros and a finite gradient.
    """
    x = x.to(state_dtype(x.dtype))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, in the state dtype."""
    x = x.to(state_dtype(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class GateProjection(nn.Linear):
    """One linear map ``[.., dim] -> [.., gates, heads]`` for all gates of a layer, in the state dtype.

    It starts with zero weights: every gate is then ``sigmoid`` or ``softplus`` of its own starting value, the same
    for every token, whatever the scale of the input.

    Args:
        dim: features of the input.
        heads: heads, each with a gate of its own.
        starts: the starting value (bias) of each gate, before its nonlinearity.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        starts: tuple[float, ...],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.heads, self.starts = heads, starts
        super().__init__(dim, heads * len(starts), bias=True, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            for bias, start in zip(self.bias.unflatten(0, (len(self.starts), self.heads)), self.starts, strict=True):
                bias.fill_(start)

    def forward(self, x: Tensor) -> Tensor:
        dtype = state_dtype(x.dtype)
        # Autocast would round the gates to bfloat16: retention is close to 1, where that leaves two digits.
        with torch.autocast(x.device.type, enabled=False):
            gates = F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return gates.unflatten(-1, (len(self.starts), self.heads))


def memory_gates(
    step_bound: float, step: Tensor, forgetting: Tensor | None, momentum: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gates of a memory, ``[..]`` each, from numbers of any size; None stays None.

    ``lr = step_bound * sigmoid(step)``, retention ``exp(-lr * softplus(forgetting))``, exactly 1 where the step is
    0, and ``sigmoid(momentum)``.
    """
    lr = step_bound * torch.sigmoid(step)
    retention = None if forgetting is None else torch.exp(-lr * F.softplus(forgetting))
    return lr, retention, None if momentum is None else torch.sigmoid(momentum)


def inverse_sigmoid(p: float) -> float:
    """The ``z`` with ``sigmoid(z) = p``, for ``0 < p < 1``."""
    return math.log(p / (1 - p))


def inverse_softplus(y: float) -> float:
    """The ``z`` with ``softplus(z) = y``, for ``y > 0``."""
    return math.log(math.expm1(y))
