"""``HopeCache``: what a Hope model carries from call to call, as an object that ``generate`` passes around.

Rows of a batch may be at different tokens, since padding is not counted; a :class:`HopeState` is of sequences at one
token. So the cache holds its rows in groups, one for each number of tokens read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hope_kernels.models import HopeModel, HopeState


@dataclass
class _Group:
    """Rows of a batch that have read equally many tokens.

    Attributes:
        rows: their places in the batch.
        state: of all they read, but for ``again``; None before the first token.
        again: ``[R, P, dim]``, tokens behind ``state`` that a :meth:`HopeCache.crop` left, to be read once more.
        base, since: while the cache records, a state some calls ago (None before the first token) and the tokens
            ``[R, T, dim]`` of the calls since.
    """

    rows: list[int]
    state: HopeState | None = None
    again: Tensor | None = None
    base: HopeState | None = None
    since: list[Tensor] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Tokens that these rows have read."""
        read = 0 if self.state is None else self.state.position
        return read + (0 if self.again is None else self.again.shape[1])

    def select(self, chosen: list[int], rows: list[int]) -> _Group:
        """Members ``chosen`` (they may repeat), to be found at places ``rows``."""
        if chosen == list(range(len(self.rows))):
            return _Group(rows, self.state, self.again, self.base, list(self.since))

        def of_state(state: HopeState | None) -> HopeState | None:
            return None if state is None else state.index_select(chosen)

        again = None if self.again is None else self.again[chosen]
        return _Group(rows, of_state(self.state), again, of_state(self.base), [x[chosen] for x in self.since])


class HopeCache(Cache):
    """The states of a batch of sequences, for :class:`TransformersHopeForCausalLM`.

    Its size does not depend on how much was read, unless the model has attention without a window. It is changed in
    place by every call that is given it; ``copy.deepcopy`` makes another, for a prompt that several answers share. Rows
    are reordered, selected and repeated as in any cache. With gradients the states keep their history, which
    :meth:`detach` cuts off.

    What was read can be taken back (:meth:`crop`) where :meth:`activate_past_recording` was called before, as assisted
    generation does: the tokens since the last ``crop`` are then kept, with the state before them, until
    :meth:`deactivate_past_recording`.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._groups: list[_Group] = []
        self._columns = 0
        self._recording = False
        self._removable = 0  # of the last columns, those that are recorded and no row's padding

    def __repr__(self) -> str:
        return f"HopeCache(batch_size={self.batch_size}, seq_length={self._columns})"

    def __len__(self) -> int:
        """Blocks of the model; 0 before the first call."""
        return next((len(group.state.blocks) for group in self._groups if group.state is not None), 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of ``input_ids`` so far, padding counted."""
        return self._columns

    def positions(self) -> list[int]:
        """Tokens that each row has read, padding not counted; ``[]`` before the first call."""
        found = {row: group.position for group in self._groups for row in group.rows}
        return [found[row] for row in range(len(found))]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._columns + query_length, 0

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first call."""
        return sum(len(group.rows) for group in self._groups) if self._groups else -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self._groups)

    @property
    def is_croppable(self) -> bool:
        return self._recording

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self._recording

    def activate_past_recording(self) -> None:
        """Keep from now on what :meth:`crop` needs."""
        if not self._recording:
            self._recording = True
            self._forget()

    def deactivate_past_recording(self) -> None:
        """Keep no more, and forget what was kept: nothing read so far can be taken back."""
        if self._recording:
            self._recording = False
            self._forget()

    def reset(self) -> None:
        """Nothing has been read, by no sequence."""
        self._groups, self._columns, self._removable = [], 0, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """As :meth:`reorder_cache`, with any number of rows; a boolean mask keeps those that are True."""
        indices = torch.as_tensor(indices)
        self._select((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one behind the other."""
        self._select([row for row in range(max(0, self.batch_size)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` columns back, as if they had never been read.

        What is left of the calls since the last ``crop`` is read once more by the next call.

        Args:
            tokens_to_remove: 0 or negative, as in the library.

        Raises:
            ValueError: it is positive, more than was recorded, or was not recorded at all: a memory that was written
                cannot be unwritten. The cache is then unchanged.
        """
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(
                f"crop: got {tokens_to_remove}; want minus the number of tokens to remove from the end, or 0"
            )
        if count > self._removable:
            why = (
                f"the last {self._removable} of {self._columns} columns were recorded without padding"
                if self._recording
                else "a memory that was written keeps no past; want activate_past_recording() called before"
            )
            raise ValueError(f"crop: got {tokens_to_remove}, to remove {count} tokens, but {why}")
        if count:
            for group in self._groups:
                since = torch.cat(group.since, 1)
                left = since[:, : since.shape[1] - count]
                group.state, group.again = group.base, left if left.shape[1] else None
                group.base, group.since = None, []
        self._columns -= count
        self._forget()

    def detach(self) -> None:
        """Cut the states off from the graph that made them: gradients of later calls stop here."""
        for group in self._groups:
            group.state = None if group.state is None else group.state.detach()
            group.base = None if group.base is None else group.base.detach()
            group.again = None if group.again is None else group.again.detach()
            group.since = [x.detach() for x in group.since]

    def read(
        self, model: HopeModel, x: Tensor, valid: Tensor | None = None, layers: list[Tensor] | None = None
    ) -> Tensor:
        """Features ``[B, T, dim]`` of tokens ``x [B, T, dim]`` behind those of the cache, which then holds them too.

        Args:
            valid: ``[B, 2]``, first and one past the last real token of each row; the others are not read, and their
                features are 0. None: all are real.
            layers: see :meth:`HopeModel.read`.

        Raises:
            ValueError: the cache is of another batch size or another model; it is then unchanged.
        """
        rows, length = x.shape[:2]
        if self._groups and self.batch_size != rows:
            raise ValueError(
                f"past_key_values: holds {self.batch_size} sequences, and {rows} came; want as many, or a new cache"
            )
        spans = [(0, length)] * rows if valid is None else [tuple(span) for span in valid.tolist()]
        everyone, whole = list(range(rows)), all(span == (0, length) for span in spans)
        after, parts = [], []
        for group in self._groups or [_Group(everyone)]:
            for chosen in _by_count(group.rows, spans):
                members = [group.rows[i] for i in chosen]
                part = group.select(chosen, members)
                place = None if whole and members == everyone else _places(members, spans, x.device)
                found: list[Tensor] | None = None if layers is None else []
                features = self._read_group(part, model, x if place is None else x[place], found)
                after.append(part)
                parts.append((place, [*(found or []), features]))
        joined = _joined(parts, x)
        if layers is not None:
            layers.extend(joined[:-1])
        self._groups, self._columns = after, self._columns + length
        # Trailing columns that are real in all rows: what a crop can take back.
        if not self._recording:
            self._removable = 0
        elif whole:
            self._removable += length
        else:
            self._removable = min(stop - start if stop == length else 0 for start, stop in spans)
        return joined[-1]

    def _read_group(self, group: _Group, model: HopeModel, x: Tensor, layers: list[Tensor] | None) -> Tensor:
        """What :meth:`read` does for rows at one token, ``x [R, T, dim]``; moves ``group`` on."""
        state = model.init_state(len(group.rows)) if group.state is None else group.state
        model.check_state(state, len(group.rows))
        if group.again is not None:
            state = model.read(group.again, state)[1]
            group.again = None
            group.base = state if self._recording else None
        features, group.state = model.read(x, state, layers)
        if self._recording:
            group.since.append(x)
        return features

    def _forget(self) -> None:
        """What was read so far stays read."""
        self._removable = 0
        for group in self._groups:
            group.base, group.since = group.state if self._recording else None, []

    def _select(self, indices: list[int]) -> None:
        if not self._groups:
            return
        places = {row: (group, i) for group in self._groups for i, row in enumerate(group.rows)}
        if any(index not in places for index in indices):
            raise IndexError(f"indices: got {indices}; want rows 0 to {self.batch_size - 1}")
        selected = []
        for group in self._groups:
            chosen = [(new, places[old][1]) for new, old in enumerate(indices) if places[old][0] is group]
            if chosen:
                selected.append(group.select([i for _, i in chosen], [new for new, _ in chosen]))
        self._groups = selected


def read_fresh(model: HopeModel, x: Tensor, valid: Tensor | None, layers: list[Tensor] | None = None) -> Tensor:
    """Features ``[B, T, dim]`` of fresh sequences, which leave no state; arguments as :meth:`HopeCache.read`.

    One call for all rows: their real tokens are moved to the front, where what is behind them has no effect on them.
    """
    if valid is None:
        return model.read(x, layers=layers)[0]
    first, stop = valid[:, :1], valid[:, 1:]
    at = torch.arange(x.shape[1], device=x.device)
    longest = max(1, int((stop - first).max()))
    there = (first + at[:longest]).clamp(max=x.shape[1] - 1)
    back = (at - first).clamp(0, longest - 1)
    padding = ((at < first) | (at >= stop))[..., None]

    def moved(x: Tensor, columns: Tensor) -> Tensor:
        return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))

    found: list[Tensor] | None = None if layers is None else []
    features = model.read(moved(x, there), layers=found)[0]
    if layers is not None:
        layers.extend(moved(layer, back).masked_fill(padding, 0) for layer in found)
    return moved(features, back).masked_fill(padding, 0)


def _by_count(rows: list[int], spans: Sequence[Any]) -> list[list[int]]:
    """Places in ``rows``, those with equally many real tokens together; no places together where there are no rows."""
    found: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        start, stop = spans[row]
        found.setdefault(stop - start, []).append(i)
    return list(found.values()) or [[]]


def _places(rows: list[int], spans: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row ``[R, 1]`` and column ``[R, T]`` of each real token of ``rows``, which have equally many."""
    start = torch.tensor([spans[row][0] for row in rows], device=device)[:, None]
    count = spans[rows[0]][1] - spans[rows[0]][0]
    return torch.tensor(rows, device=device)[:, None], start + torch.arange(count, device=device)


def _joined(parts: list[tuple[tuple[Tensor, Tensor] | None, list[Tensor]]], x: Tensor) -> list[Tensor]:
    """The tensors of all groups, each ``[R, T', dim]`` at its places, as ``[B, T, dim]`` with 0 elsewhere.

    A group without places is the only one, and everything.
    """
    if parts[0][0] is None:
        return parts[0][1]
    joined = [x.new_zeros(x.shape, dtype=tensor.dtype) for tensor in parts[0][1]]
    for place, tensors in parts:
        joined = [all_.index_put(place, one) for all_, one in zip(joined, tensors, strict=True)]
    return joined
