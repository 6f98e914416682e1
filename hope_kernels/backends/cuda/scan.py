"""Chunked scans on the CUDA engine: what it takes, and a problem and its results as the kernels get them.

What the kernels compute they say themselves (``supports_forward`` in ``csrc/cuda/scan.h``): here they are only asked.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from hope_kernels.backends.core_problem import (
    DTYPES,
    CoreProblem,
    ForwardResults,
    checkpoint_shapes,
    pointers,
    readable,
)
from hope_kernels.backends.cuda import runtime
from hope_kernels.backends.interface import BackendStatus, ScanGradients, ScanProblem, ScanRequest

if TYPE_CHECKING:
    from torch import Tensor


def status() -> BackendStatus:
    """Whether scans can run on the current GPU, or why not."""
    state = runtime.built()
    if not state:
        return state
    if (reason := runtime.no_device()) is not None:
        return BackendStatus("cuda", False, f"{state.reason}, but {reason}")
    device = runtime.current_device()
    if (reason := runtime.device_refused(runtime.loaded(), device)) is not None:
        return BackendStatus("cuda", False, reason)
    return BackendStatus("cuda", True, f"{state.reason}, on {runtime.name_of(device)}")


def refuses(request: ScanRequest) -> str | None:
    """None when this engine can run such calls, else the reason it cannot."""
    core = runtime.load()
    if isinstance(core, str):
        return core
    if (reason := runtime.device_refused(core, request.device)) is not None:
        return reason
    if request.dtype not in DTYPES:
        return f"it takes bfloat16 or float16 tokens, got {request.dtype}"
    return _refusal(core, request, _device(core, request.device))


def _device(core: ModuleType, device: torch.device) -> tuple[int, int]:
    """Architecture and shared memory of a block."""
    with runtime.on_device(device):
        return core.cuda_device(runtime.number(device))


@lru_cache(maxsize=1024)
def _refusal(core: ModuleType, request: ScanRequest, device: tuple[int, int]) -> str | None:
    example = CoreProblem(_example(request))
    reads, writes = request.operation != "write", request.operation != "read"
    # The kernels look at which results are wanted, never at where they lie.
    output = example.tokens[0] if reads else None
    states = pointers(list(example.problem.weights)) if writes else ()
    momentum = states if request.momentum else ()
    saved = (states, momentum, None) if request.gradients else ((), (), None)
    reason = core.cuda_forward_refusal(*example.arguments, (output, states, momentum, *saved), device)
    if reason is not None or not request.gradients:
        return reason
    given = (*saved, output, example.states[0] if writes else (), example.states[0] if momentum else ())
    results = (*example.tokens, *example.coefficients, states, ())
    return core.cuda_backward_refusal(*example.arguments, given, results, device)


def _example(request: ScanRequest) -> ScanProblem:
    """The least problem of a request; of one chunk, in which every token is the same memory."""
    reads, writes = request.operation != "write", request.operation != "read"
    token = torch.empty(request.dim, dtype=request.dtype).expand(1, request.chunk_size, request.heads, -1)
    number = torch.empty(1)
    shapes = request.spec.weight_shapes(request.dim, request.hidden)
    per_token = number if writes else None
    delta = request.spec.rule == "dgd"
    return ScanProblem(
        q=token if reads else None,
        k=token if writes else None,
        v=token if writes else None,
        pending_k=None,
        pending_v=None,
        step=per_token,
        retention=per_token if request.retention and delta else None,
        decay=per_token if request.retention and not delta else None,
        momentum_step=per_token if request.momentum else None,
        momentum_carry=per_token if request.momentum else None,
        momentum_decay=per_token if request.momentum else None,
        weights=tuple(number.expand(request.heads, *shape) for shape in shapes),
        momentum=(),
        sequences=torch.zeros(1, 6, dtype=torch.int64) if request.table else None,
        spec=request.spec,
        chunk_size=request.chunk_size,
        chunks=1 if writes else 0,
        first_chunk=0,
        bptt_chunks=0,
    )


def saved_shapes(problem: ScanProblem) -> list[tuple[int, ...]]:
    """Shapes of what the forward saves: :func:`~hope_kernels.backends.core_problem.checkpoint_shapes`."""
    return checkpoint_shapes(problem)


def scan_forward(problem: ScanProblem, *, save: bool) -> ForwardResults:
    """Output ``[B, T, N, D]``, final weights, final momentum and what :func:`saved_shapes` says.

    As :meth:`hope_kernels.backends.interface.Backend.scan_forward` says; started on the current stream.

    Raises:
        RuntimeError: the kernels do not compute this on this device; the message says why.
    """
    core = runtime.loaded()
    described = CoreProblem(problem)
    results, arguments = described.forward_results(saved_shapes(problem) if save else [])
    if described.sequence_count == 0:  # empty tensors have no address, and there is nothing to do
        return results
    device = described.device
    with runtime.on_device(device):
        number = runtime.number(device)
        known = core.cuda_device(number)
        workspace = _workspace(core.cuda_forward_workspace(*described.arguments), device)
        core.cuda_scan_forward(
            *described.arguments, arguments, known, workspace.data_ptr(), number, runtime.stream(device)
        )
    # Memory is given to nobody else before the kernel has run: the allocator orders its uses along the stream.
    return results


def scan_backward(
    problem: ScanProblem,
    saved: list[Tensor],
    grad_output: Tensor | None,
    grad_weights: list[Tensor | None],
    grad_momentum: list[Tensor | None],
) -> ScanGradients:
    """Gradients of a scan, as :meth:`hope_kernels.backends.interface.Backend.scan_backward` says.

    Raises:
        RuntimeError: as :func:`scan_forward`.
    """
    core = runtime.loaded()
    described = CoreProblem(problem)
    saved = [x.contiguous() for x in saved]
    grad_output = readable(grad_output)
    results, arguments = described.gradients()
    if described.sequence_count == 0:
        return results
    device = described.device
    whole = (*described.arguments, described.upstream(saved, grad_output, grad_weights, grad_momentum), arguments)
    with runtime.on_device(device):
        number = runtime.number(device)
        known = core.cuda_device(number)
        workspace = _workspace(core.cuda_backward_workspace(*whole, known), device)
        core.cuda_scan_backward(*whole, known, workspace.data_ptr(), number, runtime.stream(device))
    return results


def _workspace(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
