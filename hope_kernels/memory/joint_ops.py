"""The registered operator ``hope_kernels::scans``: several scans that do not depend on one another, run at once.

A GPU runs all levels of an independent Continuum Memory System in one launch this way. What is true of
``hope_kernels::scan`` (see :mod:`hope_kernels.memory.ops`) is true of this operator; only the arguments of all scans
stand in one list of tensors, behind each other, and a few integers per scan say which of them is what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hope_kernels import backends
from hope_kernels.backends.interface import ScanProblem
from hope_kernels.memory import ops
from hope_kernels.memory.spec import MemorySpec

_OPTIONAL = (
    "q", "k", "v", "pending_k", "pending_v", "step", "retention", "decay", "momentum_step", "momentum_carry",
    "momentum_decay", "sequences",
)  # fmt: skip
# Per scan: which of _OPTIONAL are given (one bit each), how many momentum tensors there are, and four sizes.
_SETTINGS = 6

_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define(
    "scans(Tensor[] tensors, str[] specs, SymInt[] settings, str backend, bool save) -> Tensor[] results",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "scans_backward(Tensor[] tensors, str[] specs, SymInt[] settings, str backend, Tensor[] saved, "
    "Tensor?[] grad_results) -> Tensor[] grad_tensors",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _pack(problems: Sequence[ScanProblem]) -> tuple[list[Tensor], list[str], list[int]]:
    tensors: list[Tensor] = []
    settings: list[int] = []
    for problem in problems:
        optional = [getattr(problem, name) for name in _OPTIONAL]
        tensors += [x for x in optional if x is not None]
        tensors += [*problem.weights, *problem.momentum]
        settings += [
            sum(1 << bit for bit, x in enumerate(optional) if x is not None),
            len(problem.momentum),
            problem.chunk_size,
            problem.chunks,
            problem.first_chunk,
            problem.bptt_chunks,
        ]
    return tensors, [problem.spec.key for problem in problems], settings


def _unpack(tensors: Sequence[Tensor], specs: Sequence[str], settings: Sequence[int]) -> list[ScanProblem]:
    left = iter(tensors)
    problems = []
    for index, key in enumerate(specs):
        given, momentum_count, *sizes = settings[index * _SETTINGS : (index + 1) * _SETTINGS]
        optional = {name: next(left) if given >> bit & 1 else None for bit, name in enumerate(_OPTIONAL)}
        spec = MemorySpec.from_key(key)
        problems.append(
            ScanProblem(
                **optional,
                weights=tuple(islice(left, spec.weight_count)),
                momentum=tuple(islice(left, momentum_count)),
                spec=spec,
                **dict(zip(("chunk_size", "chunks", "first_chunk", "bptt_chunks"), sizes, strict=True)),
            )
        )
    return problems


def _grouped(problems: Sequence[ScanProblem], results: Sequence[Any]) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """Output, weights and momentum of each scan from the list of all."""
    left = iter(results)
    for problem in problems:
        states = len(problem.weights) if problem.k is not None else 0
        momentum = states if problem.has_momentum else 0
        yield next(left), list(islice(left, states)), list(islice(left, momentum))


def _scans(tensors: list[Tensor], specs: list[str], settings: list[int], backend: str, save: bool) -> list[Tensor]:
    results = backends.implementation(backend).scans_forward(_unpack(tensors, specs, settings), save=save)
    return _flat(results)


def _flat(results: Sequence[tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]]) -> list[Tensor]:
    """Outputs and states of all scans, then what all of them saved."""
    flat = [x for output, weights, momentum, _ in results for x in (output, *weights, *momentum)]
    return flat + [x for *_, saved in results for x in saved]


def _scans_fake(tensors: list[Tensor], specs: list[str], settings: list[int], backend: str, save: bool) -> list[Tensor]:
    return _flat([ops.empty_results(p, backend, save) for p in _unpack(tensors, specs, settings)])


def _scans_backward(
    tensors: list[Tensor],
    specs: list[str],
    settings: list[int],
    backend: str,
    saved: list[Tensor],
    grad_results: list[Tensor | None],
) -> list[Tensor]:
    engine = backends.implementation(backend)
    problems = _unpack(tensors, specs, settings)
    left = iter(saved)
    kept = [list(islice(left, len(engine.saved_shapes(p)) if p.k is not None else 0)) for p in problems]
    upstream = [
        (None if p.q is None else output, weights, momentum)
        for p, (output, weights, momentum) in zip(problems, _grouped(problems, grad_results), strict=True)
    ]
    gradients: list[Tensor] = []
    for problem, found in zip(problems, engine.scans_backward(problems, kept, upstream), strict=True):
        tokens, weights, momentum = ops.reduced_gradients(problem, found)
        # A table of sequences has no gradient: its place in the list is kept by an empty tensor.
        table = [] if problem.sequences is None else [problem.sequences.new_empty(0)]
        gradients += [*tokens, *table, *weights, *momentum]
    return gradients


def _scans_backward_fake(tensors: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape if x.is_floating_point() else (0,)) for x in tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, specs, settings, backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.arguments = (specs, settings, backend)
    ctx.tensor_count = len(tensors)
    problems = _unpack(tensors, specs, settings)
    ctx.result_count = sum(1 + len(w) + len(m) for _, w, m in _grouped(problems, output))
    ctx.save_for_backward(*tensors, *output[ctx.result_count :])


def _backward(ctx: Any, grad_results: list[Tensor | None]) -> tuple[Any, ...]:
    tensors, saved = ctx.saved_tensors[: ctx.tensor_count], ctx.saved_tensors[ctx.tensor_count :]
    upstream = grad_results[: ctx.result_count]
    gradients = torch.ops.hope_kernels.scans_backward(list(tensors), *ctx.arguments, list(saved), upstream)
    found = [g if x.is_floating_point() else None for g, x in zip(gradients, tensors, strict=True)]
    return found, None, None, None, None


for _device in ("CPU", "CUDA"):
    _library.impl("scans", _scans, _device)
    _library.impl("scans_backward", _scans_backward, _device)
torch.library.register_fake("hope_kernels::scans", _scans_fake, lib=_library)
torch.library.register_fake("hope_kernels::scans_backward", _scans_backward_fake, lib=_library)
torch.library.register_autograd("hope_kernels::scans", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "hope_kernels::scans_backward", ops.refuse_double_backward, setup_context=ops.no_context, lib=_library
)


def scans(problems: Sequence[ScanProblem], backend: str) -> list[ops.ScanResult]:
    """Run problems on a backend that can run several at once: per problem what :func:`ops.scan` returns."""
    tensors, specs, settings = _pack(problems)
    ops.refuse_forward_mode(tensors)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    results = torch.ops.hope_kernels.scans(tensors, specs, settings, backend, save)
    return [(output, tuple(weights), tuple(speeds)) for output, weights, speeds in _grouped(problems, results)]
