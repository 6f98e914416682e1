"""Suffix products and linear recurrences along the last axis, without a division and in log depth.

A product of gates is always formed by multiplying segments: gates may be exactly 0 (a float32 sigmoid
underflows to 0), where a quotient of prefix products or a difference of logarithms loses the value and the
gradient. The scans double their reach at each of ``log2(C)`` steps, so that autograd sees a few multiplications
rather than a loop over the chunk (``torch.cumprod`` divides in its backward and synchronises to look for zeros).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _shift_left(x: Tensor, count: int, fill: float) -> Tensor:
    """``y[..., t] = x[..., t + count]``, ``fill`` where that is past the end."""
    return torch.nn.functional.pad(x[..., count:], (0, count), value=fill)


def suffix_products(x: Tensor) -> Tensor:
    """``y[..., t] = prod_{s >= t} x[..., s]``, same shape as ``x [..., C]``."""
    reach = 1
    while reach < x.shape[-1]:
        x = x * _shift_left(x, reach, 1.0)
        reach *= 2
    return x


def exclusive(suffix: Tensor) -> Tensor:
    """``prod_{s > t}`` from :func:`suffix_products`: the same products without their first factor."""
    return _shift_left(suffix, 1, 1.0)


def prefix_products(x: Tensor) -> Tensor:
    """``y[..., t] = prod_{s <= t} x[..., s]``."""
    return suffix_products(x.flip(-1)).flip(-1)


def suffix_recurrence(factor: Tensor, term: Tensor) -> Tensor:
    """``y_t = term_t + factor_{t+1} y_{t+1}`` along the last axis (``y_C = term_C``).

    The pair (product of factors, partial sum) of two adjoining segments combines to that of their union.
    """
    factor = _shift_left(factor, 1, 0.0)
    reach = 1
    while reach < term.shape[-1]:
        term = term + factor * _shift_left(term, reach, 0.0)
        factor = factor * _shift_left(factor, reach, 0.0)
        reach *= 2
    return term


def between_products(x: Tensor) -> Tensor:
    """``P[..., t, s] = prod_{s < j < t} x_j`` for ``s < t``, else 0, from ``x [..., C]``."""
    size = x.shape[-1]
    index = torch.arange(size, device=x.device)
    # Column s of row t starts a fresh product at t = s + 1: factors x_{t-1} enter only where t - 1 > s.
    factors = torch.where(index[:, None] - 1 > index[None, :], x.roll(1, -1)[..., :, None], 1.0)
    products = prefix_products(factors.transpose(-1, -2)).transpose(-1, -2)
    return torch.where(index[:, None] > index[None, :], products, 0.0)
