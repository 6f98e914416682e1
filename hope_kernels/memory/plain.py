"""Calls of plain CPU tensors that nobody watches: what may be left out for them, which is most of a short call's time.

Two things are. *The checks*: all but those of values look at a call's signature (options, shapes, dtypes, what a state
holds), so a call with the signature of one that passed them passes them. *The dispatcher*: what it would do on the way
to the engine is nothing, so the engine may be called at once; that is the callers' choice where no gradient is wanted.

What is not known to be plain is not: a trace, a mode, a transform, a profiler, a subclass, a tensor with a dispatch key
that ordinary CPU tensors lack. Such a call has no signature, is checked as a whole and runs through the registered
operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _dispatch_keys, _dispatch_tls_local_include_set
from torch.autograd import forward_ad

from hope_kernels.memory.spec import MemorySpec
from hope_kernels.memory.state import MemoryState


def _raw(*names: str) -> int:
    return reduce(or_, (DispatchKeySet(getattr(DispatchKey, name)) for name in names)).raw_repr()


# Dispatch keys of an ordinary CPU tensor, and of one made in inference mode. Any other key is somebody's who wants to
# see the call: a subclass, a transform, a lazy conjugation, another layout or device.
_ORDINARY = frozenset({_raw("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"), _raw("CPU", "AutocastCPU")})
# Keys that every operator of this thread has beside those of its tensors, outside and inside inference mode. Modes,
# transforms and tracers add theirs.
_NO_MODE = frozenset({_raw("BackendSelect", "ADInplaceOrView"), _raw("BackendSelect")})
_TYPES = frozenset({Tensor, torch.nn.Parameter})


# Signatures kept, about a kilobyte each. When they are too many all go: those in use come back at one check each.
_MOST = 1024
_passed: set[tuple[Any, ...]] = set()


def without_modes() -> bool:
    """Whether no trace, mode or transform of this thread wants to see the operators it calls."""
    return (
        not torch.compiler.is_compiling()
        and _dispatch_tls_local_include_set().raw_repr() in _NO_MODE
        and not torch._C._len_torch_function_stack()
        and forward_ad._current_level < 0
    )


def unwatched() -> bool:
    """Whether operators that this thread calls run their implementations and nothing else, as far as modes go.

    One observer cannot be asked after: ``torch.profiler.ExecutionTraceObserver`` by itself, outside of a profiler.
    """
    return (
        without_modes()
        and not torch.autograd._profiler_enabled()  # of this thread
        and not torch.autograd.profiler._is_profiler_enabled  # of all threads
    )


def is_ordinary(x: Any) -> bool:
    """Whether a tensor is one of the CPU that nobody else wants to see: no subclass, no wrapper of a transform."""
    return type(x) in _TYPES and _dispatch_keys(x).raw_repr() in _ORDINARY


class Signature(NamedTuple):
    """All that checks and the choice of a backend look at of a call, but values.

    Attributes:
        key: of the call, hashable.
        gradients: whether its result depends on tensors that require gradients, which are wanted.
    """

    key: tuple[Any, ...]
    gradients: bool


def signature(
    operation: str, spec: Any, backend: Any, memory: Any, tensors: Iterable[Any], settings: Iterable[Any] = ()
) -> Signature | None:
    """The signature of a call, or None where there is to be none.

    Args:
        operation: ``"scan"``, ``"read"`` or ``"write"``.
        spec, backend, memory: arguments of the call as they came, unchecked.
        tensors: the other tensors of the call, None for what is not given.
        settings: the numbers of the call, None for what is not given.
    """
    if not unwatched() or type(spec) is not MemorySpec:
        return None
    if backend is not None and (type(backend) is not str or backend != "cpu"):
        return None
    for number in settings:
        if number is not None and type(number) is not int:  # True and 1.0 equal 1
            return None
    pending: tuple[Tensor | None, ...] = ()
    if type(memory) is MemoryState:
        if type(memory.position) is not int or type(memory.chunk_index) is not int or memory.factors is not None:
            return None
        key = [operation, spec, backend, *settings, *_facts(memory)]
        kept = (*memory.stored_weights, *(memory.stored_momentum or ()))
        if operation != "read":
            pending = memory.pending
    elif type(memory) is tuple or type(memory) is list:
        key = [operation, spec, backend, *settings]
        kept = memory
    else:
        return None
    graded, gradients = torch.is_grad_enabled(), False
    for x in (*tensors, *kept):
        if x is None:
            key.append(None)
        elif type(x) in _TYPES and _dispatch_keys(x).raw_repr() in _ORDINARY:
            key.append(x.shape)
            key.append(x.dtype)
            if graded and x.requires_grad:
                gradients = True
        else:
            return None
    for x in pending:
        if x is None:
            key.append(None)
        elif type(x) in _TYPES and _dispatch_keys(x).raw_repr() in _ORDINARY:
            key.append(x.dtype)  # how many they are changes from token to token, and no check looks at it
            if graded and x.requires_grad:
                gradients = True
        else:
            return None
    key.append(gradients)
    return Signature(tuple(key), gradients)


def _facts(state: MemoryState) -> tuple[Any, ...]:
    """What checks look at of a state beside its tensors."""
    return (
        state.spec,
        state.chunk_size,
        state.batch_size,
        state.chunk_index > 0,
        state.has_retention,
        state.has_momentum,
        len(state.stored_weights),
    )


def passed(call: Signature | None) -> bool:
    """Whether a call of this signature passed all checks and runs by the dense plan on the ``"cpu"`` backend."""
    return call is not None and call.key in _passed


def remember(call: Signature | None) -> None:
    """From now on calls of this signature have :func:`passed`."""
    if call is not None:
        if len(_passed) >= _MOST:
            _passed.clear()
        _passed.add(call.key)


def forget() -> None:
    """No call has passed: for whoever changes what backends there are or what they take.

    That is what :func:`hope_kernels.backends.select` asks, and the plan's thresholds; the package changes neither.
    """
    _passed.clear()
