"""Which engines can run a scan here, and why not.

Backends are modules of this package that never import each other; their device code is imported on first use.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from hope_kernels.backends.interface import BackendStatus

if TYPE_CHECKING:
    from hope_kernels.memory.spec import MemorySpec

__all__ = ["BackendStatus", "available_backends", "implementation", "select"]

_COMPILED = ("cpu",)
_MISSING = {
    "triton": "this version of hope_kernels has no Triton kernels",
    "cuda": "this version of hope_kernels has no CUDA kernels",
}
_REFERENCE = BackendStatus("reference", True, "eager PyTorch, chunk by chunk")
# Fastest first, per device type: what `backend=None` tries in turn.
_PREFERENCE = {"cpu": ("cpu", "reference")}


@cache
def implementation(name: str) -> ModuleType:
    """The module of a compiled backend (see :class:`hope_kernels.backends.interface.Backend`)."""
    return import_module(f"hope_kernels.backends.{name}")


def _status(name: str) -> BackendStatus:
    if name == "reference":
        return _REFERENCE
    if name in _MISSING:
        return BackendStatus(name, False, _MISSING[name])
    return implementation(name).status()


def available_backends() -> dict[str, BackendStatus]:
    """Status of every backend by name; ``bool(status)`` says whether it can run, ``status.reason`` why (not)."""
    return {name: _status(name) for name in ("reference", *_COMPILED, *_MISSING)}


def _refusal(name: str, spec: MemorySpec, dtype: torch.dtype, device: torch.device) -> str | None:
    status = _status(name)
    if not status:
        return status.reason
    return None if name == "reference" else implementation(name).refuses(spec, dtype, device)


def select(backend: str | None, spec: MemorySpec, dtype: torch.dtype, device: torch.device) -> str:
    """Name of the backend that runs this call.

    Args:
        backend: a name, obeyed or refused, or None for the fastest that can run here.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend asked for cannot run this here; the message says why.
    """
    if backend is None:
        candidates = _PREFERENCE.get(device.type, ("reference",))
        return next(name for name in candidates if _refusal(name, spec, dtype, device) is None)
    known = ("reference", *_COMPILED, *_MISSING)
    if backend not in known:
        raise ValueError(f"backend is {backend!r}; want None or one of {', '.join(map(repr, known))}")
    reason = _refusal(backend, spec, dtype, device)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run this: {reason}")
    return backend


# The answer depends on nothing a trace could change, and looking it up imports modules, which a trace cannot follow.
# This is all that `torch.compiler.assume_constant_result` does; calling it would import the compiler and NumPy here.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]
