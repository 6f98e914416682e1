"""Launches of the tiled scan: a fixed number of kernels per chunk, each a product over all sequences and heads.

For chunks or tokens that one program cannot hold. The host walks the chunks; how many a sequence of a packed table has
is known to the device only, so it walks to the bound that the host knows and programs without work leave at once.
Nothing waits for the device.

Scratch: the activations of one chunk (the backward has about a dozen such matrices) and, in the backward, the states of
at most K chunks, K the checkpoint interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from triton import cdiv

from hope_kernels.backends.interface import ScanGradients
from hope_kernels.backends.triton import launch
from hope_kernels.backends.triton.tiled_chunk import ChunkScan, States, fixed_view
from hope_kernels.backends.triton.tiled_chunk_adjoint import ChunkAdjoint
from hope_kernels.backends.triton.tiled_products import Sections

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.backends.interface import ScanProblem
    from hope_kernels.backends.triton.operands import MatrixView


def scan_forward(problem: ScanProblem, *, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """As :meth:`hope_kernels.backends.interface.Backend.scan_forward` says; launches per chunk are fixed."""
    result = launch.empty_results(problem, save=save)
    output, weights, momentum, saved = result
    if problem.q is None:
        output = None
    _fill(weights, problem.weights)
    _fill(momentum, problem.momentum)
    if _is_empty(problem):
        return result

    sections = _sections(problem, reads=output is not None, share=True)
    scan = ChunkScan(problem, sections)
    if problem.k is None:
        read = _matrices(_operands(problem, problem.weights))
        for chunk in range(cdiv(problem.tokens.shape[1], scan.chunk)):
            scan.read_chunk(chunk, read, sections, output)
        return result

    operands = _operands(problem, weights)
    read = _matrices(operands)
    state = _views(weights, momentum)
    copies = States(_copies(weights, operands), (None,) * len(momentum))
    most = _most_chunks(problem)
    for chunk in range(most):
        if chunk and chunk % problem.checkpoint_interval == 0:
            scan.checkpoint(chunk, saved, state, copies, save=True)
        scan.read_chunk(chunk, read, sections, output)
        scan.write_chunk(chunk, state, state, copies)
    if most and most % problem.checkpoint_interval == 0:
        scan.checkpoint(most, saved, state, copies, save=True)
    if output is not None and most * scan.chunk < _most_tokens(problem):
        # Queries behind the last complete chunk; with a table, of those sequences that have the most.
        tail = sections if sections.shared else Sections(0, 0, 1)
        scan.read_chunk(most, read, tail, output)
    return result


def scan_backward(
    problem: ScanProblem,
    saved: list[Tensor],
    grad_output: Tensor | None,
    grad_weights: list[Tensor | None],
    grad_momentum: list[Tensor | None],
) -> ScanGradients:
    """As :meth:`hope_kernels.backends.interface.Backend.scan_backward` says; launches per chunk are fixed."""
    gradients = _empty_gradients(problem)
    _fill(gradients.weights, grad_weights)
    _fill(gradients.momentum, grad_momentum)
    result = gradients if problem.momentum else gradients._replace(momentum=[])
    reads = problem.q is not None and grad_output is not None
    sections = _sections(problem, reads=reads, share=False)
    if _is_empty(problem) or sections.count == 0:
        return result

    walk = ChunkAdjoint(problem, sections, gradients, grad_output if reads else None)
    adjoint = _views(gradients.weights, gradients.momentum)
    copies = States(*(_copies(x, _operands(problem, x)) for x in (gradients.weights, gradients.momentum)))
    if problem.k is None:
        read = _matrices(_operands(problem, problem.weights))
        for chunk in reversed(range(cdiv(problem.tokens.shape[1], walk.chunk))):
            walk.chunk_adjoint(chunk, read, States(read, ()), adjoint, copies, sections)
        return result

    most, interval = _most_chunks(problem), problem.checkpoint_interval
    end = most if reads and most * walk.chunk < _most_tokens(problem) else most - 1
    if end < most and problem.bptt_chunks and most:
        walk.state_adjoint(most, adjoint, adjoint, copies, Sections(0, 0, 0))
    if end < 0:
        return result
    slots = _Slots(problem, min(interval, end + 1))
    tail = Sections(0, 0, sections.queries)
    for segment in reversed(range(end // interval + 1)):
        first = segment * interval
        last = min(first + interval - 1, end)
        slots.rebuild(walk, first, last, saved, replace(sections, queries=0))
        for chunk in reversed(range(first, last + 1)):
            slot = slots.views[chunk - first]
            walk.chunk_adjoint(chunk, slot.weights, slot, adjoint, copies, sections if chunk < most else tail)
    return result


def scans_forward(
    problems: Sequence[ScanProblem], *, save: bool
) -> list[tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]]:
    """Scans that do not depend on one another, one after the other: each of them fills the GPU."""
    return [scan_forward(problem, save=save) for problem in problems]


def scans_backward(
    problems: Sequence[ScanProblem],
    saved: Sequence[list[Tensor]],
    upstream: Sequence[tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]],
) -> list[ScanGradients]:
    """Their gradients, likewise."""
    return [
        scan_backward(problem, kept, *gradients)
        for problem, kept, gradients in zip(problems, saved, upstream, strict=True)
    ]


class _Slots:
    """States at the starts of a segment's chunks, as products read them: in the dtype of the tokens."""

    def __init__(self, problem: ScanProblem, count: int):
        self.problem = problem
        self.first = _states(problem, problem.tokens.dtype)
        self.views = [_views(*self.first), *(_views(*_states(problem, problem.tokens.dtype)) for _ in range(count - 1))]
        # The float32 state that runs through the segment, where slots are rounded copies of it.
        self.running = None if problem.tokens.dtype == torch.float32 else _states(problem, torch.float32)

    def rebuild(self, walk: ChunkAdjoint, first: int, last: int, saved: list[Tensor], sections: Sections) -> None:
        """Fills the slots of chunks ``first .. last`` from the checkpoint at ``first`` (the initial state at 0)."""
        views, nothing = self.views, States(*((None,) * len(x) for x in self.views[0]))
        state = None if self.running is None else _views(*self.running)
        if first == 0:
            for weights, momentum in [self.first, *([] if self.running is None else [self.running])]:
                _fill(weights, self.problem.weights)
                _fill(momentum, self.problem.momentum)
        else:
            walk.checkpoint(first, saved, *((views[0], nothing) if state is None else (state, views[0])), save=False)
        for i in range(last - first):
            walk.read_chunk(first + i, views[i].weights, sections, None)
            matrices = (views[i], views[i + 1], nothing) if state is None else (state, state, views[i + 1])
            walk.write_chunk(first + i, *matrices)


# ---- sizes and states ------------------------------------------------------------------------------------------------


def _is_empty(problem: ScanProblem) -> bool:
    """Whether there is no sequence, token or head."""
    return problem.sequence_count * problem.tokens.shape[1] * problem.tokens.shape[2] == 0


def _most_chunks(problem: ScanProblem) -> int:
    """A bound of the complete chunks of any sequence."""
    if problem.k is None or problem.tokens.shape[1] == 0:
        return 0
    return min(problem.chunks, _most_tokens(problem) // problem.chunk_size)


def _most_tokens(problem: ScanProblem) -> int:
    """A bound of the tokens of any sequence."""
    return problem.tokens.shape[1] + (0 if problem.pending_k is None else problem.pending_k.shape[1])


def _sections(problem: ScanProblem, *, reads: bool, share: bool) -> Sections:
    writes = problem.k is not None
    shared = share and reads and writes and launch.same_view(problem.q, problem.k)
    return Sections(
        keys=int(writes),
        values=int(writes and problem.spec.objective == "self"),
        queries=int(reads and not shared),
        shared=shared,
    )


def _states(problem: ScanProblem, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momentum of every sequence, uninitialised."""
    count = problem.sequence_count
    momentum = launch.empty_states(problem, count, dtype) if problem.has_momentum else []
    return launch.empty_states(problem, count, dtype), momentum


def _views(weights: Sequence[Tensor], momentum: Sequence[Tensor]) -> States:
    return States(_matrices(weights), _matrices(momentum))


def _matrices(tensors: Sequence[Tensor]) -> tuple[MatrixView, ...]:
    return tuple(map(fixed_view, tensors))


def _operands(problem: ScanProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What products read of these matrices: themselves, or copies in the dtype of the tokens."""
    return [x.to(problem.tokens.dtype) for x in tensors]


def _copies(states: Sequence[Tensor], operands: Sequence[Tensor]) -> tuple[MatrixView | None, ...]:
    """Views of operands that are not the states themselves."""
    return tuple(None if x is y else fixed_view(y) for x, y in zip(states, operands, strict=True))


def _fill(tensors: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Copies ``values`` (shared ones to all sequences); without a value, zeros."""
    for i, tensor in enumerate(tensors):
        value = values[i] if i < len(values) else None
        if value is None:
            tensor.zero_()
        else:
            tensor.copy_(value)


def _empty_gradients(problem: ScanProblem) -> ScanGradients:
    """Zeros: what no kernel reaches (tokens behind the last complete chunk, rows of a table that are not used)."""

    def zeros(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device)

    weights, momentum = _states(problem)
    inputs = (*problem.token_tensors, *problem.coefficients)
    return ScanGradients(*map(zeros, inputs), weights=weights, momentum=momentum)
