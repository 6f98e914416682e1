"""Launches of the resident scan: one for any number of scans that do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton

from hope_kernels.backends.interface import ScanGradients
from hope_kernels.backends.triton import configurations, launch
from hope_kernels.backends.triton.configurations import Configuration
from hope_kernels.backends.triton.operands import Coefficients, encoded
from hope_kernels.backends.triton.resident_adjoint import FLOAT_PARTS, workspace_sizes
from hope_kernels.backends.triton.resident_backward import Results, backward_kernel, backward_levels_kernel
from hope_kernels.backends.triton.resident_forward import (
    Scratch,
    forward_kernel,
    forward_levels_kernel,
    read_kernel,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.backends.interface import ScanProblem
    from hope_kernels.backends.triton.operands import Plan

ForwardResult = tuple["Tensor", list["Tensor"], list["Tensor"], list["Tensor"]]
# Gradients of output, final weights and final momentum.
Upstream = tuple["Tensor | None", list["Tensor | None"], list["Tensor | None"]]


# Where the table has no configuration and the plan was asked for by name: it runs, spilling registers perhaps.
_UNLISTED = Configuration.of(block_hidden=16, num_warps=8)

# Whether one body can serve several chunk sizes: Triton 3.6 does not hand on a tuple of constants and run-time values.
OPEN_CHUNKS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
# Scans of one launch that have a body each, which takes some 15 seconds to compile; if there are more, they share.
MOST_BODIES = 3

# CUDA's limit of a grid's second dimension, along which reads have their sequences and heads.
MOST_READING_PROGRAMS = 65535


def _configuration(kernel: str, problem: ScanProblem) -> Configuration:
    device = configurations.device_of(problem.tokens)
    return configurations.choose(kernel, configurations.shape_class(problem), device) or _UNLISTED


def _plan(problem: ScanProblem, kernel: str) -> Plan:
    return launch.make_plan(problem, block_hidden=_configuration(kernel, problem)["block_hidden"])


def _options(kernel: str, problems: Sequence[ScanProblem]) -> dict[str, int]:
    """Options of a launch that several scans share: the most warps that one of them asks for."""
    return max((_configuration(kernel, problem).options for problem in problems), key=lambda o: o["num_warps"])


def _in_one_function(problems: Sequence[ScanProblem]) -> bool:
    """Whether a launch has the bodies of its scans in one function, or calls one for each.

    With several in one a pass of Triton's takes time that grows with the square of their number. But Triton cannot call
    functions that use the tensor memory of sm_100, and AMD's compiler has them save registers on the stack when they
    are entered and left: two scans are still one function there.
    """
    family, _, number = configurations.device_of(problems[0].tokens).architecture.partition("_")
    if family == "sm" and 100 <= int(number) < 120:
        return True
    return len(problems) <= (2 if family.startswith("gfx") else 1)


def _compiled_for(plans: tuple[Plan, ...], *, in_one_function: bool) -> tuple[tuple, ...]:
    """The last arguments of a launch: plans; where functions are called, before them the chunk sizes.

    Where there are many, plans of the smallest block leave the chunk size open: one body then serves them all. Called
    from several places, it has its arguments in registers, or on the stack where it lacks those.
    """
    if in_one_function:
        return (plans,)
    opens = OPEN_CHUNKS and len(plans) > MOST_BODIES
    chunks = tuple(encoded(plan.chunk) for plan in plans)
    return chunks, tuple(replace(plan, chunk=0) if opens and plan.block_chunk == 16 else plan for plan in plans)


def _scratch(problem: ScanProblem, plan: Plan) -> Scratch:
    tokens = problem.tokens
    programs = problem.sequence_count * plan.heads

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((programs, *shape), dtype=dtype, device=tokens.device)

    delta_rule = plan.rule == "dgd"
    return Scratch(
        empty(2, plan.block_chunk, plan.block_dim),
        empty(plan.block_chunk, plan.block_chunk) if delta_rule else None,
        empty(plan.block_chunk, plan.hidden, dtype=tokens.dtype) if delta_rule else None,
    )


def scan_forward(problem: ScanProblem, *, save: bool) -> ForwardResult:
    """As :meth:`hope_kernels.backends.interface.Backend.scan_forward` says, in one launch."""
    return scans_forward([problem], save=save)[0]


def scans_forward(problems: Sequence[ScanProblem], *, save: bool) -> list[ForwardResult]:
    """Scans that do not depend on each other: one launch for those that write, one for those that only read."""
    results = [launch.empty_results(problem, save=save) for problem in problems]
    present = [i for i, problem in enumerate(problems) if problem.sequence_count * problem.tokens.shape[2]]
    writing = [i for i in present if problems[i].k is not None]
    reading = [i for i in present if problems[i].k is None and problems[i].tokens.shape[1]]
    # A token's output must not depend on whether the call is long enough to write: reads take the forward's blocks.
    plans = {i: _plan(problems[i], "resident_forward") for i in writing}
    arguments = {i: launch.problem_arguments(problems[i]) for i in writing}
    programs = {i: problems[i].sequence_count * problems[i].tokens.shape[2] for i in present}

    def each(indices: list[int], of) -> tuple:
        return tuple(of(i) for i in indices)

    if writing:
        in_one_function = _in_one_function([problems[i] for i in writing])
        kernel = forward_kernel if in_one_function else forward_levels_kernel
        kernel[(sum(programs[i] for i in writing),)](
            each(writing, lambda i: arguments[i][0]),
            each(writing, lambda i: arguments[i][1]),
            each(writing, lambda i: launch.token_view(results[i][0])),
            each(writing, lambda i: (tuple(results[i][1]), tuple(results[i][2]))),
            each(writing, lambda i: _saved_states(problems[i], results[i][3])),
            each(writing, lambda i: _scratch(problems[i], plans[i])),
            *_compiled_for(each(writing, plans.__getitem__), in_one_function=in_one_function),
            **_options("resident_forward", [problems[i] for i in writing]),
        )
    if reading:
        reads = [(problems[i], results[i][0]) for i in reading]
        if sum(programs[i] for i in reading) <= MOST_READING_PROGRAMS:
            _read(reads)
        else:
            for problem, output in reads:
                for part in _read_parts(problem, output):
                    _read([part])
    return results


def _read(reads: Sequence[tuple[ScanProblem, Tensor]]) -> None:
    """Outputs of problems that only read, in one launch."""
    problems = [problem for problem, _ in reads]
    plans = [_plan(problem, "resident_forward") for problem in problems]
    described, sizes = zip(*map(launch.problem_arguments, problems), strict=True)
    blocks = max(
        triton.cdiv(problem.tokens.shape[1], plan.block_chunk) for problem, plan in zip(problems, plans, strict=True)
    )
    programs = sum(problem.sequence_count * plan.heads for problem, plan in zip(problems, plans, strict=True))
    read_kernel[(blocks, programs)](
        described,
        sizes,
        tuple(launch.token_view(output) for _, output in reads),
        tuple(plans),
        **_options("resident_forward", problems),
    )


def _read_parts(problem: ScanProblem, output: Tensor) -> Iterator[tuple[ScanProblem, Tensor]]:
    """A problem that only reads, in parts of as many sequences as one launch takes, each with where its output goes."""
    step = max(1, MOST_READING_PROGRAMS // problem.tokens.shape[2])
    for first in range(0, problem.sequence_count, step):
        part = slice(first, first + step)
        weights = tuple(w[part] if w.dim() == 4 else w for w in problem.weights)
        if problem.sequences is None:
            yield replace(problem, q=problem.tokens[part], weights=weights), output[part]
        else:
            yield replace(problem, sequences=problem.sequences[part], weights=weights), output


def _saved_states(problem: ScanProblem, saved: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """The saved states (weights, momentum); None where there are none."""
    if not saved or not saved[0].numel():
        return None
    count = len(problem.weights)
    tensors = [x.contiguous() for x in saved]
    return tuple(tensors[:count]), tuple(tensors[count:])


def scan_backward(
    problem: ScanProblem,
    saved: list[Tensor],
    grad_output: Tensor | None,
    grad_weights: list[Tensor | None],
    grad_momentum: list[Tensor | None],
) -> ScanGradients:
    """As :meth:`hope_kernels.backends.interface.Backend.scan_backward` says, in one launch."""
    return scans_backward([problem], [saved], [(grad_output, grad_weights, grad_momentum)])[0]


def scans_backward(
    problems: Sequence[ScanProblem], saved: Sequence[list[Tensor]], upstream: Sequence[Upstream]
) -> list[ScanGradients]:
    """Gradients of scans that do not depend on each other, in one launch.

    Memory beside the results, per sequence and head: K chunk states in the dtype of the tokens, a float32 one with
    16-bit tokens, and the intermediates of one chunk.
    """
    results = [_empty_gradients(problem) for problem in problems]
    present = [i for i, problem in enumerate(problems) if problem.sequence_count * problem.tokens.shape[2]]
    if not present:
        return [gradients for gradients, _ in results]
    plans = {i: _plan(problems[i], "resident_backward") for i in present}
    arguments = {i: launch.problem_arguments(problems[i]) for i in present}

    def each(of: Callable[[int], Any]) -> tuple:
        return tuple(of(i) for i in present)

    def final(i: int) -> tuple:
        """Views of the gradients of the final state; none where all are 0."""
        _, *gradients = upstream[i]
        if all(g is None for of in gradients for g in of):
            return ()
        # Triton 3.6 cannot compile tuples that hold None: an absent gradient is a single 0, read everywhere.
        zero = torch.zeros((), device=problems[i].tokens.device)
        return tuple(
            tuple(
                launch.matrix_view(zero.expand(like.shape) if g is None else g)
                for g, like in zip(of or [None] * len(states), states, strict=True)
            )
            for of, states in zip(gradients, (results[i][0].weights, results[i][1]), strict=True)
        )

    in_one_function = _in_one_function([problems[i] for i in present])
    kernel = backward_kernel if in_one_function else backward_levels_kernel
    kernel[(sum(problems[i].sequence_count * plans[i].heads for i in present),)](
        each(lambda i: arguments[i][0]),
        each(lambda i: arguments[i][1]),
        each(lambda i: _saved_states(problems[i], saved[i])),
        each(lambda i: launch.token_view(launch.readable(upstream[i][0]))),
        each(final),
        each(lambda i: _results(*results[i])),
        each(lambda i: _running_states(problems[i])),
        each(lambda i: _states(problems[i], problems[i].checkpoint_interval, problems[i].tokens.dtype)),
        each(lambda i: _workspace(problems[i], plans[i])),
        *_compiled_for(each(plans.__getitem__), in_one_function=in_one_function),
        **_options("resident_backward", [problems[i] for i in present]),
    )
    return [gradients for gradients, _ in results]


def _empty_gradients(problem: ScanProblem) -> tuple[ScanGradients, list[Tensor]]:
    """Uninitialised results, and the adjoint of the momentum, which has no initial value to be the gradient of if that
    is zero."""
    count = problem.sequence_count
    # The rows of a table's coefficients that no sequence uses keep gradient 0.
    make = torch.empty if problem.sequences is None else torch.zeros
    speeds = launch.empty_states(problem, count) if problem.has_momentum else []
    gradients = ScanGradients(
        *(launch.like_tokens(problem, x) for x in problem.token_tensors),
        *(None if x is None else make(x.shape, dtype=x.dtype, device=x.device) for x in problem.coefficients),
        weights=launch.empty_states(problem, count),
        momentum=speeds if problem.momentum else [],
    )
    return gradients, speeds


def _results(gradients: ScanGradients, speeds: list[Tensor]) -> Results:
    return Results(
        *(x if x is not None and x.numel() else None for x in gradients[:5]),
        Coefficients(*gradients[5:11]),
        tuple(gradients.weights),
        tuple(speeds),
    )


def _states(problem: ScanProblem, rows: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``rows`` uninitialised states (weights, momentum) per sequence and head."""
    count = problem.sequence_count * rows
    momentum = launch.empty_states(problem, count, dtype) if problem.has_momentum else []
    return tuple(launch.empty_states(problem, count, dtype)), tuple(momentum)


def _running_states(problem: ScanProblem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """The float32 state that slots of 16 bits are rounded from; float32 slots are their own."""
    return None if problem.tokens.dtype == torch.float32 else _states(problem, 1, torch.float32)


def _workspace(problem: ScanProblem, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Per program the intermediates of one chunk, those in float32 and those in the dtype of the tokens; its number."""
    tokens = problem.tokens
    programs = problem.sequence_count * plan.heads
    sizes = workspace_sizes(plan)
    floats, operands = sum(sizes[:FLOAT_PARTS]), sum(sizes[FLOAT_PARTS:])
    return (
        torch.empty((programs, floats), dtype=torch.float32, device=tokens.device),
        torch.empty((programs, operands), dtype=tokens.dtype, device=tokens.device),
        torch.empty(programs, dtype=torch.int32, device=tokens.device),
    )
