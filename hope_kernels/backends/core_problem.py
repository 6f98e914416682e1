"""A scan as the compiled core takes it: plain tuples of integers and addresses, the same for all of its engines.

``csrc/bindings.h`` reads them. Token tensors and weights are described where they lie, through element strides; copied
first are only token tensors whose last dimension is not contiguous, and coefficients and checkpoints that are not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from hope_kernels.backends.interface import ScanGradients, ScanProblem

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.memory.spec import MemorySpec

FORMS = {"linear": 0, "mlp": 1, "glu": 2}
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2, "relu2": 3}
OBJECTIVES = {"l2": 0, "dot": 1, "error": 2, "self": 3}
RULES = {"gd": 0, "dgd": 1}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

TokenTuple = tuple[int, int, int, int]
MatrixTuple = tuple[int, int, int, int, int, int]
ForwardResults = tuple["Tensor", "list[Tensor]", "list[Tensor]", "list[Tensor]"]


def readable(x: Tensor | None) -> Tensor | None:
    """``x`` with a contiguous last dimension."""
    return x if x is None or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def tokens_tuple(x: Tensor | None) -> TokenTuple | None:
    """Address and strides of tokens ``[rows, tokens, N, D]``."""
    if x is None:
        return None
    return x.data_ptr(), *x.stride()[:3]


def matrix_tuple(x: Tensor | None) -> MatrixTuple | None:
    """Address, dtype and strides of matrices ``[S, N, in, out]`` or ``[N, in, out]``."""
    if x is None:
        return None
    strides = x.stride()
    return x.data_ptr(), DTYPES[x.dtype], *(strides if len(strides) == 4 else (0, *strides))


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def pointers(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple([t.data_ptr() for t in tensors])


@lru_cache(maxsize=512)
def vocabulary(spec: MemorySpec, dtype: torch.dtype) -> tuple[int, ...]:
    """What a memory is and the tokens' dtype, in the core's numbers."""
    return (
        FORMS[spec.form],
        ACTIVATIONS[spec.activation],
        OBJECTIVES[spec.objective],
        RULES[spec.rule],
        int(spec.residual),
        DTYPES[dtype],
    )


def last_chunk(problem: ScanProblem) -> int:
    """Without a table: the chunk that each sequence's last token lies in."""
    pending = problem.pending_k.shape[1] if problem.pending_k is not None else 0
    return (pending + problem.tokens.shape[1] - 1) // problem.chunk_size


def checkpoint_shapes(problem: ScanProblem) -> list[tuple[int, ...]]:
    """One ``[rows, N, in, out]`` per weight, then per momentum: the states at the start of chunks ``jK``, ``j >= 1``.

    Without ``sequences``, ``rows`` counts those of every sequence that lie before or at its last token, in order; with
    them row ``chunk_row_s // K + j - 1`` belongs to chunk ``jK`` of sequence ``s``.
    """
    heads, interval = problem.tokens.shape[2], problem.checkpoint_interval
    if problem.sequences is None:
        rows = last_chunk(problem) // interval * problem.sequence_count
    else:
        rows = problem.chunks // interval
    shapes = [(rows, heads, *w.shape[-2:]) for w in problem.weights]
    return shapes * 2 if problem.has_momentum else shapes


def read_arguments(
    q: Tensor, weights: tuple[Tensor, ...], spec: MemorySpec, chunk_size: int, output: Tensor
) -> tuple[tuple, ...]:
    """What :class:`CoreProblem` says of a problem that only reads, for which it would look at much that is absent.

    ``q`` (:func:`readable`) and ``output``, both ``[B, T, N, D]``, and the weights must outlive the call.
    """
    batch, length, heads, dim = q.shape
    return (
        vocabulary(spec, q.dtype),
        (batch, length, heads, dim, weights[0].shape[-1], batch, 0, chunk_size, 0, 0, 0, 1),
        (tokens_tuple(q), None, None, None, None),
        (None, None, None, None, None, None),
        (tuple([matrix_tuple(w) for w in weights]), (), None),
        (tokens_tuple(output), (), (), (), (), None),
    )


class CoreProblem:
    """A problem as the tuples the core takes. Keeps alive every tensor whose address is in them."""

    def __init__(self, problem: ScanProblem) -> None:
        # A good part of a one-token call is spent here: what is absent costs nothing, properties are asked for once.
        tokens, table, pending = problem.tokens, problem.sequences, problem.pending_k
        self.problem = problem
        self.device, self.dtype = tokens.device, tokens.dtype
        self.batch, self.length, self.heads, self.dim = tokens.shape
        self.sequence_count = self.batch if table is None else table.shape[0]
        self.vocabulary = vocabulary(problem.spec, self.dtype)
        self.sizes = (
            self.batch,
            self.length,
            self.heads,
            self.dim,
            problem.weights[0].shape[-1],
            self.sequence_count,
            0 if pending is None else pending.shape[1],
            problem.chunk_size,
            problem.chunks,
            problem.first_chunk,
            problem.bptt_chunks,
            problem.checkpoint_interval,
        )
        self.read = [x if x is None else readable(x) for x in problem.token_tensors]
        self.given = [x if x is None else x.contiguous() for x in problem.coefficients]
        self.sequences = None if table is None else table.contiguous()
        self.tokens = tuple([x if x is None else tokens_tuple(x) for x in self.read])
        self.coefficients = tuple([x if x is None else x.data_ptr() for x in self.given])
        self.states = (
            tuple([matrix_tuple(w) for w in problem.weights]),
            tuple([matrix_tuple(m) for m in problem.momentum]),
            pointer(self.sequences),
        )

    @property
    def arguments(self) -> tuple[tuple, ...]:
        return self.vocabulary, self.sizes, self.tokens, self.coefficients, self.states

    def empty(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Uninitialised results in the state dtype."""
        dtype = self.problem.state_dtype
        return [torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes]

    def empty_states(self) -> list[Tensor]:
        """One uninitialised ``[S, N, in, out]`` per weight."""
        return self.empty([(self.sequence_count, self.heads, *w.shape[-2:]) for w in self.problem.weights])

    def like_tokens(self, x: Tensor | None) -> Tensor | None:
        """A contiguous result in the shape of ``x``; zero where a table may leave tokens out."""
        if x is None:
            return None
        make = torch.empty_like if self.sequences is None else torch.zeros_like
        return make(x, memory_format=torch.contiguous_format)

    def saved_arguments(self, saved: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int] | None]:
        """Weight checkpoints, momentum checkpoints and the last segment with the bytes of each task."""
        if not saved:
            return (), (), None
        count = len(self.problem.weights)
        checkpoints, segment = saved[: 2 * count if self.problem.has_momentum else count], None
        if len(saved) > len(checkpoints):
            last = saved[-1]
            segment = last.data_ptr(), last.shape[2] * last.element_size()
        return pointers(checkpoints[:count]), pointers(checkpoints[count:]), segment

    def forward_results(self, saved_shapes: list[tuple[int, ...]]) -> tuple[ForwardResults, tuple]:
        """What a forward returns, not yet computed, and the same as the core takes it."""
        output = self.like_tokens(self.problem.q)
        weights: list[Tensor] = []
        momentum: list[Tensor] = []
        saved: list[Tensor] = []
        if self.problem.k is not None:
            weights = self.empty_states()
            momentum = self.empty_states() if self.problem.has_momentum else []
            saved = self.empty(saved_shapes)
        arguments = tokens_tuple(output), pointers(weights), pointers(momentum), *self.saved_arguments(saved)
        if output is None:
            output = torch.empty(0, dtype=self.dtype, device=self.device)
        return (output, weights, momentum, saved), arguments

    def upstream(
        self,
        saved: list[Tensor],
        grad_output: Tensor | None,
        grad_weights: list[Tensor | None],
        grad_momentum: list[Tensor | None],
    ) -> tuple:
        """What a backward is given, as the core takes it; the tensors must outlive the call."""
        return (
            *self.saved_arguments(saved),
            tokens_tuple(grad_output),
            tuple(matrix_tuple(g) for g in grad_weights),
            tuple(matrix_tuple(g) for g in grad_momentum),
        )

    def gradients(self) -> tuple[ScanGradients, tuple]:
        """What a backward returns, not yet computed, and the same as the core takes it."""
        tokens = [self.like_tokens(x) for x in self.problem.token_tensors]
        # The rows of a table's coefficients that no sequence uses keep gradient 0.
        make = torch.empty_like if self.problem.sequences is None else torch.zeros_like
        coefficients = [None if x is None else make(x) for x in self.given]
        weights = self.empty_states()
        momentum = self.empty_states() if self.problem.momentum else []
        arguments = (
            *(tokens_tuple(x) for x in tokens),
            *(pointer(x) for x in coefficients),
            pointers(weights),
            pointers(momentum),
        )
        return ScanGradients(*tokens, *coefficients, weights, momentum), arguments
