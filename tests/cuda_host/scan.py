"""Runs the CUDA scan on the CPU: describes a problem of Python's to the kernels compiled with the host layer.

The structures mirror csrc/memory.h and csrc/cuda/scan.h; :func:`load` compares their sizes with the compiler's.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from hope_kernels.backends.interface import ScanGradients, ScanProblem
from tests.cuda_host import build

KERNELS = build.ROOT / "csrc/cuda"
SCANS = sorted(KERNELS.glob("scan_*.cu"))
SOURCES = [*SCANS, build.HERE / "scan_driver.cpp"]
# A program of run_case's cases, and of no kernel beside theirs.
CASES = [
    *(KERNELS / "scan_forward.cu", KERNELS / "scan_backward.cu"),
    *(build.HERE / "scan_cases.cu", build.HERE / "scan_driver.cpp", build.HERE / "case_main.cpp"),
]
SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may have

_MAX_WEIGHTS = 3
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FORMS = {"linear": 0, "mlp": 1, "glu": 2}
_ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2, "relu2": 3}
_OBJECTIVES = {"l2": 0, "dot": 1, "error": 2, "self": 3}
_RULES = {"gd": 0, "dgd": 1}


class _TokenView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "token", "head"))]


class _MatrixView(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("sequence", "head", "input", "output")),
    ]


_SIZES = (
    *("batch", "tokens", "heads", "dim", "hidden", "sequence_count", "pending_capacity", "chunk_size", "chunks"),
    *("first_chunk", "bptt_chunks", "checkpoint_interval"),
)
_TOKENS = ("q", "k", "v", "pending_k", "pending_v")
_COEFFICIENTS = ("step", "retention", "decay", "momentum_step", "momentum_carry", "momentum_decay")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("form", "activation", "objective", "rule", "residual", "dtype")),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("threads", ctypes.c_int32),
        *((name, _TokenView) for name in _TOKENS),
        *((name, ctypes.c_void_p) for name in _COEFFICIENTS),
        ("weights", _MatrixView * _MAX_WEIGHTS),
        ("momentum", _MatrixView * _MAX_WEIGHTS),
        ("sequences", ctypes.c_void_p),
    ]


class _ForwardResult(ctypes.Structure):
    _fields_ = [
        ("output", _TokenView),
        ("weights", ctypes.c_void_p * _MAX_WEIGHTS),
        ("momentum", ctypes.c_void_p * _MAX_WEIGHTS),
        ("checkpoints", ctypes.c_void_p * (2 * _MAX_WEIGHTS)),
        ("segment", ctypes.c_void_p),
        ("segment_bytes", ctypes.c_int64),
    ]


class _BackwardResult(ctypes.Structure):
    _fields_ = [
        ("checkpoints", ctypes.c_void_p * (2 * _MAX_WEIGHTS)),
        ("segment", ctypes.c_void_p),
        ("segment_bytes", ctypes.c_int64),
        ("grad_output", _TokenView),
        ("grad_weights", _MatrixView * _MAX_WEIGHTS),
        ("grad_momentum", _MatrixView * _MAX_WEIGHTS),
        *((name, _TokenView) for name in _TOKENS),
        *((name, ctypes.c_void_p) for name in _COEFFICIENTS),
        ("weights", ctypes.c_void_p * _MAX_WEIGHTS),
        ("momentum", ctypes.c_void_p * _MAX_WEIGHTS),
    ]


class _Device(ctypes.Structure):
    _fields_ = [("architecture", ctypes.c_int32), ("shared_memory", ctypes.c_int64)]


class Refused(RuntimeError):
    """The engine said no; the text is its reason."""


def load(folder: Path) -> ctypes.CDLL:
    """Compiles the kernels for the CPU into ``folder``."""
    library = ctypes.CDLL(str(build.build(folder / "scan.so", SOURCES)))
    sizes = {"problem": _Problem, "forward_result": _ForwardResult, "backward_result": _BackwardResult}
    for name, structure in sizes.items():
        size = getattr(library, f"{name}_bytes")
        size.restype = ctypes.c_size_t
        assert size() == ctypes.sizeof(structure)
    return library


def _token_view(x: Tensor | None) -> _TokenView:
    if x is None:
        return _TokenView()
    assert x.stride(3) == 1 or x.shape[3] == 1
    return _TokenView(x.data_ptr(), *x.stride()[:3])


def _matrix_view(x: Tensor) -> _MatrixView:
    strides = x.stride() if x.dim() == 4 else (0, *x.stride())
    return _MatrixView(x.data_ptr(), _DTYPES[x.dtype], *strides)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _pending_capacity(problem: ScanProblem) -> int:
    return 0 if problem.pending_k is None else problem.pending_k.shape[1]


def _describe(problem: ScanProblem, coefficients: list[Tensor | None]) -> _Problem:
    p, spec, tokens = _Problem(), problem.spec, problem.tokens
    p.form, p.activation = _FORMS[spec.form], _ACTIVATIONS[spec.activation]
    p.objective, p.rule = _OBJECTIVES[spec.objective], _RULES[spec.rule]
    p.residual, p.dtype = int(spec.residual), _DTYPES[tokens.dtype]
    p.batch, p.tokens, p.heads, p.dim = tokens.shape
    p.hidden = problem.weights[0].shape[-1]
    p.sequence_count, p.pending_capacity = problem.sequence_count, _pending_capacity(problem)
    p.chunk_size, p.chunks, p.first_chunk = problem.chunk_size, problem.chunks, problem.first_chunk
    p.bptt_chunks, p.checkpoint_interval, p.threads = problem.bptt_chunks, problem.checkpoint_interval, 1
    for name in _TOKENS:
        setattr(p, name, _token_view(getattr(problem, name)))
    for name, tensor in zip(_COEFFICIENTS, coefficients, strict=True):
        setattr(p, name, _pointer(tensor))
    for views, tensors in ((p.weights, problem.weights), (p.momentum, problem.momentum)):
        for i, tensor in enumerate(tensors):
            views[i] = _matrix_view(tensor)
    p.sequences = _pointer(problem.sequences)
    return p


def _call(function, *structures: ctypes.Structure, architecture: int, shared_memory: int) -> None:
    device = _Device(architecture, shared_memory or SHARED_MEMORY[architecture])
    message = ctypes.create_string_buffer(256)
    arguments = (*map(ctypes.byref, (*structures, device)), message, ctypes.c_size_t(256))
    if function(*arguments) != 0:
        raise Refused(message.value.decode())


def scan_forward(
    library: ctypes.CDLL, problem: ScanProblem, *, save: bool = False, architecture: int = 90, shared_memory: int = 0
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """As ``Backend.scan_forward`` says, by the CUDA kernels; results start as NaN.

    What is saved: a state every ``checkpoint_interval`` chunks, weights first, then momentum.

    Raises:
        Refused: the engine does not compute this.
    """
    tokens = problem.tokens
    length, heads = tokens.shape[1:3]
    shapes = [tuple(w.shape[-2:]) for w in problem.weights]
    pending = _pending_capacity(problem)
    coefficients = [None if c is None else c.contiguous() for c in problem.coefficients]
    count = problem.sequence_count
    if problem.sequences is None:
        rows = (pending + length - 1) // problem.chunk_size // problem.checkpoint_interval * count
    else:
        rows = problem.chunks // problem.checkpoint_interval

    def empty(*leading: int) -> list[Tensor]:
        return [torch.full((*leading, *shape), torch.nan) for shape in shapes]

    output = None
    if problem.q is not None:
        make = torch.zeros_like if problem.sequences is not None else torch.empty_like
        output = make(problem.q, memory_format=torch.contiguous_format)
        if problem.sequences is None:
            output.fill_(torch.nan)
    writes = problem.k is not None
    weights = empty(count, heads) if writes else []
    momentum = empty(count, heads) if writes and problem.has_momentum else []
    saved = [empty(rows, heads), empty(rows, heads) if problem.has_momentum else []] if save and writes else [[], []]

    empty_output = torch.empty(0, dtype=tokens.dtype)
    found = (output if output is not None else empty_output, weights, momentum, saved[0] + saved[1])
    if count == 0:  # empty tensors have no address, and there is nothing to do
        return found

    p, r = _describe(problem, coefficients), _ForwardResult()
    r.output = _token_view(output)
    for pointers, tensors in ((r.weights, weights), (r.momentum, momentum)):
        for i, tensor in enumerate(tensors):
            pointers[i] = tensor.data_ptr()
    for first, tensors in zip((0, _MAX_WEIGHTS), saved, strict=True):
        for i, tensor in enumerate(tensors):
            r.checkpoints[first + i] = tensor.data_ptr()
    _call(library.scan_forward, p, r, architecture=architecture, shared_memory=shared_memory)
    return found


def scan_backward(
    library: ctypes.CDLL,
    problem: ScanProblem,
    saved: list[Tensor],
    grad_output: Tensor | None,
    grad_weights: list[Tensor | None],
    grad_momentum: list[Tensor | None],
    *,
    unwanted: tuple[str, ...] = (),
    architecture: int = 90,
    shared_memory: int = 0,
) -> ScanGradients:
    """As ``Backend.scan_backward`` says, by the CUDA kernels; results start as NaN, or as 0 where there is a table.

    ``unwanted``: fields of ``ScanGradients`` that are not asked for; they keep what they start as.

    Raises:
        Refused: the engine does not compute this.
    """
    coefficients = [None if c is None else c.contiguous() for c in problem.coefficients]
    start = torch.nan if problem.sequences is None else 0.0
    shapes = [tuple(w.shape[-2:]) for w in problem.weights]
    states = [(problem.sequence_count, problem.tokens.shape[2], *shape) for shape in shapes]

    def empty(tensors) -> list[Tensor | None]:
        return [None if x is None else torch.full(x.shape, start, dtype=x.dtype) for x in tensors]

    weights = [torch.full(state, torch.nan) for state in states]
    momentum = [torch.full(state, torch.nan) for state in states] if problem.momentum else []
    found = ScanGradients(*empty(problem.token_tensors), *empty(coefficients), weights, momentum)
    if problem.sequence_count == 0:
        return found

    r, matrices = _BackwardResult(), len(problem.weights)
    for first, tensors in ((0, saved[:matrices]), (_MAX_WEIGHTS, saved[matrices:])):
        for i, tensor in enumerate(tensors):
            r.checkpoints[first + i] = _pointer(tensor)
    r.grad_output = _token_view(grad_output)
    for views, tensors in ((r.grad_weights, grad_weights), (r.grad_momentum, grad_momentum)):
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                views[i] = _matrix_view(tensor)
    for name in (name for name in _TOKENS if name not in unwanted):
        setattr(r, name, _token_view(getattr(found, name)))
    for name in (name for name in _COEFFICIENTS if name not in unwanted):
        setattr(r, name, _pointer(getattr(found, name)))
    for name in (name for name in ("weights", "momentum") if name not in unwanted):
        for i, tensor in enumerate(getattr(found, name)):
            getattr(r, name)[i] = tensor.data_ptr()
    p = _describe(problem, coefficients)
    _call(library.scan_backward, p, r, architecture=architecture, shared_memory=shared_memory)
    return found
