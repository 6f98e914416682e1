"""The compiled CPU engine: describes a problem to ``hope_kernels._core`` and allocates its results.

It works in the state dtype (float64 for float64 tokens, else float32), converts bfloat16 and float16 tokens as it loads
and stores them, and runs on as many threads as ``torch.get_num_threads()`` says. Results do not depend on that number,
bit for bit. Where the processor multiplies in bfloat16, the products of bfloat16 tokens do so from chunks of 8 on.
``docs/cpu.md`` says how it works.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from hope_kernels.backends.core_problem import (
    DTYPES,
    CoreProblem,
    checkpoint_shapes,
    last_chunk,
    read_arguments,
    readable,
)
from hope_kernels.backends.interface import BackendStatus, ScanGradients, ScanProblem, ScanRequest, build_info

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.memory.spec import MemorySpec
    from hope_kernels.optim.problem import UpdateProblem


def _missing_reason() -> str:
    advice = "install a C++17 compiler and reinstall hope_kernels (pip install --force-reinstall .)"
    info = build_info()
    if not info:
        return f"the compiled core hope_kernels._core is missing; {advice}"
    return f"the compiled core was not built: {info.get('reason') or 'no reason recorded'}; {advice}"


@cache
def _load() -> tuple[ModuleType | None, BackendStatus]:
    """The compiled module, or None, and what there is to say about it."""
    try:
        _core = import_module("hope_kernels._core")
    except ModuleNotFoundError:
        return None, BackendStatus("cpu", False, _missing_reason())
    except ImportError as error:
        return None, BackendStatus("cpu", False, f"the compiled core does not load: {error}")
    try:
        return _core, BackendStatus("cpu", True, f"compiled engine, {_core.isa()} instructions")
    except RuntimeError as error:
        return None, BackendStatus("cpu", False, str(error))


def status() -> BackendStatus:
    """Whether the compiled core is here, which instruction set it uses, or why it is not."""
    return _load()[1]


def core() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not there; the message says why.
    """
    module, state = _load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {state.reason}")
    return module


def refuses(request: ScanRequest) -> str | None:
    """None when this engine can run such calls, else the reason it cannot."""
    state = status()
    if not state:
        return state.reason
    if request.device.type != "cpu":
        return f"it needs CPU tensors, got {request.device}"
    if request.dtype not in DTYPES:
        return f"it takes float32, float64, bfloat16 or float16 tokens, got {request.dtype}"
    return None


def saved_shapes(problem: ScanProblem) -> list[tuple[int, ...]]:
    """Shapes of what the forward saves: checkpoints, then memory for the last segment where that is kept.

    Checkpoints are those of :func:`~hope_kernels.backends.core_problem.checkpoint_shapes`.

    The last segment is every chunk from the last checkpoint on: the forward leaves their states and intermediates,
    ``[S, N, elements]``, where they are few (``K <= 2``, at most four chunks, as large memories have them).
    """
    interval, size, dim = problem.checkpoint_interval, problem.chunk_size, problem.tokens.shape[3]
    shapes = checkpoint_shapes(problem)
    if problem.sequences is None and interval <= 2 and size <= 2 * dim:
        last_state = last_chunk(problem) if problem.q is not None else problem.chunks - 1
        matrices = [shape[2:] for shape in shapes] + _intermediates(problem)
        elements = sum(_padded(*matrix, problem) for matrix in matrices)
        shapes.append((problem.sequence_count, problem.tokens.shape[2], last_state % interval * elements))
    return shapes


def _intermediates(problem: ScanProblem) -> list[tuple[int, int]]:
    """Rows and columns of what the engine keeps of a chunk: ``Kept`` in the core."""
    spec, keys, dim = problem.spec, problem.chunk_size, problem.tokens.shape[3]
    rows = (3 if spec.objective == "self" else 2) * keys  # keys, values of `self`, queries
    delta = spec.rule == "dgd"
    kept = [(keys, dim)] * (2 if delta else 1)  # delta, product
    if spec.form == "linear":
        return kept
    hidden = problem.weights[0].shape[-1]
    kept += [(rows, hidden)] * (3 if delta else 2) + [(keys, hidden)] * 2  # hidden, act', z; act'', error_hidden
    return kept + ([(rows, hidden)] * 2 if spec.form == "glu" else [])  # up, gate


def _padded(rows: int, columns: int, problem: ScanProblem) -> int:
    """Elements of a matrix in the core's layout, whatever its instruction set: columns in whole panels of 256 bytes."""
    panel = 256 // problem.state_dtype.itemsize
    return rows * ((columns + panel - 1) // panel * panel)


def scan_forward(problem: ScanProblem, *, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Output ``[B, T, N, D]``, final weights, final momentum and what :func:`saved_shapes` says.

    As :meth:`hope_kernels.backends.interface.Backend.scan_forward` says. Scratch is one state and one chunk of
    activations per thread.
    """
    module = core()
    described = CoreProblem(problem)
    results, arguments = described.forward_results(saved_shapes(problem) if save else [])
    if described.sequence_count:  # empty tensors have no address, and there is nothing to do
        module.scan_forward(*described.arguments, arguments, torch.get_num_threads())
    return results


def read(q: Tensor, weights: tuple[Tensor, ...], spec: MemorySpec, chunk_size: int) -> Tensor:
    """``f_W(q)`` ``[B, T, N, D]``: what :func:`scan_forward` makes of such a problem, in half of Python's time.

    For plain CPU tensors without gradients. ``chunk_size`` is that of the stream: it tells how products round.
    """
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.shape[0]:
        q = readable(q)
        core().scan_forward(*read_arguments(q, weights, spec, chunk_size, output), torch.get_num_threads())
    return output


def scan_backward(
    problem: ScanProblem,
    saved: list[Tensor],
    grad_output: Tensor | None,
    grad_weights: list[Tensor | None],
    grad_momentum: list[Tensor | None],
) -> ScanGradients:
    """Gradients of a scan, as :meth:`hope_kernels.backends.interface.Backend.scan_backward` says.

    Rebuilds the chunk states of one segment of ``checkpoint_interval`` chunks at a time from its checkpoint (those of
    the last segment may be saved) and walks its chunks in reverse: scratch per thread is that many states and one
    chunk of activations. A chunk that no gradient reaches through what it wrote is only read.
    """
    module = core()
    described = CoreProblem(problem)
    saved = [x.contiguous() for x in saved]
    grad_output = readable(grad_output)
    results, arguments = described.gradients()
    if described.sequence_count:
        upstream = described.upstream(saved, grad_output, grad_weights, grad_momentum)
        module.scan_backward(*described.arguments, upstream, arguments, torch.get_num_threads())
    return results


def refuses_level_update(device: torch.device) -> str | None:
    """None when an update of tensors on ``device`` can run, else the reason it cannot."""
    state = status()
    if not state:
        return state.reason
    return None if device.type == "cpu" else f"it needs CPU tensors, got {device}"


def level_update(problem: UpdateProblem) -> Tensor:
    """Updates in place and returns the norms ``[levels]``, as ``hope_kernels.optim`` says."""
    module = core()
    norms = torch.empty(len(problem.levels))
    module.level_update(
        *problem.tables(), problem.grad_scale, problem.max_norm or 0.0, norms.data_ptr(), torch.get_num_threads()
    )
    return norms
