"""The registered operator ``hope_kernels::scan`` and its autograd, shared by every compiled backend.

The operator carries an operator-level problem (:class:`hope_kernels.backends.interface.ScanProblem`) through
PyTorch's dispatcher: fake tensors, ``torch.compile``, autograd and ``torch.library.opcheck`` see one operator
with one schema, and only its implementation looks up the backend, by name, when it runs. Registering needs
neither a compiled core nor a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hope_kernels import backends
from hope_kernels.backends.interface import ScanGradients, ScanProblem
from hope_kernels.memory.spec import MemorySpec

_TENSORS = (
    "Tensor? q, Tensor? k, Tensor? v, Tensor? pending_k, Tensor? pending_v, "
    "Tensor? step, Tensor? retention, Tensor? decay, "
    "Tensor? momentum_step, Tensor? momentum_carry, Tensor? momentum_decay, "
    "Tensor[] weights, Tensor[] momentum, Tensor? sequences"
)
_SETTINGS = "str spec, SymInt chunk_size, SymInt chunks, SymInt first_chunk, SymInt bptt_chunks, str backend"
_TENSOR_COUNT = 14
_GATED = 11  # the tensors before `weights`, in the order of ScanGradients

_library = torch.library.Library("hope_kernels", "DEF")
_library.define(
    f"scan({_TENSORS}, {_SETTINGS}, bool save) -> (Tensor output, Tensor[] weights, Tensor[] momentum, Tensor[] saved)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"scan_backward({_TENSORS}, {_SETTINGS}, Tensor[] saved, Tensor? grad_output, Tensor?[] grad_weights, "
    "Tensor?[] grad_momentum) -> (Tensor[] tokens, Tensor[] weights, Tensor[] momentum)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _problem(args: tuple[Any, ...]) -> ScanProblem:
    """The problem behind an operator's arguments, up to and including ``bptt_chunks``."""
    (*tensors, weights, momentum, sequences) = args[:_TENSOR_COUNT]
    spec, chunk_size, chunks, first_chunk, bptt_chunks = args[_TENSOR_COUNT : _TENSOR_COUNT + 5]
    return ScanProblem(
        *tensors,
        weights=tuple(weights),
        momentum=tuple(momentum),
        sequences=sequences,
        spec=MemorySpec.from_key(spec),
        chunk_size=chunk_size,
        chunks=chunks,
        first_chunk=first_chunk,
        bptt_chunks=bptt_chunks,
    )


def _scan(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    backend, save = args[-2:]
    return backends.implementation(backend).scan_forward(_problem(args), save=save)


def _scan_fake(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    backend, save = args[-2:]
    return empty_results(_problem(args), backend, save)


def empty_results(
    problem: ScanProblem, backend: str, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Uninitialised tensors as a backend's ``scan_forward`` returns them."""
    tokens = problem.tokens
    output = tokens.new_empty(problem.q.shape if problem.q is not None else (0,))

    def empty(shapes: Iterable[tuple[int, ...]]) -> list[Tensor]:
        return [tokens.new_empty(shape, dtype=problem.state_dtype) for shape in shapes]

    if problem.k is None:
        return output, [], [], []
    shapes = [(problem.sequence_count, tokens.shape[2], *w.shape[-2:]) for w in problem.weights]
    saved = backends.implementation(backend).saved_shapes(problem) if save else []
    return output, empty(shapes), empty(shapes if problem.has_momentum else []), empty(saved)


def _scan_backward(*args: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    problem = _problem(args)
    backend, saved, grad_output, grad_weights, grad_momentum = args[-5:]
    gradients = backends.implementation(backend).scan_backward(
        problem, list(saved), grad_output, list(grad_weights), list(grad_momentum)
    )
    return reduced_gradients(problem, gradients)


def reduced_gradients(
    problem: ScanProblem, gradients: ScanGradients
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A backend's gradients of the tensors that are given, of the weights and of the momentum."""
    tokens = [g for g in gradients[:_GATED] if g is not None]
    # Shared weights: the gradient is the sum over the sequences, in a fixed order, in the dtype of the weight.
    weights = [_reduce(g, w) for g, w in zip(gradients.weights, problem.weights, strict=True)]
    momentum = [_reduce(g, m) for g, m in zip(gradients.momentum, problem.momentum, strict=True)]
    return tokens, weights, momentum


def _reduce(gradient: Tensor, initial: Tensor) -> Tensor:
    if initial.dim() == 3:
        gradient = gradient[0] if gradient.shape[0] == 1 else gradient.sum(0)
    return gradient.to(initial.dtype)


def _scan_backward_fake(*args: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    tensors, weights, momentum = args[:_GATED], args[_GATED], args[_GATED + 1]
    return [like(x) for x in tensors if x is not None], [like(w) for w in weights], [like(m) for m in momentum]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *_, saved = output
    ctx.set_materialize_grads(False)
    tensors = inputs[:_GATED]
    weights, momentum, sequences = inputs[_GATED : _GATED + 3]
    ctx.present = [x is not None for x in tensors]
    ctx.counts = (len(weights), len(momentum), sequences is not None)
    ctx.settings = inputs[_TENSOR_COUNT:-1]
    ctx.save_for_backward(
        *(x for x in tensors if x is not None),
        *weights,
        *momentum,
        *([sequences] if sequences is not None else []),
        *saved,
    )


def _backward(ctx: Any, grad_output: Tensor | None, grad_weights: Any, grad_momentum: Any, _: Any) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    tensors = [saved.pop(0) if present else None for present in ctx.present]
    weight_count, momentum_count, has_sequences = ctx.counts
    weights = [saved.pop(0) for _ in range(weight_count)]
    momentum = [saved.pop(0) for _ in range(momentum_count)]
    sequences = saved.pop(0) if has_sequences else None
    if not ctx.present[0]:
        grad_output = None  # without q the output is a placeholder of no elements
    d_tensors, d_weights, d_momentum = torch.ops.hope_kernels.scan_backward(
        *tensors,
        weights,
        momentum,
        sequences,
        *ctx.settings,
        saved,
        grad_output,
        grad_weights or [],
        grad_momentum or [],
    )
    d_tensors = iter(d_tensors)
    d_inputs = [next(d_tensors) if present else None for present in ctx.present]
    # 6 settings and `save`
    return (*d_inputs, d_weights, d_momentum if momentum_count else [], None, *[None] * 7)


def refuse_double_backward(*_: Any) -> None:
    """The backward of a backward."""
    raise RuntimeError(
        "hope_kernels: a compiled backend gives first derivatives only; for gradients of gradients use "
        "backend='reference'"
    )


def no_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps nothing for a backward that refuses to run."""


for _device in ("CPU", "CUDA"):
    _library.impl("scan", _scan, _device)
    _library.impl("scan_backward", _scan_backward, _device)
torch.library.register_fake("hope_kernels::scan", _scan_fake, lib=_library)
torch.library.register_fake("hope_kernels::scan_backward", _scan_backward_fake, lib=_library)
torch.library.register_autograd("hope_kernels::scan", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "hope_kernels::scan_backward", refuse_double_backward, setup_context=no_context, lib=_library
)


def refuse_forward_mode(tensors: Iterable[Tensor | None]) -> None:
    """Forward-mode derivatives would come out as silent zeros: the operator has no formula for them."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "hope_kernels: a compiled backend has no forward-mode derivatives; for those use backend='reference'"
        )


# Output, final weights and final momentum of a scan.
ScanResult = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


def scan(problem: ScanProblem, backend: str, *, direct: bool = False) -> ScanResult:
    """Run a problem on a compiled backend: output, final weights, final momentum, with gradients.

    ``direct`` passes the dispatcher by, which takes longer than a token's arithmetic: for problems without gradients
    of plain tensors (:mod:`hope_kernels.memory.plain`), for which all it would do is to call the implementation.
    """
    if direct:
        output, weights, momentum, _ = backends.implementation(backend).scan_forward(problem, save=False)
        return output, tuple(weights), tuple(momentum)
    tensors = (*problem.token_tensors, *problem.coefficients)
    refuse_forward_mode((*tensors, *problem.weights, *problem.momentum))
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*tensors, *problem.weights, *problem.momentum)
    )
    output, weights, momentum, _ = torch.ops.hope_kernels.scan(
        *tensors,
        list(problem.weights),
        list(problem.momentum),
        problem.sequences,
        problem.spec.key,
        problem.chunk_size,
        problem.chunks,
        problem.first_chunk,
        problem.bptt_chunks,
        backend,
        save,
    )
    return output, tuple(weights), tuple(momentum)
