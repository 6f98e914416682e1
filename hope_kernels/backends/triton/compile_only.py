"""Compiling what a launch would run, for a GPU that need not be there: kernels are built, never started.

Inside :func:`compile_only` the engine's own host code runs on meta tensors: views, plans, specialisations and options
are those of a real call at that size, and every launch is recorded with the kernel that was compiled for it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from hope_kernels.backends.interface import ScanProblem
from hope_kernels.backends.triton.configurations import Device, assume
from hope_kernels.backends.triton.digest import digest
from hope_kernels.memory.spec import MemorySpec


@dataclass(frozen=True)
class Architecture:
    """A family of GPUs to compile for.

    Attributes:
        name: as NVIDIA and AMD call it.
        target: as Triton calls it.
        shared_limit: bytes of shared memory (LDS) one program may have.
    """

    name: str
    target: GPUTarget
    shared_limit: int


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
        Architecture("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
        Architecture("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
        Architecture("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
    )
}


class Launch(NamedTuple):
    """One launch that was compiled instead.

    ``kernel`` is the function's name, ``options`` are the keywords of the launch (``num_warps``, ..), ``compiled`` is
    Triton's compiled kernel with its ``metadata`` and ``asm``, ``digest`` that of what it is compiled from.
    """

    kernel: str
    grid: Any
    options: dict[str, Any]
    compiled: Any
    digest: str


class _NotCompiled:
    """In place of a kernel that is only described."""


# Of kernels that Triton keeps for the process.
_digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


class _StandIn:
    """What the compiler asks a driver for. Each target counts as a device of its own, so that nothing compiled for
    it can be taken for a kernel that is ready to run."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"compile only: {self._target.backend} {self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compile_only(
    architecture: Architecture, kernels: Collection[str] | None = None, *, describe: bool = False
) -> Iterator[list[Launch]]:
    """Inside, launches of Triton kernels compile for ``architecture`` and are appended to the list that is yielded.

    Configurations are chosen as on that architecture. ``kernels``: names of the functions to compile, None for all;
    launches of others do nothing. ``describe``: nothing is compiled; launches have their digests, and None for
    ``compiled`` unless the kernel had been compiled by this process.

    For the whole process, threads included: not for use beside real launches.

    Raises:
        RuntimeError: the kernel at hand was defined under ``TRITON_INTERPRET=1``: it cannot be compiled.
    """
    launches: list[Launch] = []
    compile_and_run, interpret, previous = JITFunction.run, InterpretedFunction.__getitem__, driver._active
    compile_one = JITFunction._do_compile
    given: list[Any] = []  # arguments of the launch that is being compiled

    def run(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if kernels is not None and kernel.__name__ not in kernels:
            return None
        given[:] = [*arguments, *options.values()]
        compiled = compile_and_run(kernel, *arguments, grid=grid, warmup=True, **options)
        known = None if isinstance(compiled, _NotCompiled) else compiled
        launches.append(Launch(kernel.__name__, grid, options, known, _digests[compiled]))
        return known

    def build(
        kernel: JITFunction,
        key: str,
        signature: dict,
        device: str,
        constants: dict,
        options: Any,
        attributes: dict,
        warmup: bool,
    ) -> Any:
        arguments = (key, signature, device, constants, options, attributes, warmup)
        compiled = _NotCompiled() if describe else compile_one(kernel, *arguments)
        _digests[compiled] = digest(
            kernel,
            given,
            signature=signature,
            constants=constants,
            attributes=attributes,
            options=vars(options),
            target=architecture.target,
        )
        return compiled

    def refuse(kernel: InterpretedFunction, grid: Any) -> Any:
        raise RuntimeError(
            f"{kernel.fn.__name__} was defined with TRITON_INTERPRET=1 in the environment and cannot be compiled; "
            "start a process without it"
        )

    driver.set_active(_StandIn(architecture.target))
    JITFunction.run, InterpretedFunction.__getitem__, JITFunction._do_compile = run, refuse, build
    try:
        with warnings.catch_warnings(), assume(device=Device(architecture.name, architecture.name)):
            # A change of default in a later Triton, warned about once per process.
            warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION.*")
            yield launches
    finally:
        JITFunction.run, InterpretedFunction.__getitem__ = compile_and_run, interpret
        JITFunction._do_compile = compile_one
        driver._active = previous


def meta_problem(
    spec: MemorySpec,
    *,
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    hidden: int,
    chunk_size: int,
    dtype: torch.dtype,
    retention: bool = False,
    momentum: bool = False,
    pending: int = 0,
    packed: bool = False,
    device: torch.device | str = "meta",
) -> ScanProblem:
    """A scan without memory behind it, as the operator would hand it to the engine.

    Args:
        spec: the memory; dtype: of the tokens; the sizes are B, T, N, D, H, C.
        retention, momentum: whether these gates are given.
        pending: P, pending tokens per sequence; 0 for none.
        packed: whether a table of sequences is given.
        device: ``"meta"``, or another for uninitialised tensors there.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def tokens_of(rows: int, length: int, features: int = dim) -> torch.Tensor:
        return empty(rows, length, heads, features, dtype=dtype)

    chunks = (pending + tokens) // chunk_size
    rows = chunks * batch
    has_momentum = momentum and spec.rule == "gd"
    matrices = spec.weight_shapes(dim, hidden)
    return ScanProblem(
        # Meta tensors all lie at address 0: other strides keep the queries from being taken for the keys.
        q=tokens_of(batch, tokens, 2 * dim)[..., :dim],
        k=tokens_of(batch, tokens),
        v=tokens_of(batch, tokens),
        pending_k=tokens_of(batch, pending) if pending else None,
        pending_v=tokens_of(batch, pending) if pending else None,
        step=empty(rows, heads, chunk_size),
        retention=empty(rows, heads, chunk_size) if retention and spec.rule == "dgd" else None,
        decay=empty(rows, heads) if retention and spec.rule == "gd" else None,
        momentum_step=empty(rows, heads, chunk_size) if has_momentum else None,
        momentum_carry=empty(rows, heads) if has_momentum else None,
        momentum_decay=empty(rows, heads) if has_momentum else None,
        weights=tuple(empty(heads, *shape) for shape in matrices),
        momentum=tuple(empty(batch, heads, *shape) for shape in matrices) if has_momentum and pending else (),
        sequences=torch.empty((batch, 6), dtype=torch.int64, device=device) if packed else None,
        spec=spec,
        chunk_size=chunk_size,
        chunks=rows if packed else chunks,
        first_chunk=0,
        bptt_chunks=0,
    )
