"""Checks every public function makes before anything is computed.

Each error names the argument, says what came and what is wanted. Shapes, dtypes and devices are always checked;
values only where that costs no synchronisation: on CPU tensors, and on a GPU under ``HOPE_KERNELS_DEBUG=1``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hope_kernels.memory.spec import MemorySpec
from hope_kernels.memory.state import PENDING, MemoryState, Weights, state_dtype

_RANGE_SLACK = 1e-3
TOKEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _got(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}, {x.dtype}, on {x.device}"
    return f"{x!r} ({type(x).__name__})"


def check_spec(spec: Any) -> None:
    if not isinstance(spec, MemorySpec):
        raise TypeError(f"spec: got {_got(spec)}; want a MemorySpec")


def check_positive(name: str, value: Any) -> None:
    """A Python int (or a symbolic one) of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: got {_got(value)}; want a positive int")
    if not 1 <= value < 2**63:
        raise ValueError(f"{name}: got {value}; want a positive int below 2^63")


def check_chunk_size(chunk_size: Any) -> None:
    check_positive("chunk_size", chunk_size)


def check_batch_size(batch_size: Any, weights: Weights) -> int | None:
    """The batch size of an initial state: given, or told by per-sequence weights, or None."""
    told = weights[0].shape[0] if weights[0].dim() == 4 else None
    if batch_size is None:
        return told
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | torch.SymInt):
        raise TypeError(f"batch_size: got {_got(batch_size)}; want an int or None")
    if batch_size < 0 or (told is not None and told != batch_size):
        raise ValueError(f"batch_size: got {batch_size}; want {'a non-negative int' if told is None else told}")
    return batch_size


def check_weights(name: str, weights: Any, spec: MemorySpec, like: Weights | None = None) -> Weights:
    """A tuple of one tensor per weight of ``spec``, of shapes that fit together (and ``like``, for momentum)."""
    names = ", ".join(spec.weight_names)
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"{name}: got {_got(weights)}; want a tuple of tensors ({names}) or a MemoryState")
    weights = tuple(weights)
    if len(weights) != spec.weight_count:
        raise ValueError(f"{name}: got {len(weights)} tensors; form {spec.form!r} wants {spec.weight_count} ({names})")
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}[{i}]: got {_got(weight)}; want a tensor")
        if weight.dim() not in (3, 4) or weight.dim() != weights[0].dim():
            raise ValueError(
                f"{name}[{i}]: got {_got(weight)}; want [heads, in, out] or [batch, heads, in, out], the same for all"
            )
        if weight.dtype not in TOKEN_DTYPES:
            raise TypeError(f"{name}[{i}]: got {_got(weight)}; want float32 or the dtype of q")
        if weight.dtype != weights[0].dtype or weight.device != weights[0].device:
            raise (TypeError if weight.dtype != weights[0].dtype else ValueError)(
                f"{name}[{i}]: got {_got(weight)}; want the dtype and device of {name}[0], "
                f"{weights[0].dtype} on {weights[0].device}"
            )
    dim = weights[0].shape[-2]
    hidden = weights[0].shape[-1]
    lead = weights[0].shape[:-2]
    for i, (weight, shape) in enumerate(zip(weights, spec.weight_shapes(dim, hidden), strict=True)):
        if tuple(weight.shape) != (*lead, *shape):
            raise ValueError(f"{name}[{i}] ({spec.weight_names[i]}): got {_got(weight)}; want shape {(*lead, *shape)}")
    if min(*lead[-1:], dim, hidden) < 1:
        raise ValueError(f"{name}[0]: got {_got(weights[0])}; want at least one head, input and output")
    if like is not None:
        for i, (m, w) in enumerate(zip(weights, like, strict=True)):
            other_batch = m.dim() == w.dim() == 4 and m.shape[0] != w.shape[0]
            if m.shape[-3:] != w.shape[-3:] or other_batch or m.device != w.device:
                raise ValueError(f"{name}[{i}]: got {_got(m)}; want the shape and device of its weight, {_got(w)}")
            if m.dtype != state_dtype(m.dtype):
                raise TypeError(f"{name}[{i}]: got {_got(m)}; want float32 (float64 for float64 tokens)")
    return weights


def check_tokens(named: dict[str, Tensor]) -> Tensor:
    """Token tensors ``[B, T, N, D]`` of one shape, dtype and device; returns the first."""
    first_name, first = next(iter(named.items()))
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {_got(x)}; want a tensor [batch, tokens, heads, dim]")
        if x.dtype not in TOKEN_DTYPES:
            raise TypeError(f"{name}: got {_got(x)}; want float32, bfloat16, float16 or float64")
        if x.dim() != 4:
            raise ValueError(f"{name}: got {_got(x)}; want [batch, tokens, heads, dim]")
        if min(x.shape[2:]) < 1:
            raise ValueError(f"{name}: got {_got(x)}; want at least one head and one feature")
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: got {_got(x)}; want the dtype of {first_name}, {first.dtype}")
        if x.shape != first.shape:
            raise ValueError(f"{name}: got {_got(x)}; want the shape of {first_name}, {tuple(first.shape)}")
        if x.device != first.device:
            raise ValueError(f"{name}: got {_got(x)}; want the device of {first_name}, {first.device}")
    return first


def check_gate(name: str, gate: Any, tokens: Tensor) -> None:
    """A gate ``[B, T, N]`` in the state dtype, on the device of the tokens."""
    if not isinstance(gate, Tensor):
        raise TypeError(f"{name}: got {_got(gate)}; want a tensor [batch, tokens, heads]")
    shape, dtype = tuple(tokens.shape[:3]), state_dtype(tokens.dtype)
    if tuple(gate.shape) != shape:
        raise ValueError(f"{name}: got {_got(gate)}; want shape [batch, tokens, heads] = {shape}")
    if gate.dtype != dtype:
        raise TypeError(f"{name}: got {_got(gate)}; want {dtype} with tokens of {tokens.dtype}")
    if gate.device != tokens.device:
        raise ValueError(f"{name}: got {_got(gate)}; want the device of the tokens, {tokens.device}")


def check_gates(spec: MemorySpec, lr: Any, retention: Any, momentum: Any, tokens: Tensor) -> None:
    """All of the gates but their values."""
    check_gate("lr", lr, tokens)
    if retention is not None:
        check_gate("retention", retention, tokens)
    if momentum is not None:
        if spec.rule == "dgd":
            raise ValueError("momentum: got a gate with rule 'dgd'; delta gradient descent has no momentum: pass None")
        check_gate("momentum", momentum, tokens)


def check_gate_values(spec: MemorySpec, lr: Tensor, retention: Tensor | None, momentum: Tensor | None) -> None:
    if spec.rule == "dgd":  # a proximal step backwards has a pole; `gd` holds for any sign
        _check_range("lr", lr, 0.0, math.inf)
    if retention is not None:
        _check_range("retention", retention, 0.0, 1.0)
    if momentum is not None:
        _check_range("momentum", momentum, 0.0, 1.0)


def check_memory_fits(weights: Weights, momentum: Weights | None, spec: MemorySpec, tokens: Tensor, rows: int) -> None:
    """Weights and momentum against the tokens they meet: heads, features, batch, dtype, device."""
    heads, dim = tokens.shape[2:]
    for name, tensors in (("memory", weights), ("memory's momentum", momentum or ())):
        for i, weight in enumerate(tensors):
            want = f"{spec.weight_names[i]} for {heads} heads of {dim} features, on {tokens.device}"
            if weight.shape[-3] != heads or weight.device != tokens.device:
                raise ValueError(f"{name}[{i}]: got {_got(weight)}; want {want}")
            if weight.dim() == 4 and weight.shape[0] != rows:
                raise ValueError(f"{name}[{i}]: got {_got(weight)}; want {rows} sequences, or [heads, in, out]")
        if tensors and tensors[0].shape[-2] != dim:
            raise ValueError(f"{name}[0]: got {_got(tensors[0])}; want {spec.weight_names[0]} for {dim} features")
    allowed = (torch.float32, tokens.dtype)
    if weights[0].dtype not in allowed:
        raise TypeError(f"memory: got weights of {weights[0].dtype}; want float32 or the dtype of q, {tokens.dtype}")
    if momentum is not None and momentum[0].dtype != state_dtype(tokens.dtype):
        raise TypeError(
            f"memory: got momentum of {momentum[0].dtype}; want {state_dtype(tokens.dtype)} with tokens of "
            f"{tokens.dtype}"
        )


def check_state(state: MemoryState, spec: MemorySpec, chunk_size: int | None, tokens: Tensor, rows: int) -> None:
    """A carried state against the call it meets; ``chunk_size`` is None for a call that only reads."""
    if state.spec != spec:
        raise ValueError(f"memory: got a state of {state.spec}; want one of the call's spec, {spec}")
    if state.batch_size is not None and state.batch_size != rows:
        raise ValueError(f"memory: got a state of {state.batch_size} sequences; want {rows}")
    held, want = state.stored_weights[0].dtype, state_dtype(tokens.dtype)
    written = state.factors is None and (state.has_row_positions or state.chunk_index > 0)
    if held != want and (written or held not in (torch.float32, tokens.dtype)):
        raise ValueError(f"memory: got a state of {held}; want {want} with tokens of {tokens.dtype}")
    kept = None if state.factors is None else state.factors.inputs[0].dtype
    if kept not in (None, tokens.dtype):
        raise ValueError(f"memory: got a factored state of {kept} tokens; want {tokens.dtype}, the dtype of q")
    check_memory_fits(state.stored_weights, state.stored_momentum, spec, tokens, rows)
    if chunk_size is None:
        return
    pending = state.pending_k is not None
    if pending and state.chunk_size != chunk_size:
        raise ValueError(
            f"chunk_size: got {chunk_size}, but the state has tokens pending in a chunk of {state.chunk_size}; "
            f"want {state.chunk_size}"
        )
    if pending and state.pending_k.dtype != tokens.dtype:
        raise ValueError(
            f"memory: got a state with pending tokens of {state.pending_k.dtype}; want {tokens.dtype}, the dtype of q"
        )
    if pending and state.pending_k.device != tokens.device:
        raise ValueError(f"memory: got a state with pending tokens on {state.pending_k.device}; want {tokens.device}")


def check_indices(indices: Any, rows: int | None, device: torch.device) -> Tensor:
    """Row numbers as an int64 tensor on ``device``; in range, where looking is free and ``rows`` is known."""
    empty = isinstance(indices, Sequence) and not len(indices)
    indices = torch.as_tensor(indices, device=device, dtype=torch.long if empty else None)
    if indices.dim() != 1 or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"indices: got {_got(indices)}; want a 1-D tensor of integers")
    if rows is not None and indices.numel() and _values_at_hand(indices):
        least, most = (bound.item() for bound in indices.aminmax())
        if least < 0 or most >= rows:
            raise IndexError(f"indices: got values from {least} to {most}; want all in [0, {rows - 1}]")
    return indices.long()


def without_empty_pending(state: MemoryState) -> MemoryState:
    """``state`` without its pending storage when rows differ in position but none has a token pending.

    Whether that is so is looked at where looking is free; elsewhere the state counts as having tokens pending.
    """
    if not state.has_row_positions or state.pending_k is None or not _values_at_hand(state.pending_count):
        return state
    if bool(state.pending_count.any()):
        return state
    return replace(state, **dict.fromkeys(PENDING))


def check_stream_gates(state: MemoryState, retention: Tensor | None, momentum: Tensor | None) -> None:
    """A gate given in one call of a stream must be given in all of them."""
    for name, before, now in (
        ("retention", state.has_retention, retention is not None),
        ("momentum", state.has_momentum, momentum is not None),
    ):
        if before is not None and before != now:
            came, want = ("a gate", "None") if now else ("None", "a gate")
            raise ValueError(f"{name}: got {came}, but the state was made with {want}; want the same in every call")


def check_cu_seqlens(cu_seqlens: Any, tokens: Tensor) -> None:
    """``[S + 1]`` int32 or int64, 0 first, non-decreasing, the number of tokens last; needs a batch of 1."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got {_got(cu_seqlens)}; want an int32 or int64 tensor [sequences + 1]")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: got {_got(cu_seqlens)}; want shape [sequences + 1]")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"cu_seqlens: got {_got(cu_seqlens)}; want the device of q, {tokens.device}")
    if tokens.shape[0] != 1:
        raise ValueError(f"cu_seqlens: got a batch of {tokens.shape[0]}; packed sequences want a batch of 1")
    if _values_at_hand(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens.shape[1] or any(a > b for a, b in pairwise(ends)):
            raise ValueError(
                f"cu_seqlens: got {ends}; want 0 first, no decrease, and the number of tokens, {tokens.shape[1]}, last"
            )


def check_valid(valid: Any, tokens: Tensor) -> None:
    """``[B, 2]`` int32 or int64: first and one past the last real token of each row."""
    if not isinstance(valid, Tensor) or valid.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"valid: got {_got(valid)}; want an int32 tensor [batch, 2]")
    if tuple(valid.shape) != (tokens.shape[0], 2):
        raise ValueError(f"valid: got {_got(valid)}; want shape [batch, 2] = {(tokens.shape[0], 2)}")
    if valid.device != tokens.device:
        raise ValueError(f"valid: got {_got(valid)}; want the device of q, {tokens.device}")
    if _values_at_hand(valid):
        for row, (first, last) in enumerate(valid.tolist()):
            if not 0 <= first <= last <= tokens.shape[1]:
                raise ValueError(
                    f"valid: got [{first}, {last}] in row {row}; want 0 <= first <= one-past-last <= {tokens.shape[1]}"
                )


def _debug() -> bool:
    return os.environ.get("HOPE_KERNELS_DEBUG", "0") not in ("", "0")


def _values_at_hand(x: Tensor) -> bool:
    """Whether looking at values neither synchronises nor breaks a trace."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.device.type == "cpu" or _debug()


def _check_range(name: str, x: Tensor, low: float, high: float) -> None:
    """Values in ``[low, high]``, with room for a finite-difference probe at a bound.

    NaN and inf pass: in one sequence they are that sequence's affair and must not stop the others.
    """
    if not x.numel() or not _values_at_hand(x):
        return
    if x.requires_grad:
        x = x.detach()
    least, most = (bound.item() for bound in x.aminmax())
    if -math.inf < least < low - _RANGE_SLACK or high + _RANGE_SLACK < most < math.inf:
        raise ValueError(f"{name}: got values from {least} to {most}; want all in [{low:g}, {high:g}]")
