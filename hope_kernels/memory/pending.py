"""Pending tokens that gather in place: what a call adds is written behind what is there, which is not moved.

A state is never changed, and states of earlier calls stay what they were: they end before what is added. Only one state
can go on in place, the newest; whoever goes on from another one, or from the newest a second time, gets a copy. That
keeps a stream of single tokens from copying its whole chunk for every one of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope_kernels.memory import plain
from hope_kernels.memory.state import MemoryState

Tokens = tuple[Tensor | None, ...]  # in the order of PENDING

WORTHWHILE = 1 << 17  # bytes of pending keys; up to there a concatenation takes no longer than what is done here


class Room(NamedTuple):
    """Memory for the pending tokens of a stream.

    Attributes:
        memory: ``[B, capacity, ...]`` for each tensor of :data:`~hope_kernels.memory.state.PENDING`, None for what is
            not given.
        newest: the pending tensors that reach furthest, or nothing once a call has gone on from them. Taken out in one
            step that no other thread can divide.
    """

    memory: Tokens
    newest: list[Tokens]

    def take(self, pending: Tokens) -> bool:
        """Whether ``pending`` may be gone on from in place: at most once for each."""
        try:
            held = self.newest.pop()
        except IndexError:
            return False
        if all(a is b for a, b in zip(held, pending, strict=True)):
            return True
        self.newest.append(held)
        return False


def gathers(state: MemoryState, new: Tokens, known: bool) -> bool:
    """Whether ``new`` is to be added to the pending tokens of ``state`` by :func:`append`: where these are many, no
    gradient is wanted, all are the CPU's own tensors and nobody watches; but for the first, that may be ``known``."""
    old = state.pending_k
    if old is None or torch.compiler.is_compiling() or old.nbytes < WORTHWHILE:
        return False
    if known:
        return True
    given = [x for x in (*state.pending, *new) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    return plain.unwatched() and all(plain.is_ordinary(x) for x in given)


def append(state: MemoryState, new: Tokens, most: int) -> tuple[Tokens, Room]:
    """The pending tokens of ``state`` with ``new`` behind them, and the room they are in.

    Args:
        state: a state with as many pending tokens in every row.
        new: keys, values ``[B, T, N, D]`` and gates ``[B, T, N]``; None where the state has none.
        most: the most tokens that can be pending.
    """
    old, room = state.pending, state.room
    count, total = old[0].shape[1], old[0].shape[1] + new[0].shape[1]
    fits = (
        room is not None
        and room.memory[0].shape[1] >= total
        and room.memory[0].is_inference() == torch.is_inference_mode_enabled()
    )
    if not (fits and room.take(old)):
        capacity = min(most, 2 * total)
        memory = [x if x is None else x.new_empty((x.shape[0], capacity, *x.shape[2:])) for x in old]
        for to, x in zip(memory, old, strict=True):
            if x is not None:
                to.narrow(1, 0, count).copy_(x)
        room = Room(tuple(memory), [])
    pending = []
    for to, x in zip(room.memory, new, strict=True):
        if x is not None:
            to.narrow(1, count, total - count).copy_(x)
            # A version counter of its own: a graph that holds earlier tokens need not mind what is written behind them.
            x = to.data.narrow(1, 0, total)
        pending.append(x)
    room.newest.append(tuple(pending))
    return tuple(pending), room
