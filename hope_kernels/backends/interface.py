"""What a compiled backend is given and what it gives back: the operator-level problem.

A backend is a module with ``status()``, ``refuses(request)``, ``saved_shapes``, ``scan_forward`` and
``scan_backward``. It sees neither validation nor autograd nor the state object: those are shared.

Letters: B batch rows, S sequences, T tokens per row, P pending tokens per sequence (capacity), N heads, D
features, C chunk size, M chunk rows of the coefficient tensors, K checkpoint interval.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.memory.spec import MemorySpec

# Columns of ``ScanProblem.sequences``.
ROW, START, LENGTH, PENDING, CHUNK_ROW, CHUNK_INDEX = range(6)


def state_dtype(tokens: torch.dtype) -> torch.dtype:
    """The dtype everything written has: float64 for float64 tokens, else float32."""
    return torch.float64 if tokens == torch.float64 else torch.float32


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here, and why (not). True in a boolean context when it can.

    ``interpreted``: it runs in an interpreter, exact but slow; what measures or checks every backend leaves it out
    unless it is named.
    """

    name: str
    available: bool
    reason: str
    interpreted: bool = False

    def __bool__(self) -> bool:
        return self.available


def build_info() -> dict[str, str | None]:
    """What the install wrote down about the compiled core; empty where it wrote nothing."""
    try:
        return json.loads(resources.files("hope_kernels").joinpath("_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


class ScanRequest(NamedTuple):
    """What a backend is chosen by: a call without its tensors and without its lengths.

    How many rows and tokens there are is not here, nor whether some are pending: every split of a stream into calls is
    to get the same backend, one that takes a scan takes its pending tokens. All fields are plain values, which a trace
    of ``torch.compile`` has as constants.

    Attributes:
        operation: ``"scan"`` (reads, writes and pending tokens), ``"read"`` or ``"write"`` (one chunk).
        key: of the spec, see :attr:`spec`.
        dtype, device: of the tokens.
        heads, dim, hidden: N, D and H.
        chunk_size: C; of a write the number of its tokens, of a read 1. None only while a trace does not know it:
            backends are never asked that.
        retention, momentum: whether the call has that gate.
        table: whether sequences are described by a table (packed or padded rows).
        gradients: whether the backward will be needed.
    """

    operation: str
    key: str
    dtype: torch.dtype
    device: torch.device
    heads: int
    dim: int
    hidden: int
    chunk_size: int | None
    retention: bool
    momentum: bool
    table: bool
    gradients: bool

    @property
    def spec(self) -> MemorySpec:
        from hope_kernels.memory.spec import MemorySpec

        return MemorySpec.from_key(self.key)


@dataclass(slots=True)
class ScanProblem:
    """One chunked scan: reads, writes or both, for every sequence and head.

    Token ``j`` of sequence ``s`` counts its pending tokens first: it is ``pending[s, j]`` for
    ``j < pending_s``, else token ``start_s + j - pending_s`` of batch row ``row_s``. Chunk ``c`` of a sequence
    covers its tokens ``cC .. cC + C - 1`` and is written only when all of them are there. New token ``t`` reads
    the state at the start of chunk ``(pending_s + t) // C``; pending tokens were read by an earlier call.

    Attributes:
        q: ``[B, T, N, D]``, or None to write only.
        k, v: ``[B, T, N, D]``, dtype of ``q``, or None to read only (then ``chunks`` is 0).
        pending_k, pending_v: ``[S, P, N, D]`` or None.
        step: ``[M, N, C]`` weight of each token's error in the write of W (``dgd``: the raw learning rate).
        retention: ``[M, N, C]``, ``dgd`` only: the raw retention, or None for 1.
        decay: ``[M, N]``, ``gd`` only: factor of the old W, or None for 1.
        momentum_step: ``[M, N, C]`` weight of each token's error in the write of the momentum, or None.
        momentum_carry: ``[M, N]`` how much of the chunk-start momentum enters W.
        momentum_decay: ``[M, N]`` factor of the old momentum.
        weights: initial weights, each ``[N, in, out]`` (shared) or ``[S, N, in, out]``, any strides; state
            dtype or dtype of ``q``.
        momentum: initial momentum, like ``weights`` in the state dtype; empty means zeros (or no momentum).
        sequences: int64 ``[S, 6]`` with the columns named above, or None when sequence ``s`` is batch row ``s``
            with all its T tokens, P pending ones and first chunk row ``s * chunks``.
        spec, chunk_size: as in the public functions.
        chunks: without ``sequences`` the complete chunks of each sequence, ``(P + T) // C``; with
            ``sequences`` the number M of chunk rows, an upper bound of what all sequences use together.
        first_chunk: without ``sequences`` the index, counted from the start of the stream, of the chunk in
            progress.
        bptt_chunks: 0, or n: the state written into every chunk index ``c = n, 2n, ..`` is detached.

    The coefficient tensors, ``momentum`` and everything written are float32 (float64 with float64 ``q``): the
    *state dtype*. Token tensors may have any strides.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    pending_k: Tensor | None
    pending_v: Tensor | None
    step: Tensor | None
    retention: Tensor | None
    decay: Tensor | None
    momentum_step: Tensor | None
    momentum_carry: Tensor | None
    momentum_decay: Tensor | None
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    sequences: Tensor | None
    spec: MemorySpec
    chunk_size: int
    chunks: int
    first_chunk: int
    bptt_chunks: int

    @property
    def tokens(self) -> Tensor:
        """``q``, or ``k`` where only a write is asked for."""
        return self.q if self.q is not None else self.k  # type: ignore[return-value]

    @property
    def token_tensors(self) -> tuple[Tensor | None, ...]:
        """``q, k, v, pending_k, pending_v``."""
        return self.q, self.k, self.v, self.pending_k, self.pending_v

    @property
    def coefficients(self) -> tuple[Tensor | None, ...]:
        """The scalars of the closed chunk form, in the order of the fields."""
        return (
            self.step,
            self.retention,
            self.decay,
            self.momentum_step,
            self.momentum_carry,
            self.momentum_decay,
        )

    @property
    def sequence_count(self) -> int:
        """S."""
        return self.tokens.shape[0] if self.sequences is None else self.sequences.shape[0]

    @property
    def chunk_rows(self) -> int:
        """M."""
        return self.chunks if self.sequences is not None else self.tokens.shape[0] * self.chunks

    @property
    def has_momentum(self) -> bool:
        return self.momentum_step is not None

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the coefficients and of everything written."""
        return state_dtype(self.tokens.dtype)

    @property
    def checkpoint_interval(self) -> int:
        """K, chunks between two checkpoints: the least power of two with ``K^2 >= chunks``.

        The forward keeps a state every K chunks and the backward rebuilds at most K at a time, so memory grows
        like the square root of the number of chunks. Powers of two, found by comparing, keep a symbolic length
        symbolic under ``torch.compile``: it recompiles when the interval doubles, not for every length.
        """
        interval = 1
        while interval * interval < self.chunks:
            interval *= 2
        return interval


class ScanGradients(NamedTuple):
    """Gradients of a scan, named as the inputs; None exactly where the input is None.

    ``weights`` and ``momentum`` are ``[S, N, in, out]`` in the state dtype: the shared operator sums them over
    the sequences in a fixed order.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    pending_k: Tensor | None
    pending_v: Tensor | None
    step: Tensor | None
    retention: Tensor | None
    decay: Tensor | None
    momentum_step: Tensor | None
    momentum_carry: Tensor | None
    momentum_decay: Tensor | None
    weights: list[Tensor]
    momentum: list[Tensor]


class Backend(Protocol):
    """The functions a backend module has.

    A backend that can run several scans at once, which do not depend on one another, also has ``scans_forward`` and
    ``scans_backward``: the functions below with a list in place of each argument and result (upstream gradients as
    one ``(output, weights, momentum)`` per scan).
    """

    def status(self) -> BackendStatus: ...

    def refuses(self, request: ScanRequest) -> str | None:
        """None when the backend can run such calls, backward included where ``gradients`` says so, else why not."""
        ...

    def saved_shapes(self, problem: ScanProblem) -> list[tuple[int, ...]]:
        """Shapes, in the state dtype, of what ``scan_forward`` saves for ``scan_backward``; what is in them is the
        backend's own business. Sizes may be symbolic: arithmetic and comparisons only."""
        ...

    def scan_forward(
        self, problem: ScanProblem, *, save: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Output ``[B, T, N, D]``, final weights, final momentum, what is saved (nothing unless ``save``).

        The output of tokens outside every sequence is 0 and an empty tensor when ``q`` is None. Final weights
        are ``[S, N, in, out]``, an empty list when nothing is written (``k`` is None); final momentum likewise, or
        without momentum. Saved tensors, fresh ones of :meth:`saved_shapes`, must grow no faster than the square
        root of the number of chunks: usually a state every K chunks.
        """
        ...

    def scan_backward(
        self,
        problem: ScanProblem,
        saved: list[Tensor],
        grad_output: Tensor | None,
        grad_weights: list[Tensor | None],
        grad_momentum: list[Tensor | None],
    ) -> ScanGradients:
        """Gradients given those of the output and of the final state (None means zero; any strides)."""
        ...
