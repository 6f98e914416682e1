"""Which engines can run a scan here, and why not.

Backends are modules of this package that never import each other; their device code is imported on first use.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from hope_kernels.backends import choice
from hope_kernels.backends.interface import Backend, BackendStatus, ScanRequest

__all__ = [
    "FACTORED",
    "BackendStatus",
    "available_backends",
    "check_name",
    "implementation",
    "pair_engine",
    "refusal",
    "runs_together",
    "select",
]

_COMPILED = ("cpu", "triton", "cuda")
_REFERENCE = BackendStatus("reference", True, "eager PyTorch, chunk by chunk")
# What `backend=None` tries in turn, fastest first, where no table says so.
_PREFERENCE = {"cpu": ("cpu", "reference")}
_ANY_LENGTH = 2**31 - 1
# Behind any backend's name: the plan that keeps what is written as pairs (hope_kernels.memory.plan). It is the same for
# all, made of library products on the backend's device, but for products with pairs (pair_engine below).
FACTORED = ":factored"


@cache
def implementation(name: str) -> Backend:
    """A compiled backend: the module of that name, or what the module makes of ``name:option``."""
    base, _, option = name.partition(":")
    module = import_module(f"hope_kernels.backends.{base}")
    return module.with_option(option) if option else module


def _status(name: str) -> BackendStatus:
    if name == "reference":
        return _REFERENCE
    return implementation(name).status()


def available_backends() -> dict[str, BackendStatus]:
    """Status of every backend by name; ``bool(status)`` says whether it can run, ``status.reason`` why (not)."""
    return {name: _status(name) for name in ("reference", *_COMPILED)}


def check_name(backend: str | None) -> None:
    """That ``backend`` names a backend, available or not, and an option it has or the factored plan.

    Raises:
        ValueError: it does not.
    """
    if backend is None:
        return
    known = ("reference", *_COMPILED)
    name = backend.removesuffix(FACTORED) if isinstance(backend, str) else backend
    base, colon, option = name.partition(":") if isinstance(name, str) else (name, "", "")
    if base not in known:
        raise ValueError(f"backend is {backend!r}; want None or one of {', '.join(map(repr, known))}")
    if colon:
        module = import_module(f"hope_kernels.backends.{base}") if base in _COMPILED else None
        if not hasattr(module, "with_option"):
            raise ValueError(f"backend is {backend!r}; {base!r} takes no option")
        module.with_option(option)


def refusal(name: str, request: ScanRequest) -> str | None:
    """None when that backend can run such calls here, else the reason it cannot."""
    name = name.removesuffix(FACTORED)
    status = _status(name)
    if not status:
        return status.reason
    return None if name == "reference" else implementation(name).refuses(request)


def select(backend: str | None, request: ScanRequest) -> str:
    """Name of the backend that runs such calls.

    Args:
        backend: a name, obeyed or refused, or None for the fastest that can run them here.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend asked for cannot run this here; the message says why.
    """
    if torch.compiler.is_compiling():
        return _select_in_trace(backend, *request)
    return _select(backend, request)


def _select(backend: str | None, request: ScanRequest) -> str:
    if backend is None:
        if request.chunk_size is None:  # only one that takes whatever it will be
            request = request._replace(chunk_size=_ANY_LENGTH)
        return next(name for name in _candidates(request) if refusal(name, request) is None)
    check_name(backend)
    if request.chunk_size is None:  # what is too long for it the backend refuses when it runs
        request = request._replace(chunk_size=1)
    reason = refusal(backend, request)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run this: {reason}")
    return backend


def _candidates(request: ScanRequest) -> tuple[str, ...]:
    """What ``backend=None`` tries in turn."""
    if request.device.type == "cuda" and request.dtype != torch.float64:
        return *choice.engines_for(request), "reference"
    return _PREFERENCE.get(request.device.type, ("reference",))


def _select_in_trace(backend: str | None, *request: Any) -> str:
    """The choice as a constant of a trace, whose arguments must be constants too: plain values are to every PyTorch."""
    asked = ScanRequest(*request)
    name = _select(backend, asked)
    if name.endswith(FACTORED) and asked.table:
        raise RuntimeError(
            f"backend={backend!r} cannot run this: under torch.compile the factored plan takes neither cu_seqlens nor "
            f"valid nor a state made with one of them, whose numbers it needs on the host; want "
            f"backend={name.removesuffix(FACTORED)!r} or an uncompiled call"
        )
    return name


def pair_engine(backend: str | None, device: torch.device, operand: torch.dtype) -> Any:
    """Whose kernels multiply with written pairs: Triton's where it is the backend, else nobody's: the matrix library.

    Without a backend (``factored_scan``), Triton's on a GPU where it takes such operands. Never in a trace of
    ``torch.compile``, which cannot follow them.
    """
    if torch.compiler.is_compiling():
        return None
    name = ("triton" if device.type == "cuda" else "reference") if backend is None else backend.partition(":")[0]
    if name != "triton":
        return None
    engine = implementation(name)
    return None if engine.refuses_operands(operand, device) else engine


def runs_together(name: str) -> bool:
    """Whether a backend can run several scans that do not depend on one another at once."""
    return name != "reference" and not name.endswith(FACTORED) and hasattr(implementation(name), "scans_forward")


# The answers depend on nothing a trace could change, and looking them up imports modules, which a trace cannot follow.
# This is all that `torch.compiler.assume_constant_result` does; calling it would import the compiler and NumPy here.
_select_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]
runs_together._dynamo_marked_constant = True  # type: ignore[attr-defined]
