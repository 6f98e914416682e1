"""Runs the CUDA scan on the CPU: describes a problem of Python's to the kernels compiled with the host layer.

The structures mirror csrc/memory.h and csrc/cuda/scan.h; :func:`load` compares their sizes with the compiler's.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from hope_kernels.backends.interface import ScanProblem
from tests.cuda_host import build

SOURCES = [*sorted((build.ROOT / "csrc/cuda").glob("scan_forward*.cu")), build.HERE / "scan_driver.cpp"]
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


class _Device(ctypes.Structure):
    _fields_ = [("architecture", ctypes.c_int32), ("shared_memory", ctypes.c_int64)]


class Refused(RuntimeError):
    """The engine said no; the text is its reason."""


def load(folder: Path) -> ctypes.CDLL:
    """Compiles the kernels for the CPU into ``folder``."""
    library = ctypes.CDLL(str(build.build(folder / "scan.so", SOURCES)))
    library.problem_bytes.restype = library.forward_result_bytes.restype = ctypes.c_size_t
    assert library.problem_bytes() == ctypes.sizeof(_Problem)
    assert library.forward_result_bytes() == ctypes.sizeof(_ForwardResult)
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


def scan_forward(
    library: ctypes.CDLL, problem: ScanProblem, *, save: bool = False, architecture: int = 90, shared_memory: int = 0
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """As ``Backend.scan_forward`` says, by the CUDA kernels; results start as NaN.

    What is saved: a state every ``checkpoint_interval`` chunks, weights first, then momentum.

    Raises:
        Refused: the engine does not compute this.
    """
    spec, tokens = problem.spec, problem.tokens
    batch, length, heads, dim = tokens.shape
    shapes = [tuple(w.shape[-2:]) for w in problem.weights]
    pending = 0 if problem.pending_k is None else problem.pending_k.shape[1]
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

    p, r = _Problem(), _ForwardResult()
    p.form, p.activation = _FORMS[spec.form], _ACTIVATIONS[spec.activation]
    p.objective, p.rule = _OBJECTIVES[spec.objective], _RULES[spec.rule]
    p.residual, p.dtype = int(spec.residual), _DTYPES[tokens.dtype]
    p.batch, p.tokens, p.heads, p.dim, p.hidden = batch, length, heads, dim, shapes[0][1]
    p.sequence_count, p.pending_capacity = count, pending
    p.chunk_size, p.chunks, p.first_chunk = problem.chunk_size, problem.chunks, problem.first_chunk
    p.checkpoint_interval, p.threads = problem.checkpoint_interval, 1
    for name in _TOKENS:
        setattr(p, name, _token_view(getattr(problem, name)))
    for name, tensor in zip(_COEFFICIENTS, coefficients, strict=True):
        setattr(p, name, _pointer(tensor))
    for views, tensors in ((p.weights, problem.weights), (p.momentum, problem.momentum)):
        for i, tensor in enumerate(tensors):
            views[i] = _matrix_view(tensor)
    p.sequences = _pointer(problem.sequences)
    r.output = _token_view(output)
    for pointers, tensors in ((r.weights, weights), (r.momentum, momentum)):
        for i, tensor in enumerate(tensors):
            pointers[i] = tensor.data_ptr()
    for first, tensors in zip((0, _MAX_WEIGHTS), saved, strict=True):
        for i, tensor in enumerate(tensors):
            r.checkpoints[first + i] = tensor.data_ptr()
    device = _Device(architecture, shared_memory or SHARED_MEMORY[architecture])
    message = ctypes.create_string_buffer(256)
    arguments = ctypes.byref(p), ctypes.byref(r), ctypes.byref(device), message, ctypes.c_size_t(256)
    if library.scan_forward(*arguments) != 0:
        raise Refused(message.value.decode())
    return found
