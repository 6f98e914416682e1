"""What a CMS carries between calls: ``CMSState``, a value, and ``CMSBuffer``, the same updated in place for serving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hope_kernels.memory import MemoryState
from hope_kernels.memory.state import Weights, state_dtype

if TYPE_CHECKING:
    from hope_kernels.layers.level import Tokens
    from hope_kernels.layers.one_launch import OneLaunch


@dataclass(frozen=True, eq=False)
class CMSState:
    """The states of all levels of a :class:`hope_kernels.CMS` for a batch of sequences. Never changed in place.

    Attributes:
        position: tokens seen by every sequence.
        batch_size: sequences.
        levels: a :class:`hope_kernels.MemoryState` per level, None for a level that is never written. In a
            ``nested`` CMS a level's own position counts from its last reset.
    """

    position: int
    batch_size: int
    levels: tuple[MemoryState | None, ...]

    def detach(self) -> CMSState:
        """The same state without its history: gradients stop here."""
        return self._map(lambda level: level.detach())

    def to(self, *args: Any, **kwargs: Any) -> CMSState:
        """The state on another device or in another dtype, as :meth:`hope_kernels.MemoryState.to`."""
        return self._map(lambda level: level.to(*args, **kwargs))

    def index_select(self, indices: Tensor | Sequence[int]) -> CMSState:
        """The state whose sequence ``i`` is sequence ``indices[i]`` of this one (beam search); may repeat.

        Raises:
            ValueError, IndexError: as :meth:`hope_kernels.MemoryState.index_select`.
        """
        return replace(self._map(lambda level: level.index_select(indices)), batch_size=len(indices))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for ``torch.save``; :meth:`from_state_dict` is the inverse."""
        return {
            "position": self.position,
            "batch_size": self.batch_size,
            "levels": [None if level is None else level.state_dict() for level in self.levels],
        }

    @staticmethod
    def from_state_dict(state_dict: dict[str, Any]) -> CMSState:
        """The inverse of :meth:`state_dict`. Weights are the stored ones, no longer a layer's parameters.

        Raises:
            ValueError: a name is missing or unknown.
        """
        names = {"position", "batch_size", "levels"}
        if set(state_dict) != names:
            raise ValueError(f"state_dict: got names {sorted(state_dict)}; want {sorted(names)}")
        levels = (None if x is None else MemoryState.from_state_dict(x) for x in state_dict["levels"])
        return CMSState(state_dict["position"], state_dict["batch_size"], tuple(levels))

    def _map(self, function: Callable[[MemoryState], MemoryState]) -> CMSState:
        return replace(self, levels=tuple(None if level is None else function(level) for level in self.levels))


class LevelBuffer:
    """The state of one written level, with all storage allocated at once and updated in place.

    Attributes:
        weights, momentum: ``[B, N, in, out]`` in the state dtype; ``momentum`` is None for a level without.
        k, v: ``[B, C, N, D]``, of which the first ``pending`` tokens belong to the chunk in progress.
        lr, retention, momentum_gate: ``[B, C, N]`` gates of those tokens, None where the level has none.
        position: tokens seen.
    """

    def __init__(self, state: MemoryState, dtype: torch.dtype, *, retention: bool, momentum: bool) -> None:
        gate_dtype = state_dtype(dtype)
        held = state.stored_weights[0].dtype
        if state_dtype(held) != gate_dtype:
            raise TypeError(f"state: weights are {held}; want {gate_dtype} with tokens of {dtype}")
        if state.pending_k is not None and state.pending_k.dtype != dtype:
            raise TypeError(f"state: pending tokens are {state.pending_k.dtype}; want {dtype}, that of new tokens")

        def owned(x: Tensor) -> Tensor:
            return x.detach().to(gate_dtype, copy=True, memory_format=torch.contiguous_format)

        self.spec, self.chunk_size = state.spec, state.chunk_size
        self.position = state.position
        self.weights: Weights = tuple(owned(w) for w in state.weights)
        self.momentum: Weights | None = None
        if momentum:
            # Zeros and no momentum are the same to a write; one form keeps `step` free of cases.
            self.momentum = tuple(owned(m) for m in state.momentum or [torch.zeros_like(w) for w in self.weights])
        batch, heads, dim = self.weights[0].shape[:3]
        device = self.weights[0].device

        def storage(kept: Tensor | None, *tail: int, dtype: torch.dtype) -> Tensor:
            tokens = torch.zeros(batch, self.chunk_size, heads, *tail, dtype=dtype, device=device)
            if kept is not None:
                tokens[:, : self.pending].copy_(kept.detach())
            return tokens

        self.k = storage(state.pending_k, dim, dtype=dtype)
        self.v = storage(state.pending_v, dim, dtype=dtype)
        self.lr = storage(state.pending_lr, dtype=gate_dtype)
        self.retention = storage(state.pending_retention, dtype=gate_dtype) if retention else None
        self.momentum_gate = storage(state.pending_momentum, dtype=gate_dtype) if momentum else None

    @property
    def chunk_index(self) -> int:
        """Chunks written."""
        return self.position // self.chunk_size

    @property
    def pending(self) -> int:
        """Tokens kept of the chunk in progress."""
        return self.position % self.chunk_size

    @property
    def gates(self) -> tuple[bool, bool]:
        """Whether the level has a retention and a momentum gate."""
        return self.retention is not None, self.momentum_gate is not None

    @property
    def memory(self) -> MemoryState:
        """The weights and momentum as a state at the end of a chunk, sharing this buffer's storage."""
        return MemoryState(self.spec, self.chunk_size, self.weights, self.momentum, self.weights[0].shape[0])

    def append(self, tokens: Tokens) -> bool:
        """Keep one token per sequence; True when it completes the chunk, which is then to be written."""
        for kept, new in (
            (self.k, tokens.k),
            (self.v, tokens.v),
            (self.lr, tokens.lr),
            (self.retention, tokens.retention),
            (self.momentum_gate, tokens.momentum),
        ):
            if kept is not None:
                kept[:, self.pending].copy_(new[:, 0])
        self.position += 1
        return self.pending == 0

    def count(self, segment: int | None) -> None:
        """One token more, kept and where due written by others; back to 0 after ``segment`` tokens."""
        self.position += 1
        if self.position == segment:
            self.position = 0

    def replace(self, written: MemoryState) -> None:
        """Take over the weights and momentum after the write of a chunk."""
        _copy(self.weights, written.stored_weights)
        if self.momentum is not None:
            _copy(self.momentum, written.stored_momentum)

    def restart(self, weights: Sequence[Tensor]) -> None:
        """Back to initial weights ``[N, in, out]``, zero momentum, and token 0."""
        _copy(self.weights, weights)
        for momentum in self.momentum or ():
            momentum.zero_()
        self.position = 0

    def to_state(self) -> MemoryState:
        """The same as a value, sharing nothing with this buffer."""

        def kept(x: Tensor | None) -> Tensor | None:
            return x[:, : self.pending].clone() if x is not None and self.pending else None

        seen = self.position > 0
        return MemoryState(
            self.spec,
            self.chunk_size,
            tuple(w.clone() for w in self.weights),
            None if self.momentum is None or not self.chunk_index else tuple(m.clone() for m in self.momentum),
            batch_size=self.weights[0].shape[0],
            position=self.position,
            chunk_index=self.chunk_index,
            pending_count=self.pending,
            pending_k=kept(self.k),
            pending_v=kept(self.v),
            pending_lr=kept(self.lr),
            pending_retention=kept(self.retention),
            pending_momentum=kept(self.momentum_gate),
            has_retention=(self.retention is not None) if seen else None,
            has_momentum=(self.momentum is not None) if seen else None,
        )


def _copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for kept, new in zip(into, source, strict=True):
        kept.copy_(new)


class CMSBuffer:
    """The states of all levels for serving: made by ``CMS.make_buffer``, moved on in place by ``CMS.step``.

    It shares nothing with the layer's parameters or with the state it was made from.

    Attributes:
        batch_size: as in :class:`CMSState`.
        levels: a :class:`LevelBuffer` per level, None for a level that is never written. Their positions are those of
            the last ``step``, ``position`` or ``to_state``: replays of a captured graph move the device on alone.
        dtype: of the tokens it keeps.
        kernel: what makes a step one launch; None where levels are served one after the other.
        refused: why there is no ``kernel``.
    """

    def __init__(
        self,
        position: int,
        batch_size: int,
        levels: Sequence[LevelBuffer | None],
        dtype: torch.dtype,
        kernel: OneLaunch | None = None,
        refused: str | None = None,
    ) -> None:
        self.counted, self.batch_size, self.levels, self.dtype = position, batch_size, tuple(levels), dtype
        self.kernel, self.refused = kernel, refused

    @property
    def position(self) -> int:
        """Tokens seen by every sequence. Where a kernel counts them, this waits for the device."""
        self._recount()
        return self.counted

    def to_state(self) -> CMSState:
        """The state at this token as :meth:`CMS.stream` would have returned it; later steps do not change it.

        Where a kernel counts the tokens, this waits for the device.
        """
        self._recount()
        levels = tuple(None if level is None else level.to_state() for level in self.levels)
        return CMSState(self.counted, self.batch_size, levels)

    def _recount(self) -> None:
        """Take over the position from the device."""
        if self.kernel is None or not self.batch_size:
            return
        self.counted = self.kernel.position()
        for level, segment in zip(self.levels, self.kernel.segments, strict=True):
            if level is not None:
                level.position = self.counted % segment if segment else self.counted
