"""Which tokens of a call lie in which chunk, with numbers known on the host.

A factored scan is a loop in Python over the chunks of a call, so the host must know how many there are. (The layouts of
:mod:`hope_kernels.memory.layout` keep that on the device, for kernels.) A sequence is its pending tokens followed by
its new ones; segment ``j`` is its tokens ``jC .. jC + C - 1`` in that order. Two schedules have the same jobs: the keys
of a segment for the sequences that complete it, its new tokens for all (reads), and outputs put back in place.

* :class:`UniformSchedule`: every row has T new and P pending tokens; slices, no copies.
* :class:`RaggedSchedule`: packed or padded sequences, or positions that differ; gathers, padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """``index`` j; ``rows``: the sequences that complete the chunk, None for all of them."""

    index: int
    rows: tuple[int, ...] | None

    @property
    def writes(self) -> bool:
        return self.rows is None or len(self.rows) > 0


class UniformSchedule:
    """``rows`` sequences of ``length`` new tokens after ``pending`` ones, ``0 <= pending < chunk_size``."""

    def __init__(self, rows: int, length: int, pending: int, chunk_size: int) -> None:
        self.rows, self.length, self.pending, self.chunk_size = rows, length, pending, chunk_size
        total = pending + length
        self.written = total // chunk_size * chunk_size
        self.rest = total - self.written
        count = (total + chunk_size - 1) // chunk_size if length else 0
        self.segments = [Segment(j, None if (j + 1) * chunk_size <= total else ()) for j in range(count)]

    def _span(self, segment: Segment) -> tuple[int, int]:
        start = segment.index * self.chunk_size - self.pending
        return max(start, 0), min(start + self.chunk_size, self.length)

    def keys(self, segment: Segment, pending: Tensor | None, new: Tensor) -> Tensor:
        """``[B, C, ...]`` of a complete segment, from pending ``[B, P, ...]`` and new tokens ``[B, T, ...]``."""
        start, stop = self._span(segment)
        part = new[:, start:stop]
        return torch.cat([pending, part], 1) if segment.index == 0 and pending is not None else part

    def reads(self, segment: Segment, new: Tensor) -> Tensor:
        """The new tokens of a segment, ``[B, width, ...]``."""
        start, stop = self._span(segment)
        return new[:, start:stop]

    def keys_hold_reads(self, segment: Segment) -> bool:
        """Whether the new tokens of a segment are among its keys at one place for all sequences, complete it is."""
        return segment.rows is None

    def reads_of_keys(self, segment: Segment, results: Tensor) -> Tensor:
        """Of results for the keys of a segment those of its new tokens, where keys hold them."""
        return results[:, self.pending :] if segment.index == 0 else results

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Results of the reads of every segment, at least one, as ``[B, T, ...]``."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)

    def unfinished(self, pending: Tensor | None, new: Tensor) -> Tensor | None:
        """Tokens of the chunk in progress after the call, a copy; None when there are none."""
        if self.rest == 0:
            return None
        if self.written == 0 and pending is not None:
            return torch.cat([pending, new], 1)
        return new[:, self.length - self.rest :].clone(memory_format=torch.contiguous_format)


class RaggedSchedule:
    """S sequences, each ``length[s]`` new tokens from ``start[s]`` of batch row ``row[s]``, after ``pending[s]`` ones.

    ``shape``: B and T of the new tokens.
    """

    def __init__(
        self,
        row: Sequence[int],
        start: Sequence[int],
        length: Sequence[int],
        pending: Sequence[int],
        chunk_size: int,
        shape: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.row, self.start, self.length, self.pending = row, start, length, pending
        self.rows, self.shape = len(row), shape
        self.chunk_size, self.device = chunk_size, device
        total = [p + n for p, n in zip(pending, length, strict=True)]
        self.written = [t // chunk_size * chunk_size for t in total]
        self.rest = [t - w for t, w in zip(total, self.written, strict=True)]
        self.segments = []
        for j in range((max(total, default=0) + chunk_size - 1) // chunk_size):
            rows = tuple(s for s, w in enumerate(self.written) if (j + 1) * chunk_size <= w)
            self.segments.append(Segment(j, None if len(rows) == len(total) else rows))

    def _index(self, values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)

    def _take(self, pending: Tensor | None, new: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """Tokens ``first .. first + count - 1`` of sequences ``s``, for spans ``(s, first, count)``; zeros beyond."""
        width = max((count for *_, count in spans), default=0)
        capacity = 0 if pending is None else pending.shape[1]
        source = new.flatten(0, 1) if pending is None else torch.cat([pending.flatten(0, 1), new.flatten(0, 1)])
        offset = 0 if pending is None else pending.shape[0] * capacity
        nothing = source.shape[0]  # one row of zeros behind the tokens
        source = torch.cat([source, source.new_zeros(1, *source.shape[1:])])
        table = []
        for s, first, count in spans:
            columns = []
            for m in range(first, first + count):
                if m < self.pending[s]:
                    columns.append(s * capacity + m)
                else:
                    columns.append(offset + self.row[s] * new.shape[1] + self.start[s] + m - self.pending[s])
            table.append(columns + [nothing] * (width - count))
        if not table or width == 0:
            return source.new_zeros(len(spans), width, *source.shape[1:])
        return source[self._index(table)]

    def keys(self, segment: Segment, pending: Tensor | None, new: Tensor) -> Tensor:
        rows = range(len(self.row)) if segment.rows is None else segment.rows
        return self._take(pending, new, [(s, segment.index * self.chunk_size, self.chunk_size) for s in rows])

    def _new(self, segment: Segment) -> list[tuple[int, int]]:
        """First token, counted with the pending ones, and number of new tokens of each sequence in a segment."""
        first, stop = segment.index * self.chunk_size, (segment.index + 1) * self.chunk_size
        spans = []
        for pending, length in zip(self.pending, self.length, strict=True):
            begin = max(first, pending)
            spans.append((begin, max(0, min(stop, pending + length) - begin)))
        return spans

    def reads(self, segment: Segment, new: Tensor) -> Tensor:
        return self._take(None, new, [(s, *span) for s, span in enumerate(self._new(segment))])

    def without_padding(self, new: Tensor) -> Tensor:
        """``new [B, T, ...]`` with zeros outside every sequence: gradients that rows share are to see no NaN there."""
        outside = torch.ones(self.shape, dtype=torch.bool)
        for row, start, length in zip(self.row, self.start, self.length, strict=True):
            outside[row, start : start + length] = False
        return new.masked_fill(outside.to(new.device).view(*self.shape, *[1] * (new.dim() - 2)), 0.0)

    def keys_hold_reads(self, segment: Segment) -> bool:
        return segment.rows is None and (segment.index > 0 or not any(self.pending))

    def reads_of_keys(self, segment: Segment, results: Tensor) -> Tensor:
        return results

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        result = parts[0].new_zeros(*self.shape, *parts[0].shape[2:])
        source: list[int] = []
        target: list[int] = []
        offset = 0
        for segment, part in zip(self.segments, parts, strict=True):
            for s, (begin, count) in enumerate(self._new(segment)):
                at = self.row[s] * self.shape[1] + self.start[s] + begin - self.pending[s]
                source += range(offset + s * part.shape[1], offset + s * part.shape[1] + count)
                target += range(at, at + count)
            offset += part.shape[0] * part.shape[1]
        if not source:
            return result
        values = torch.cat([part.flatten(0, 1) for part in parts])[self._index(source)]
        return result.flatten(0, 1).index_copy(0, self._index(target), values).view_as(result)

    def unfinished(self, pending: Tensor | None, new: Tensor) -> Tensor | None:
        """``[S, the most tokens of any, ...]``, zeros after each sequence's own."""
        if not any(self.rest):
            return None
        spans = [(s, w, r) for s, (w, r) in enumerate(zip(self.written, self.rest, strict=True))]
        return self._take(pending, new, spans)


Schedule = UniformSchedule | RaggedSchedule
