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
        position: tokens seen; an int when all sequences agree, else int64 ``[B]`` on the CPU.
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
        self.position: int | Tensor = state.position
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
    def pending(self) -> int | Tensor:
        """Tokens kept of the chunk in progress, in the form of ``position``."""
        return self.position % self.chunk_size

    @property
    def gates(self) -> tuple[bool, bool]:
        """Whether the level has a retention and a momentum gate."""
        return self.retention is not None, self.momentum_gate is not None

    @property
    def _storage(self) -> tuple[Tensor | None, ...]:
        """What is kept of tokens."""
        return self.k, self.v, self.lr, self.retention, self.momentum_gate

    def append(self, tokens: Tokens) -> None:
        """Keep one token per sequence."""
        pending = self.pending
        rows = None if isinstance(pending, int) else torch.arange(len(self.k), device=self.k.device)
        for kept, new in zip(self._storage, tokens, strict=True):
            if kept is None:
                continue
            if rows is None:
                kept.narrow(1, pending, 1).copy_(new)
            else:
                kept[rows, pending.to(kept.device)] = new[:, 0]
        self.position = self.position + 1

    def due(self, period: int) -> slice | Tensor | None:
        """The sequences for which the last token was the last of ``period`` tokens: all, int64 ``[R]``, or None."""
        if isinstance(self.position, int):
            return None if self.position % period else slice(None)
        rows = (self.position % period == 0).nonzero().squeeze(1)
        return rows.to(self.k.device) if len(rows) else None

    def chunk(self, rows: slice | Tensor) -> tuple[MemoryState, dict[str, Tensor | None]]:
        """What ``memory_write`` takes of the sequences ``rows``, which have completed a chunk: their memory, sharing
        this buffer's storage where ``rows`` are all, and their tokens.
        """
        weights = tuple(w[rows] for w in self.weights)
        momentum = None if self.momentum is None else tuple(m[rows] for m in self.momentum)
        memory = MemoryState(self.spec, self.chunk_size, weights, momentum, len(weights[0]))
        names = "k", "v", "lr", "retention", "momentum"
        tokens = (None if kept is None else kept[rows] for kept in self._storage)
        return memory, dict(zip(names, tokens, strict=True))

    def count(self, segment: int | None) -> None:
        """One token more, kept and where due written by others; back to 0 after ``segment`` tokens."""
        self.position = self.position + 1
        if segment is not None:
            self.position = self.position % segment

    def take_over(self, written: MemoryState, rows: slice | Tensor) -> None:
        """The weights and momentum of the sequences ``rows`` after the write of a chunk."""
        _copy(self.weights, written.stored_weights, rows)
        if self.momentum is not None:
            _copy(self.momentum, written.stored_momentum, rows)

    def restart(self, weights: Sequence[Tensor], rows: slice | Tensor) -> None:
        """Initial weights ``[N, in, out]`` and zero momentum again for the sequences ``rows``."""
        _copy(self.weights, weights, rows)
        for momentum in self.momentum or ():
            momentum[rows] = 0

    def replace(self, rows: Tensor, other: LevelBuffer) -> None:
        """The sequences ``rows`` (int64 ``[R]`` on the CPU) become those of ``other``, a buffer of the same level."""
        here = rows.to(self.k.device)
        _copy(self.weights, other.weights, here)
        _copy(self.momentum or (), other.momentum or (), here)
        for kept, new in zip(self._storage, other._storage, strict=True):
            if kept is not None:
                kept[here] = new

    def to_state(self, rows: slice | Tensor, position: int) -> MemoryState:
        """The sequences ``rows``, which all stand at ``position``, as a value that shares nothing with this buffer."""
        pending, chunks = position % self.chunk_size, position // self.chunk_size

        def copied(x: Tensor) -> Tensor:
            return x[rows].clone()

        def kept(x: Tensor | None) -> Tensor | None:
            return copied(x[:, :pending]) if x is not None and pending else None

        seen = position > 0
        weights = tuple(copied(w) for w in self.weights)
        return MemoryState(
            self.spec,
            self.chunk_size,
            weights,
            None if self.momentum is None or not chunks else tuple(copied(m) for m in self.momentum),
            batch_size=len(weights[0]),
            position=position,
            chunk_index=chunks,
            pending_count=pending,
            pending_k=kept(self.k),
            pending_v=kept(self.v),
            pending_lr=kept(self.lr),
            pending_retention=kept(self.retention),
            pending_momentum=kept(self.momentum_gate),
            has_retention=(self.retention is not None) if seen else None,
            has_momentum=(self.momentum is not None) if seen else None,
        )


def _copy(into: Sequence[Tensor], source: Sequence[Tensor], rows: slice | Tensor) -> None:
    for kept, new in zip(into, source, strict=True):
        kept[rows] = new.to(kept.dtype)


class CMSBuffer:
    """The states of all levels for serving: made by ``CMS.make_buffer``, moved on in place by ``CMS.step``.

    It shares nothing with the layer's parameters or with the state it was made from.

    Attributes:
        batch_size: as in :class:`CMSState`.
        levels: a :class:`LevelBuffer` per level, None for a level that is never written. Their positions are those of
            the last ``step``, ``position`` or ``to_state``: replays of a captured graph move the device on alone.
        segments: per level, the tokens after which it starts again, or None.
        dtype: of the tokens it keeps.
        kernel: what makes a step one launch; None where levels are served one after the other.
        refused: why there is no ``kernel``.
    """

    def __init__(
        self,
        position: int,
        batch_size: int,
        levels: Sequence[LevelBuffer | None],
        segments: Sequence[int | None],
        dtype: torch.dtype,
        kernel: OneLaunch | None = None,
        refused: str | None = None,
    ) -> None:
        self.counted: int | Tensor = position
        self.batch_size, self.levels, self.dtype = batch_size, tuple(levels), dtype
        self.segments, self.kernel, self.refused = tuple(segments), kernel, refused

    @property
    def position(self) -> int | Tensor:
        """Tokens seen: an int when all sequences agree, else int64 ``[B]`` on the CPU.

        Where a kernel counts them, this waits for the device.
        """
        if self.kernel is not None and self.batch_size:
            self._move_to(self.kernel.positions.cpu())
        return self.counted if isinstance(self.counted, int) else self.counted.clone()

    def to_state(self, rows: Tensor | Sequence[int] | None = None) -> CMSState:
        """The state at this token as :meth:`CMS.stream` would have returned it; later steps do not change it.

        Where a kernel counts the tokens, this waits for the device.

        Args:
            rows: the sequences, which stand at one token; None for all.

        Raises:
            ValueError, IndexError: ``rows`` are no sequences of this buffer, or stand at different tokens.
        """
        position, here = self.position, slice(None)
        if rows is not None:
            named = self.checked_rows(rows)
            position = position if isinstance(position, int) else agreed(position[named])
            here = named.to(next((level.k.device for level in self.levels if level is not None), "cpu"))
        if rows is not None and not len(named):
            position = 0
        if not isinstance(position, int):
            raise ValueError(f"rows: its sequences stand at tokens {position.tolist()}; want some that stand at one")
        levels = (
            None if level is None else level.to_state(here, position % segment if segment else position)
            for level, segment in zip(self.levels, self.segments, strict=True)
        )
        return CMSState(position, self.batch_size if rows is None else len(named), tuple(levels))

    def replace(self, rows: Tensor, levels: Sequence[LevelBuffer | None], position: int) -> None:
        """The sequences ``rows`` (int64 ``[R]`` on the CPU) become those of buffers for R sequences at ``position``."""
        positions = self.position
        if isinstance(positions, int):
            positions = torch.full((self.batch_size,), positions)
        positions = positions.clone()
        positions[rows] = position
        for level, other in zip(self.levels, levels, strict=True):
            if level is not None:
                level.replace(rows, other)
        self._move_to(positions)
        if self.kernel is not None:
            self.kernel.replace(rows, position)

    def checked_rows(self, rows: Tensor | Sequence[int]) -> Tensor:
        """``rows`` as int64 ``[R]`` on the CPU.

        Raises:
            ValueError, IndexError: they are no different sequences of this buffer.
        """
        if not isinstance(rows, Tensor | Sequence) or isinstance(rows, str):
            raise TypeError(f"rows: got {rows!r}; want whole numbers [R]")
        found = torch.as_tensor(rows, device="cpu")
        fits = found.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8) or not found.numel()
        if found.dim() != 1 or not fits:
            raise ValueError(f"rows: got {found.dtype} of shape {tuple(found.shape)}; want whole numbers [R]")
        found = found.to(torch.int64)
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < self.batch_size:
            raise IndexError(f"rows: got {found.tolist()}; want numbers from 0 to {self.batch_size - 1}")
        if len(found.unique()) < len(found):
            raise ValueError(f"rows: got {found.tolist()}; want each sequence once")
        return found

    def _move_to(self, positions: Tensor) -> None:
        """Every sequence stands at ``positions``, int64 ``[B]`` on the CPU."""
        self.counted = agreed(positions)
        for level, segment in zip(self.levels, self.segments, strict=True):
            if level is not None:
                level.position = agreed(positions % segment) if segment else self.counted


def agreed(positions: Tensor) -> int | Tensor:
    """The position of all sequences where they agree, else ``positions``, int64 ``[B]``, as they are."""
    if len(positions) and bool((positions == positions[0]).all()):
        return int(positions[0])
    return positions
