"""From tensors to kernel arguments: views, sizes and plans of a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from triton import next_power_of_2

from hope_kernels.backends.triton import configurations
from hope_kernels.backends.triton.operands import Coefficients, MatrixView, Plan, Problem, Sizes, TokenView, encoded

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.backends.interface import ScanProblem

OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def readable(x: Tensor | None) -> Tensor | None:
    """``x`` with a contiguous last dimension: copied if it is not."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def token_view(x: Tensor | None) -> TokenView | None:
    """View of ``[rows, tokens, heads, D]``; None where there is nothing to address."""
    return None if x is None or x.numel() == 0 else TokenView(x, *x.stride()[:3])


def matrix_view(x: Tensor) -> MatrixView:
    """View of ``[S, heads, in, out]``, or of ``[heads, in, out]`` shared by all sequences."""
    # Inside a matrix the resident kernels count in 32 bits: one whose rows or columns reach farther is copied.
    if sum((size - 1) * stride for size, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True)) >= 2**31:
        x = x.contiguous()
    return MatrixView(x, *(x.stride() if x.dim() == 4 else (0, *x.stride())))


def matrix_views(tensors: list[Tensor] | tuple[Tensor, ...]) -> tuple[MatrixView, ...]:
    return tuple(matrix_view(x) for x in tensors)


def problem_arguments(problem: ScanProblem) -> tuple[Problem, Sizes]:
    """The kernel's description of ``problem``. Tensors that had to be copied live as long as the result."""
    tokens = [token_view(readable(x)) for x in problem.token_tensors]
    described = Problem(
        *tokens,
        Coefficients(*(None if x is None else x.contiguous() for x in problem.coefficients)),
        matrix_views(problem.weights),
        matrix_views(problem.momentum),
        None if problem.sequences is None else problem.sequences.contiguous(),
    )
    batch, length = problem.tokens.shape[:2]
    sizes = Sizes(
        sequences=encoded(problem.sequence_count),
        tokens=encoded(length),
        pending=encoded(0 if problem.pending_k is None else problem.pending_k.shape[1]),
        chunks=encoded(problem.chunks),
        first_chunk=encoded(problem.first_chunk),
        interval=encoded(problem.checkpoint_interval),
        bptt_chunks=encoded(problem.bptt_chunks),
        rows=encoded(batch),
    )
    return described, sizes


def same_view(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two token tensors are the same memory read the same way."""
    return a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def saved_shapes(problem: ScanProblem) -> list[tuple[int, ...]]:
    """Checkpoints: one ``[M // K, N, in, out]`` per weight, then per momentum.

    The state at the start of chunk ``jK``, ``j >= 1``, of sequence ``s`` is in row ``chunk_row_s // K + j - 1``.
    """
    rows, heads = problem.chunk_rows // problem.checkpoint_interval, problem.tokens.shape[2]
    shapes = [(rows, heads, *w.shape[-2:]) for w in problem.weights]
    return shapes * 2 if problem.has_momentum else shapes


def precision_of(tokens: Tensor) -> str:
    """How float32 products are computed: ``"tf32"`` where PyTorch's own may be on this device, else ``"ieee"``."""
    relaxed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tokens.device.type == "cuda" and relaxed else "ieee"


def uses_fast_activation(tokens: Tensor) -> bool:
    """Whether activations take the hardware's approximate tanh: with 16-bit tokens, whose rounding is about as coarse,
    on NVIDIA's GPUs."""
    return configurations.device_of(tokens).architecture.startswith("sm_") and tokens.element_size() == 2


def empty_states(problem: ScanProblem, rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One uninitialised ``[rows, N, in, out]`` per weight."""
    tokens = problem.tokens
    return [
        torch.empty((rows, tokens.shape[2], *w.shape[-2:]), dtype=dtype, device=tokens.device) for w in problem.weights
    ]


def like_tokens(problem: ScanProblem, x: Tensor | None) -> Tensor | None:
    """A contiguous result in the shape of ``x``; zero where a table may leave tokens out."""
    if x is None:
        return None
    make = torch.empty if problem.sequences is None else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def empty_results(problem: ScanProblem, *, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """What ``scan_forward`` returns, not yet computed; the output is 0 where a table may leave tokens out."""
    output = like_tokens(problem, problem.q)
    weights: list[Tensor] = []
    momentum: list[Tensor] = []
    saved: list[Tensor] = []
    if problem.k is not None:
        weights = empty_states(problem, problem.sequence_count)
        momentum = empty_states(problem, problem.sequence_count) if problem.has_momentum else []
        if save:
            saved = [x.new_empty(shape) for x, shape in zip(weights + momentum, saved_shapes(problem), strict=True)]
    return problem.tokens.new_empty(0) if output is None else output, weights, momentum, saved


def make_plan(problem: ScanProblem, *, block_hidden: int) -> Plan:
    """What the resident kernels are compiled for, for this problem."""
    spec, tokens = problem.spec, problem.tokens
    heads, dim = tokens.shape[2:]
    return Plan(
        form=spec.form,
        activation=spec.activation,
        objective=spec.objective,
        rule=spec.rule,
        residual=spec.residual,
        heads=heads,
        chunk=problem.chunk_size,
        dim=dim,
        hidden=problem.weights[0].shape[-1],
        block_chunk=max(16, next_power_of_2(problem.chunk_size)),
        block_dim=max(16, next_power_of_2(dim)),
        block_hidden=block_hidden,
        operand=OPERANDS[tokens.dtype],
        precision=precision_of(tokens),
        fast_activation=uses_fast_activation(tokens),
        shared_read=same_view(problem.q, problem.k),
    )
