"""What is checked before an update starts: each error names the argument, says what came and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hope_kernels.optim.problem import COPY_DTYPES, GRADIENT_DTYPES, RULES, UpdateLevel


def _got(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}, {x.dtype}, on {x.device}"
    return f"{x!r} ({type(x).__name__})"


def check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {_got(value)}; want an int of at least {least}")
    if not least <= value < 2**63:
        raise ValueError(f"{name}: got {value}; want an int of at least {least}, below 2^63")


def check_number(name: str, value: Any, least: float = -math.inf, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {_got(value)}; want a number")
    if not (math.isfinite(value) and least <= value < below):
        wanted = "a finite number" if least == -math.inf else f"a finite number of at least {least}"
        raise ValueError(f"{name}: got {value}; want {wanted}" + (f" and below {below}" if below < math.inf else ""))


def check_bound(name: str, value: Any) -> None:
    if value is None:
        return
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: got {value}; want a positive number, or None for no bound")


def _check_sequence(name: str, values: Any, of: str, length: int | None = None) -> list[Any]:
    if isinstance(values, Tensor | str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: got {_got(values)}; want a list of {of}")
    if length is not None and len(values) != length:
        raise ValueError(f"{name}: got {len(values)} entries; want {length}, one for each of {of}")
    return list(values)


def check_levels(levels: Any) -> list[UpdateLevel]:
    levels = _check_sequence("levels", levels, "UpdateLevel")
    first: Tensor | None = None
    for i, level in enumerate(levels):
        name = f"levels[{i}]"
        if not isinstance(level, UpdateLevel):
            raise TypeError(f"{name}: got {_got(level)}; want an UpdateLevel")
        _check_settings(name, level)
        for j, param in enumerate(_check_sequence(f"{name}.params", level.params, "tensors")):
            where = f"{name}.params[{j}]"
            _check_tensor(where, param, (torch.float32, torch.float64), None)
            if first is None:
                first = param
            if param.device != first.device:
                raise ValueError(f"{where}: got {_got(param)}; want the device of the first master, {first.device}")
            if param.dtype != first.dtype:
                raise TypeError(f"{where}: got {_got(param)}; want the dtype of the first master, {first.dtype}")
        _check_state(name, level)
    return levels


def _check_settings(name: str, level: UpdateLevel) -> None:
    check_int(f"{name}.period", level.period, 1)
    if level.rule not in RULES:
        raise ValueError(f"{name}.rule: got {level.rule!r}; want one of {', '.join(map(repr, RULES))}")
    check_number(f"{name}.lr", level.lr, least=0)
    if not isinstance(level.betas, Sequence) or len(level.betas) != 2:
        raise TypeError(f"{name}.betas: got {_got(level.betas)}; want two numbers")
    for k, beta in enumerate(level.betas):
        check_number(f"{name}.betas[{k}]", beta, least=0, below=1)
    check_number(f"{name}.eps", level.eps, least=0)
    check_number(f"{name}.scale", level.scale)
    check_bound(f"{name}.max_norm", level.max_norm)
    if not isinstance(level.nesterov, bool):
        raise TypeError(f"{name}.nesterov: got {_got(level.nesterov)}; want a bool")
    if isinstance(level.weight_decay, Sequence):
        _check_sequence(f"{name}.weight_decay", level.weight_decay, f"{name}.params", len(level.params))
    for k, decay in enumerate(level.decays()):
        check_number(
            f"{name}.weight_decay" + (f"[{k}]" if level.decays() is level.weight_decay else ""), decay, least=0
        )


def _check_state(name: str, level: UpdateLevel) -> None:
    needed = {
        "accumulators": (level.period > 1, "a period above 1"),
        "first_moments": (level.rule in ("momentum", "adam"), f"rule {level.rule!r}"),
        "second_moments": (level.rule == "adam", f"rule {level.rule!r}"),
        "copies": (False, ""),
    }
    for field, (is_needed, why) in needed.items():
        tensors = getattr(level, field)
        if tensors is None:
            if is_needed:
                raise ValueError(
                    f"{name}.{field}: got None; {why} wants tensors like params (UpdateLevel.zeros makes them)"
                )
            continue
        tensors = _check_sequence(f"{name}.{field}", tensors, f"{name}.params", len(level.params))
        for j, (tensor, param) in enumerate(zip(tensors, level.params, strict=True)):
            if field == "copies":
                if tensor is not None:
                    _check_tensor(f"{name}.copies[{j}]", tensor, COPY_DTYPES, param)
            else:
                _check_tensor(f"{name}.{field}[{j}]", tensor, (param.dtype,), param)


def _check_tensor(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...], like: Tensor | None) -> None:
    """A contiguous tensor to write to, of one of the dtypes, shaped and placed like another."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {_got(tensor)}; want a tensor")
    if tensor.dtype not in dtypes or tensor.layout != torch.strided:
        raise TypeError(f"{name}: got {_got(tensor)}; want a dense tensor of {' or '.join(map(str, dtypes))}")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(f"{name}: got {_got(tensor)}; want the shape of its parameter, {tuple(like.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: got {_got(tensor)}; want the device of its parameter, {like.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got {_got(tensor)} with strides {tensor.stride()}; want it contiguous")


def check_grads(grads: Any, levels: list[UpdateLevel]) -> list[list[Tensor | None]]:
    """The gradients, contiguous."""
    grads = _check_sequence("grads", grads, "levels", len(levels))
    checked = []
    for i, (level, of_level) in enumerate(zip(levels, grads, strict=True)):
        of_level = _check_sequence(f"grads[{i}]", of_level, f"levels[{i}].params", len(level.params))
        for j, (grad, param) in enumerate(zip(of_level, level.params, strict=True)):
            if grad is None:
                continue
            name = f"grads[{i}][{j}]"
            if not isinstance(grad, Tensor) or grad.layout != torch.strided:
                raise TypeError(f"{name}: got {_got(grad)}; want a dense tensor or None")
            if grad.dtype not in (*GRADIENT_DTYPES, param.dtype):
                raise TypeError(f"{name}: got {_got(grad)}; want float32, bfloat16 or float16")
            if grad.shape != param.shape or grad.device != param.device:
                raise ValueError(f"{name}: got {_got(grad)}; want the shape and device of its parameter, {_got(param)}")
        checked.append([None if grad is None else grad.contiguous() for grad in of_level])
    return checked


def written(levels: list[UpdateLevel], step: int) -> list[Tensor]:
    """The tensors that this call writes; no two may share an element, which would get the value of either.

    Raises:
        ValueError: two do; the message names them.
    """
    found = [one for i, level in enumerate(levels) for one in _written_by(i, level, step)]
    spans = sorted((t.data_ptr(), t.numel() * t.element_size()) for _, t in found)
    if any(start + size > other for (start, size), (other, _) in pairwise(spans)):
        _name_overlap(found)
    return [tensor for _, tensor in found]


def _written_by(i: int, level: UpdateLevel, step: int) -> list[tuple[tuple[int, str, int], Tensor]]:
    """What is written of level ``i``, each with where it stands."""
    fields = ["accumulators"]
    if level.due(step):
        fields += ["params", "copies"]
        fields += ["first_moments"] if level.rule != "sgd" else []
        fields += ["second_moments"] if level.rule == "adam" else []
    return [
        ((i, field, j), tensor)
        for field in fields
        for j, tensor in enumerate(getattr(level, field) or ())
        if tensor is not None and tensor.numel()
    ]


def _name_overlap(written: list[tuple[tuple[int, str, int], Tensor]]) -> None:
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), where) for where, t in written)
    for (_, end, (i, field, j)), (start, _, (k, other, m)) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"levels[{k}].{other}[{m}]: got memory that levels[{i}].{field}[{j}] has too; "
                "want tensors that do not overlap"
            )
