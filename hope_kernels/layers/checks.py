"""Checks of arguments that layers share; every message begins with the layer's name, ``owner``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_int(owner: str, name: str, value: Any, *, optional: bool = False) -> None:
    """An int of at least 1, or None where that is an ``optional`` value."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is {value!r}; want a positive int{' or None' if optional else ''}")
    if value < 1:
        raise ValueError(f"{owner}: {name} is {value}; want at least 1")


def check_bool(owner: str, name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is {value!r}; want True or False")


def check_momentum(owner: str, rule: str, momentum: bool | None) -> None:
    """No momentum with delta gradient descent, for which none is defined."""
    if rule == "dgd" and momentum:
        raise ValueError(f"{owner}: momentum is True with rule 'dgd'; momentum goes with rule 'gd' only")


def check_bound(owner: str, name: str, value: Any) -> None:
    """A finite number above 0, or None where there is no bound or a default one."""
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is {value!r}; want a positive float or None")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{owner}: {name} is {value}; want a finite number above 0")


def check_width(owner: str, dim: Any, heads: Any) -> None:
    """Positive ints, the first a multiple of the second."""
    check_int(owner, "dim", dim)
    check_int(owner, "heads", heads)
    if dim % heads:
        raise ValueError(f"{owner}: dim is {dim} and heads is {heads}; want dim divisible by heads")


def check_batch_size(owner: str, batch_size: Any) -> None:
    """An int (or a symbolic one) of at least 0."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | torch.SymInt):
        raise TypeError(f"{owner}.init_state: batch_size is {batch_size!r}; want an int")
    if batch_size < 0:
        raise ValueError(f"{owner}.init_state: batch_size is {batch_size}; want at least 0")


def check_input(owner: str, x: Any, dim: int, parameter: Tensor, tokens: int | None = None) -> None:
    """``x [B, T, dim]`` (``T = tokens`` where given), on the device and of the dtype of a layer's ``parameter``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: x is a {type(x).__name__}; want a tensor [B, T, dim]")
    if x.dim() != 3 or x.shape[-1] != dim or (tokens is not None and x.shape[1] != tokens):
        want = f"[B, T, {dim}]" if tokens is None else f"[B, {dim}] or [B, {tokens}, {dim}]"
        raise ValueError(f"{owner}: x has shape {tuple(x.shape)}; want {want}")
    if x.device != parameter.device:
        raise ValueError(f"{owner}: x is on {x.device}, the parameters on {parameter.device}; want one device")
    if x.dtype == parameter.dtype:
        return
    cast = x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
    if not cast or torch.float64 in (x.dtype, parameter.dtype):
        raise TypeError(f"{owner}: x is {x.dtype}, the parameters are {parameter.dtype}; want one dtype")
