"""Dense or factored: which plan a call of ``memory_scan``, ``memory_read`` or ``memory_write`` runs by.

The dense plan gives a sequence weights of its own at its first write; every engine has it. The factored plan
(:mod:`hope_kernels.memory.factored`) keeps what was written as pairs on the shared initial weights. A backend's name
with ``:factored`` behind it asks for the factored plan, a bare name for the dense one; None takes the rule below.

The rule looks at the spec, D, H, C, the device and how many tokens the sequence has written, and at nothing else: never
at the batch, the length of a call or whether gradients are needed. So every split of a stream into calls has the same
plan at the same token. While ``torch.compile`` traces, None is the dense plan: the factored one is a loop in Python
over the chunks of a call, which would be compiled anew for each number of them.
"""

from __future__ import annotations

import sys

import torch

from hope_kernels.backends import FACTORED
from hope_kernels.backends.interface import ScanRequest
from hope_kernels.memory.factors import merge_after
from hope_kernels.memory.spec import MemorySpec
from hope_kernels.memory.state import MemoryState

ALWAYS = sys.maxsize

# Elements of all weights of one head from which the factored plan is taken without being asked for: weights of a
# sequence's own then take 64 MiB in float32, and what they take is what limits the number of sequences. Below it decode
# of one sequence loses and splits would no longer have the same bits, for scans that gain up to 1.8 times (on the CPU
# up to D = 768, H = 3072: docs/factored.md). No measurement backs it on a GPU.
LEAST_ELEMENTS = 2**24

# Tokens of a chunk from which it is: each block written costs small products of its own, so that one row alone is
# slower than dense below. On the CPU with D = 768, H = 3072, B = 1, one thread: 1.15 to 3 times as slow at C = 4 to 64.
LEAST_CHUNK = 128


def refuses(request: ScanRequest, state: MemoryState, bptt_chunks: int | None = None) -> str | None:
    """None when the factored plan can run such calls from such a state, else the reason it cannot."""
    if state.spec.rule != "gd":
        return f"the factored plan writes with rule 'gd', got {state.spec.rule!r}"
    if request.momentum or state.has_momentum or state.stored_momentum is not None:
        return "the factored plan has no momentum"
    if bptt_chunks is not None:
        return "the factored plan has no bptt_chunks: what is detached is a sequence's own weights"
    if state.stored_weights[0].dim() != 3:
        return "the factored plan wants initial weights [heads, in, out] that all sequences share, or a factored state"
    return None


def pays(spec: MemorySpec, request: ScanRequest) -> bool:
    """Whether memories of this kind start factored where nobody says how: large ones (``LEAST_ELEMENTS``) in chunks of
    at least ``LEAST_CHUNK`` tokens, no more than :func:`merge_after` says, in rows of one position.
    """
    size = request.chunk_size
    elements = sum(a * b for a, b in spec.weight_shapes(request.dim, request.hidden))
    if elements < LEAST_ELEMENTS or request.table or size is None:
        return False
    return LEAST_CHUNK <= size <= merge_after(spec, request.dim, request.hidden)


def reads_factored(backend: str | None, request: ScanRequest, state: MemoryState) -> bool:
    """Whether a read of a state is by its pairs. One that is factored still is not merged for a read nobody names.

    Raises:
        RuntimeError: as :func:`factored_until`.
    """
    return factored_until(backend, request, state) == ALWAYS or (backend is None and state.factors is not None)


def factored_until(
    backend: str | None, request: ScanRequest, state: MemoryState, bptt_chunks: int | None = None
) -> int:
    """Tokens a sequence has written when its plan turns from factored to dense: 0 where it is dense from the start.

    Raises:
        RuntimeError: the factored plan is asked for by name and cannot run this; the message says why.
    """
    reason = refuses(request, state, bptt_chunks)
    if backend is not None:
        if not backend.endswith(FACTORED):
            return 0
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} cannot run this: {reason}")
        return ALWAYS
    if reason is not None or state.has_row_positions or torch.compiler.is_compiling() or not pays(state.spec, request):
        return 0
    # Factored as long as a chunk starts with no more pairs than that.
    return (merge_after(state.spec, request.dim, request.hidden) // request.chunk_size + 1) * request.chunk_size
