"""The compiled CPU engine: describes a problem to ``hope_kernels._core`` and allocates its results.

The engine reads tokens and weights where they lie, through element strides; copied first are only token tensors
whose last dimension is not contiguous, and coefficients and checkpoints that are not. It works in the state dtype
(float64 for float64 tokens, else float32), converts bfloat16 and float16 tokens as it loads and stores them, and runs
on as many threads as ``torch.get_num_threads()`` says. Results do not depend on that number, bit for bit.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from hope_kernels.backends.interface import BackendStatus, ScanGradients, ScanProblem, ScanRequest, build_info

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.optim.problem import UpdateProblem

_FORMS = {"linear": 0, "mlp": 1, "glu": 2}
_ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2, "relu2": 3}
_OBJECTIVES = {"l2": 0, "dot": 1, "error": 2, "self": 3}
_RULES = {"gd": 0, "dgd": 1}
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_TokenTuple = tuple[int, int, int, int]
_MatrixTuple = tuple[int, int, int, int, int, int]


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


def refuses(request: ScanRequest) -> str | None:
    """None when this engine can run such calls, else the reason it cannot."""
    state = status()
    if not state:
        return state.reason
    if request.device.type != "cpu":
        return f"it needs CPU tensors, got {request.device}"
    if request.dtype not in _DTYPES:
        return f"it takes float32, float64, bfloat16 or float16 tokens, got {request.dtype}"
    return None


def _readable(x: Tensor | None) -> Tensor | None:
    """``x`` with a contiguous last dimension."""
    return x if x is None or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _tokens(x: Tensor | None) -> _TokenTuple | None:
    if x is None:
        return None
    row, token, head, _ = x.stride()
    return x.data_ptr(), row, token, head


def _matrix(x: Tensor | None) -> _MatrixTuple | None:
    if x is None:
        return None
    strides = x.stride() if x.dim() == 4 else (0, *x.stride())
    return x.data_ptr(), _DTYPES[x.dtype], *strides


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _Description:
    """A problem as the tuples the core takes. Keeps alive every tensor whose address is in them."""

    def __init__(self, problem: ScanProblem) -> None:
        spec, tokens = problem.spec, problem.tokens
        self.problem = problem
        self.device, self.dtype = tokens.device, tokens.dtype
        self.batch, self.length, self.heads, self.dim = tokens.shape
        self.sequence_count = problem.sequence_count
        self.shapes = [tuple(w.shape[-2:]) for w in problem.weights]
        self.read = [_readable(x) for x in problem.token_tensors]
        self.given = tuple(None if x is None else x.contiguous() for x in problem.coefficients)
        self.sequences = None if problem.sequences is None else problem.sequences.contiguous()
        self.vocabulary = (
            _FORMS[spec.form],
            _ACTIVATIONS[spec.activation],
            _OBJECTIVES[spec.objective],
            _RULES[spec.rule],
            int(spec.residual),
            _DTYPES[tokens.dtype],
        )
        self.sizes = (
            self.batch,
            self.length,
            self.heads,
            self.dim,
            self.shapes[0][1],
            self.sequence_count,
            problem.pending_k.shape[1] if problem.pending_k is not None else 0,
            problem.chunk_size,
            problem.chunks,
            problem.first_chunk,
            problem.bptt_chunks,
            problem.checkpoint_interval,
        )
        self.tokens = tuple(_tokens(x) for x in self.read)
        self.coefficients = tuple(_pointer(x) for x in self.given)
        self.states = (
            tuple(_matrix(w) for w in problem.weights),
            tuple(_matrix(m) for m in problem.momentum),
            _pointer(self.sequences),
        )

    @property
    def arguments(self) -> tuple[tuple, ...]:
        return self.vocabulary, self.sizes, self.tokens, self.coefficients, self.states

    def empty(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Uninitialised results in the state dtype."""
        return [torch.empty(shape, dtype=self.problem.state_dtype) for shape in shapes]

    def empty_states(self) -> list[Tensor]:
        """One uninitialised ``[S, N, in, out]`` per weight."""
        return self.empty([(self.sequence_count, self.heads, *shape) for shape in self.shapes])

    def saved_arguments(self, saved: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int] | None]:
        """Weight checkpoints, momentum checkpoints and the last segment with the bytes of each task."""
        count = len(self.shapes)
        checkpoints, segment = saved[: 2 * count if self.problem.has_momentum else count], None
        if len(saved) > len(checkpoints):
            last = saved[-1]
            segment = last.data_ptr(), last.shape[2] * last.element_size()
        return _pointers(checkpoints[:count]), _pointers(checkpoints[count:]), segment

    def like_tokens(self, x: Tensor | None) -> Tensor | None:
        """A contiguous result in the shape of ``x``; zero where a table may leave tokens out."""
        if x is None:
            return None
        make = torch.empty if self.problem.sequences is None else torch.zeros
        return make(x.shape, dtype=x.dtype)


def _pointers(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def saved_shapes(problem: ScanProblem) -> list[tuple[int, ...]]:
    """Shapes of what the forward saves: checkpoints, then memory for the last segment where that is kept.

    Checkpoints are one ``[rows, N, in, out]`` per weight, then per momentum. Without ``sequences``, ``rows`` counts
    those of every sequence that lie before or at its last token, in order; with them row
    ``chunk_row_s // K + j - 1`` belongs to chunk ``jK`` of sequence ``s``.

    The last segment is every chunk from the last checkpoint on: the forward leaves their states and intermediates,
    ``[S, N, elements]``, where they are few (``K <= 2``, at most four chunks, as large memories have them).
    """
    heads, dim = problem.tokens.shape[2:]
    interval, size = problem.checkpoint_interval, problem.chunk_size
    uniform = problem.sequences is None
    matrices = [w.shape[-2:] for w in problem.weights] * (2 if problem.has_momentum else 1)
    pending = problem.pending_k.shape[1] if problem.pending_k is not None else 0
    last_chunk = (pending + problem.tokens.shape[1] - 1) // size
    rows = last_chunk // interval * problem.sequence_count if uniform else problem.chunks // interval
    shapes = [(rows, heads, *matrix) for matrix in matrices]
    if uniform and interval <= 2 and size <= 2 * dim:
        last_state = last_chunk if problem.q is not None else problem.chunks - 1
        elements = sum(_padded(*matrix, problem) for matrix in [*matrices, *_intermediates(problem)])
        shapes.append((problem.sequence_count, heads, last_state % interval * elements))
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
    core, state = _load()
    if core is None:
        raise RuntimeError(f"backend 'cpu' is not available: {state.reason}")
    d = _Description(problem)
    output = d.like_tokens(problem.q)
    weights: list[Tensor] = []
    momentum: list[Tensor] = []
    saved: list[Tensor] = []
    if problem.k is not None:
        weights = d.empty_states()
        momentum = d.empty_states() if problem.has_momentum else []
        saved = d.empty(saved_shapes(problem)) if save else []
    if d.sequence_count == 0:  # empty tensors have no address, and there is nothing to do
        return output if output is not None else torch.empty(0, dtype=d.dtype), weights, momentum, saved
    core.scan_forward(
        *d.arguments,
        (
            _tokens(output),
            _pointers(weights),
            _pointers(momentum),
            *d.saved_arguments(saved),
        ),
        torch.get_num_threads(),
    )
    return output if output is not None else torch.empty(0, dtype=d.dtype), weights, momentum, saved


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
    core, state = _load()
    if core is None:
        raise RuntimeError(f"backend 'cpu' is not available: {state.reason}")
    d = _Description(problem)
    saved = [x.contiguous() for x in saved]
    grad_output = _readable(grad_output)
    # The rows of a table's coefficients that no sequence uses keep gradient 0.
    make = torch.empty_like if problem.sequences is None else torch.zeros_like
    tokens = [d.like_tokens(x) for x in problem.token_tensors]
    coefficients = [None if x is None else make(x) for x in d.given]
    weights = d.empty_states()
    momentum = d.empty_states() if problem.momentum else []
    if d.sequence_count == 0:
        return ScanGradients(*tokens, *coefficients, weights, momentum)
    core.scan_backward(
        *d.arguments,
        (
            *d.saved_arguments(saved),
            _tokens(grad_output),
            tuple(_matrix(g) for g in grad_weights),
            tuple(_matrix(g) for g in grad_momentum),
        ),
        (
            *(_tokens(x) for x in tokens),
            *(_pointer(x) for x in coefficients),
            _pointers(weights),
            _pointers(momentum),
        ),
        torch.get_num_threads(),
    )
    return ScanGradients(*tokens, *coefficients, weights, momentum)


def refuses_level_update(device: torch.device) -> str | None:
    """None when an update of tensors on ``device`` can run, else the reason it cannot."""
    state = status()
    if not state:
        return state.reason
    return None if device.type == "cpu" else f"it needs CPU tensors, got {device}"


def level_update(problem: UpdateProblem) -> Tensor:
    """Updates in place and returns the norms ``[levels]``, as ``hope_kernels.optim`` says."""
    core, state = _load()
    if core is None:
        raise RuntimeError(f"backend 'cpu' is not available: {state.reason}")
    norms = torch.empty(len(problem.levels))
    core.level_update(
        *problem.tables(), problem.grad_scale, problem.max_norm or 0.0, norms.data_ptr(), torch.get_num_threads()
    )
    return norms
