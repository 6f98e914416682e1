"""Pending tokens that gather in place: what a call adds is written behind what is there, which is not moved.

A state is never changed, and states of earlier calls stay what they were: they end before what is added. Only one state
can go on in place, the newest; whoever goes on from another one, or from the newest a second time, gets a copy. That
keeps a stream of single tokens from copying its whole chunk for every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hope_kernels.memory import plain

Tokens = tuple[Tensor | None, ...]  # keys, values, gates

WORTHWHILE = 1 << 17  # bytes of pending keys; up to there a concatenation takes no longer than what is done here


class Room(NamedTuple):
    """Memory for the pending tokens of a stream.

    Attributes:
        memory: ``[B, capacity, ...]`` for each tensor, None for what is not given.
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


def after(
    old: Tokens,
    new: Tokens,
    room: Room | None,
    *,
    most: int,
    grows: bool,
    unfinished: Callable[[Tensor | None, Tensor], Tensor | None],
    known: bool = False,
) -> tuple[Tokens, Room | None]:
    """The tokens pending after a call, and the room they are in.

    Args:
        old: those before, ``[B, P, ...]`` each and of one P; None for what is not given, or where there are none.
        new: the call's, ``[B, T, ...]``; None for what is not given.
        room: the one that ``old`` is in, if any.
        most: the most tokens that can be pending.
        grows: whether every row has ``old`` and then ``new`` pending.
        unfinished: what makes the tokens pending after the call of those before and the call's, in a copy.
        known: that all are the CPU's own tensors, no gradient is wanted and nobody watches.
    """
    if grows and _gathers(old, new, known):
        return _append(old, new, room, most)
    return tuple([x if x is None else unfinished(y, x) for y, x in zip(old, new, strict=True)]), None


def _gathers(old: Tokens, new: Tokens, known: bool) -> bool:
    """Whether there are many tokens and, if that is not known, no gradients, no tensors but the CPU's own, nobody who
    watches."""
    if old[0] is None or torch.compiler.is_compiling() or old[0].nbytes < WORTHWHILE:
        return False
    if known:
        return True
    given = [x for x in (*old, *new) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    return plain.unwatched() and all(plain.is_ordinary(x) for x in given)


def _append(old: Tokens, new: Tokens, room: Room | None, most: int) -> tuple[Tokens, Room]:
    """``old`` with ``new`` behind it: in place where it is its turn, else in another room."""
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
