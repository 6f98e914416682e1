"""Where the tokens and chunks of every sequence lie.

A scan sees each sequence as its pending tokens followed by its new ones, cut into chunks of C. Two layouts have
the same three jobs: bring gates into chunk order (``chunks_of``), pick out the tokens of the unfinished chunk for
the next call (``unfinished``), and say how far each sequence has come (``advance``).

* :class:`UniformLayout`: every row has T new and P pending tokens; all numbers are Python ints.
* :class:`TableLayout`: packed (``cu_seqlens``) or padded (``valid``) sequences, or rows whose positions differ
  after such a call. Numbers live on the device; sizes are bounds taken from shapes, so nothing synchronises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hope_kernels.memory.state import MemoryState


@dataclass
class UniformLayout:
    """Rows of equal length at equal position."""

    rows: int
    length: int
    chunk_size: int
    pending: int
    position: int
    first_chunk: int

    sequences: None = None

    def __post_init__(self) -> None:
        total = self.pending + self.length
        self.chunks = total // self.chunk_size  # complete ones of each row
        self.rest = total - self.chunks * self.chunk_size  # tokens behind them

    def chunks_of(self, pending: Tensor | None, new: Tensor, fill: float) -> Tensor:
        """Gate values ``[B * chunks, N, C]`` from ``[B, P, N]`` and ``[B, T, N]``; ``fill`` is not needed here."""
        if self.chunk_size == 1:
            return new.reshape(self.rows * self.chunks, new.shape[2], 1).contiguous()
        gate = new if pending is None else torch.cat([pending, new], 1)
        chunks = gate.unfold(1, self.chunk_size, self.chunk_size)  # [B, chunks, N, C], what is left over dropped
        return chunks.reshape(self.rows * self.chunks, gate.shape[2], self.chunk_size).contiguous()

    def unfinished(self, pending: Tensor | None, new: Tensor) -> Tensor | None:
        """Tokens of the chunk in progress after this call, ``[B, (P + T) % C, ...]``; None when there are none.

        A copy: the caller may change its tensors in place afterwards, and a few tokens do not hold on to all.
        """
        if self.rest == 0:
            return None
        if self.chunks == 0:
            return new.clone(memory_format=torch.contiguous_format) if pending is None else torch.cat([pending, new], 1)
        return new[:, self.length - self.rest :].clone(memory_format=torch.contiguous_format)

    def advance(self) -> dict[str, Any]:
        return {
            "position": self.position + self.length,
            "chunk_index": self.first_chunk + self.chunks,
            "pending_count": self.rest,
        }


class TableLayout:
    """Sequences described by device tensors ``[S]``: batch row, first token, length, pending count, chunks."""

    def __init__(
        self,
        row: Tensor,
        start: Tensor,
        length: Tensor,
        state: MemoryState,
        chunk_size: int,
        capacity: int,
        chunks: int,
    ) -> None:
        def per_row(value: int | Tensor) -> Tensor:
            return value if isinstance(value, Tensor) else torch.full_like(row, value)

        self.row, self.start, self.length, self.rows = row, start, length, row.shape[0]
        self.chunk_size, self.capacity, self.chunks = chunk_size, capacity, chunks
        self.position = per_row(state.position)
        self.pending = per_row(state.pending_count).clamp(0, capacity)
        self.chunk_index = per_row(state.chunk_index)
        self.total = self.pending + length
        self.written = self.total // chunk_size
        self.chunk_end = self.written.cumsum(0)
        columns = (row, start, length, self.pending, self.chunk_end - self.written, self.chunk_index)
        self.sequences = torch.stack(columns, 1)

    def _take(self, pending: Tensor | None, new: Tensor, s: Tensor, j: Tensor, mask: Tensor, fill: float) -> Tensor:
        """Token ``j`` (pending first) of sequence ``s``, for index tensors of one shape; ``fill`` outside ``mask``."""
        tail = new.shape[2:]
        fresh = j - self.pending[s]
        mask_tail = mask.reshape(*mask.shape, *[1] * len(tail))
        if new.shape[0] * new.shape[1]:
            at = self.row[s] * new.shape[1] + (self.start[s] + fresh).clamp(0, new.shape[1] - 1)
            values = new.flatten(0, 1)[at]
        else:
            values = new.new_zeros(*mask.shape, *tail)
        if pending is not None and pending.shape[1]:
            old = pending.flatten(0, 1)[s * pending.shape[1] + j.clamp(0, pending.shape[1] - 1)]
            values = torch.where((fresh < 0).reshape(mask_tail.shape), old, values)
        return torch.where(mask_tail, values, torch.full((), fill, dtype=new.dtype, device=new.device))

    def chunks_of(self, pending: Tensor | None, new: Tensor, fill: float) -> Tensor:
        """Gate values ``[M, N, C]``; chunk rows that no sequence uses hold ``fill``."""
        rows = torch.arange(self.chunks, device=new.device)
        last = max(self.row.shape[0] - 1, 0)
        s = torch.searchsorted(self.chunk_end, rows, right=True).clamp(max=last)
        local = rows - (self.chunk_end - self.written)[s]
        j = local[:, None] * self.chunk_size + torch.arange(self.chunk_size, device=new.device)
        used = (rows < self.chunk_end[-1])[:, None].expand_as(j)
        s = s[:, None].expand_as(j)
        return self._take(pending, new, s, j, used, fill).transpose(1, 2).contiguous()

    def unfinished(self, pending: Tensor | None, new: Tensor) -> Tensor | None:
        """Tokens of each sequence's chunk in progress, ``[S, C - 1, ...]``, zeros after its count; None if C = 1."""
        if self.chunk_size == 1:
            return None
        offset = torch.arange(self.chunk_size - 1, device=new.device).expand(self.row.shape[0], -1)
        rest = self.total - self.written * self.chunk_size
        j = (self.written * self.chunk_size)[:, None] + offset
        s = torch.arange(self.row.shape[0], device=new.device)[:, None].expand_as(j)
        return self._take(pending, new, s, j, offset < rest[:, None], 0.0)

    def advance(self) -> dict[str, Any]:
        return {
            "position": self.position + self.length,
            "chunk_index": self.chunk_index + self.written,
            "pending_count": self.total - self.written * self.chunk_size,
        }


def make_layout(
    tokens: Tensor, state: MemoryState, chunk_size: int, cu_seqlens: Tensor | None, valid: Tensor | None
) -> UniformLayout | TableLayout:
    """The layout of one call: ``tokens [B, T, N, D]`` after the tokens pending in ``state``.

    Values on a GPU are not checked; starts and lengths are clamped here, once, so that no kernel that follows the
    table leaves the tensors.
    """
    batch, length = tokens.shape[:2]
    capacity = 0 if state.pending_k is None else state.pending_k.shape[1]
    if cu_seqlens is None and valid is None and not state.has_row_positions:
        return UniformLayout(batch, length, chunk_size, capacity, state.position, state.chunk_index)
    if cu_seqlens is not None:
        edges = cu_seqlens.long().clamp(0, length)
        edges = edges.cummax(0).values
        start, lengths = edges[:-1], edges.diff()
        row = torch.zeros_like(start)
        chunks = (length + start.shape[0] * capacity) // chunk_size
    else:
        row = torch.arange(batch, device=tokens.device)
        if valid is None:
            start, lengths = torch.zeros_like(row), torch.full_like(row, length)
        else:
            start = valid[:, 0].long().clamp(0, length)
            lengths = valid[:, 1].long().clamp(max=length) - start
            lengths = lengths.clamp(min=0)
        chunks = batch * ((length + capacity) // chunk_size)
    if row.shape[0] == 0:
        chunks = 0
    return TableLayout(row, start, lengths, state, chunk_size, capacity, chunks)
