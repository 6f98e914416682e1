"""Small pieces that layers with memories share: norms, gates and a convolution, computed in float32.

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


def clip_norm(x: Tensor, bound: float) -> Tensor:
    """Rows longer than ``bound`` shortened to that length, the others as they are, in the state dtype."""
    x = x.to(state_dtype(x.dtype))
    return x * (bound * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=bound**2)))


def clip_spectral_norm(weight: Tensor, bound: float) -> Tensor:
    """Matrices ``[.., in, out]`` scaled down to a spectral norm of at most ``bound``; smaller ones as they are.

    Measured is ``(tr (W^T W)^8)^(1/16)``, computed in the state dtype: at least the spectral norm and at most
    ``out^(1/16)`` of it, of matrix products alone (a decomposition would wait for a GPU), differentiable everywhere.
    """
    dtype = state_dtype(weight.dtype)
    tiny = torch.finfo(dtype).tiny
    w = weight.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        gram = w.transpose(-1, -2) @ w
        # Divided by its trace, its powers neither overflow nor vanish.
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=tiny)
        power = torch.linalg.matrix_power(gram / trace, 4)
    norm = trace.sqrt() * (power.square().sum((-1, -2), keepdim=True) + tiny) ** (1 / 16)
    return weight * (bound / norm.clamp(min=bound)).to(weight.dtype)


def project_gates(x: Tensor, weight: Tensor, bias: Tensor, gates: int, heads: int) -> Tensor:
    """``x W^T + b`` for all gates of a layer: ``[.., dim]`` to ``[.., gates, heads]`` in the state dtype of ``x``.

    Args:
        weight, bias: ``[gates * heads, dim]`` and ``[gates * heads]``, any floating dtype.
    """
    dtype = state_dtype(x.dtype)
    # Autocast would round the gates to bfloat16: retention is close to 1, where that leaves two digits.
    with torch.autocast(x.device.type, enabled=False):
        projected = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    return projected.unflatten(-1, (gates, heads))


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
        return project_gates(x, self.weight, self.bias, len(self.starts), self.heads)


class HeadReadout(nn.Module):
    """A number per head read off its features, ``[.., heads, D] -> [.., heads]``, in the state dtype.

    It starts with zero weights, as :class:`GateProjection` and for its reasons.

    Args:
        heads, head_dim: N and D.
        start: the starting value (bias).
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        start: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(heads, head_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)

    def extra_repr(self) -> str:
        return f"heads={self.weight.shape[0]}, head_dim={self.weight.shape[1]}"

    def forward(self, x: Tensor) -> Tensor:
        dtype = state_dtype(x.dtype)
        # A sum of products rather than a matrix product, which autocast would round.
        return (x.to(dtype) * self.weight.to(dtype)).sum(-1) + self.bias.to(dtype)


class CausalConvolution(nn.Module):
    """A depthwise convolution that sees a token and the ``width - 1`` before it, ``[B, T, dim]`` -> the same.

    ``y_t = sum_j weight[j] * x_{t-j}`` for each feature on its own, in the state dtype, without a bias and without an
    activation; what precedes a sequence is 0. Entries of ``y`` start at about ``output_rms`` for unit entries of ``x``.

    Args:
        dim: features.
        width: tokens it sees.
        output_rms: the size of the result's entries that the weights are initialised for.
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        output_rms: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.output_rms = output_rms
        self.weight = nn.Parameter(torch.empty(width, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.output_rms * self.weight.shape[0] ** -0.5)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, width={self.weight.shape[0]}"

    def initial_tail(self, batch_size: int) -> Tensor:
        """What precedes the first token of ``batch_size`` sequences: zeros ``[B, width - 1, dim]``."""
        width, dim = self.weight.shape
        return self.weight.new_zeros(batch_size, width - 1, dim)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """``x [B, T, dim]`` and the inputs before it -> the result, in the dtype of ``x``, and the tail after it."""
        before, length = tail.shape[1], x.shape[1]
        seen = torch.cat([tail, x.to(torch.promote_types(tail.dtype, x.dtype))], 1)
        dtype = state_dtype(x.dtype)
        weight = self.weight.to(dtype)
        y = sum(weight[j] * seen[:, before - j : before - j + length].to(dtype) for j in range(before + 1))
        # A copy: three tokens do not hold on to all.
        return y.to(x.dtype), seen[:, length:].clone()


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
