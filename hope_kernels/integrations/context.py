"""What MLPs with a memory are told of a call besides their input: which state goes on, and which tokens are real.

A pre-trained model calls its MLPs with hidden states alone. Whoever knows more, the model's hooks or a user with
:func:`carrying`, says it here, and the MLPs that are called inside read it. A context variable holds it, so threads
and nested models do not see each other's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# A cache takes back what it was given last when guesses turn out wrong: so many tokens at least, of those given.
UNDOABLE_TOKENS = 64


@dataclass(frozen=True)
class Step:
    """A call that can be taken back: what it was given (``tokens [B, T, ..]`` each) and, maybe, the state before it.

    States grow with the text, so few steps hold one: others are run again from the last step before them that does.

    Attributes:
        again: runs the call again; a weak reference, so that a cache keeps no model alive.
        holds: whether ``state``, None at the beginning of a context, is the one before the call.
    """

    tokens: tuple[Tensor | None, ...]
    valid: Tensor | None
    again: weakref.WeakMethod[Callable[..., Any]]
    state: Any = None
    holds: bool = True

    @property
    def length(self) -> int:
        return self.tokens[0].shape[1]

    def without_state(self) -> Step:
        return replace(self, state=None, holds=False)

    def shortened(self, tokens: int) -> Step:
        """The call without its last ``tokens`` tokens."""
        length = self.length - tokens
        valid = None if self.valid is None else self.valid.clamp(max=length)
        return replace(self, tokens=tuple(None if x is None else x[:, :length] for x in self.tokens), valid=valid)

    def joined(self, other: Step) -> Step:
        """This call and the next as one; both without padding."""
        pairs = zip(self.tokens, other.tokens, strict=True)
        return replace(self, tokens=tuple(None if x is None else torch.cat([x, y], 1) for x, y in pairs))

    def after(self, state: Any) -> Any:
        """The state after the call, from the one before."""
        return self.again()(state, self.tokens, self.valid)


@dataclass
class CMSContext:
    """The states of all memories of a model after the tokens of one batch: what is carried from call to call.

    Make an empty one for the beginning of a context. States are immutable, so a copy shares them and goes on by itself,
    as after a shared prompt: ``copy.deepcopy`` copies no tensor.

    Attributes:
        states: the state of each MLP's memory, by the MLP's name; none before the first token.
        rows: sequences of the batch.
    """

    states: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    steps: dict[str, list[Step]] = field(default_factory=dict, repr=False)

    def __copy__(self) -> CMSContext:
        return CMSContext(dict(self.states), self.rows, {name: list(steps) for name, steps in self.steps.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> CMSContext:
        return self.__copy__()

    def __getstate__(self) -> dict[str, Any]:
        # A step refers to the module that can run it again, which is not to be stored with the states.
        return {"states": self.states, "rows": self.rows, "steps": {}}

    def reset(self) -> None:
        """Forget everything: the next token is a context's first."""
        self.states.clear()
        self.steps.clear()

    def detach(self) -> None:
        """Cut the states off from the graph that made them."""
        self.states = {name: state.detach() for name, state in self.states.items()}
        self.steps.clear()

    def index_select(self, indices: Tensor) -> None:
        """Keep, reorder or repeat sequences: row ``i`` goes on as row ``indices[i]`` was (beam search)."""
        self.states = {name: state.index_select(indices) for name, state in self.states.items()}
        self.rows = len(indices)
        self.steps.clear()

    def repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, copies beside each other."""
        self.index_select(torch.arange(self.rows).repeat_interleave(repeats))

    def remember(self, name: str, step: Step) -> None:
        """Note a call that may be taken back, with the state before it.

        States are kept that are at least ``UNDOABLE_TOKENS`` tokens apart, and no more of them than it takes to take
        back so many: three at most, however long the text and its calls.
        """
        steps = self.steps.setdefault(name, [])
        held = [i for i, kept in enumerate(steps) if kept.holds]
        if held and sum(kept.length for kept in steps[held[-1] :]) < UNDOABLE_TOKENS:
            step = step.without_state()
        else:
            held.append(len(steps))
        steps.append(step)
        enough = [i for i in held if sum(kept.length for kept in steps[i:]) >= UNDOABLE_TOKENS]
        if enough:
            del steps[: enough[-1]]

    def check_undo(self, tokens: int) -> None:
        """That :meth:`undo` can take back so many tokens.

        Raises:
            ValueError: they are more than that, or the model is gone.
        """
        for name in self.states:
            known = sum(step.length for step in self.steps.get(name, []))
            if tokens and known and self.steps[name][0].again() is None:
                raise ValueError(
                    f"crop: the model whose memory {name} is in the cache is gone; want it kept until then"
                )
            if known < tokens:
                raise ValueError(
                    f"crop: got {tokens} tokens to take back, and {name} knows its last {known}: memories keep about "
                    f"{UNDOABLE_TOKENS} tokens; none of calls with gradients, none from before beams were reordered, "
                    "the cache was stored or the scale was 0. Start from an empty cache, or from a copy.deepcopy of "
                    "the cache made before those tokens"
                )

    def undo(self, tokens: int) -> None:
        """Take back the last ``tokens`` tokens (columns of the batch, padding included) of every memory.

        Raises:
            ValueError: they are more than can be taken back; nothing is changed.
        """
        self.check_undo(tokens)
        if tokens == 0:
            return
        for name in list(self.states):
            state, self.steps[name] = self._taken_back(self.steps[name], tokens)
            if state is None:
                del self.states[name]
            else:
                self.states[name] = state

    @staticmethod
    def _taken_back(steps: list[Step], tokens: int) -> tuple[Any, list[Step]]:
        """The state without the last ``tokens`` tokens of ``steps``, and the steps that led there."""
        steps = list(steps)
        while steps and steps[-1].length <= tokens:
            last = steps.pop()
            tokens -= last.length
            if tokens == 0 and last.holds:
                return last.state, steps
        if tokens:
            steps[-1] = steps[-1].shortened(tokens)
        first = max(i for i, step in enumerate(steps) if step.holds)
        state = steps[first].state
        run = steps[first]
        for step in steps[first + 1 :]:
            if run.valid is None and step.valid is None:
                run = run.joined(step)
            else:
                state, run = run.after(state), step
        return run.after(state), steps


@dataclass
class Call:
    """One call of a model: what its MLPs are told.

    Attributes:
        carried: where states come from and go to; None: each MLP starts a fresh context, and nothing is kept.
        find_valid: gives ``valid [B, 2]`` int64, first and one past the last real token of each row, or None where all
            are real. Asked for once, by the first MLP that needs it: on a GPU the answer is waited for.
        find_seen: gives how many tokens before the call are real, of each row, or None where that is not known; asked
            for like ``find_valid``.
        outer: the call around this one.
    """

    carried: CMSContext | None = None
    find_valid: Callable[[], Tensor | None] = lambda: None
    find_seen: Callable[[], list[int] | None] = lambda: None
    outer: Call | None = None

    @cached_property
    def valid(self) -> Tensor | None:
        """What ``find_valid`` has found."""
        return self.find_valid()

    @cached_property
    def seen(self) -> list[int] | None:
        """What ``find_seen`` has found."""
        return self.find_seen()


_CALL: ContextVar[Call | None] = ContextVar("hope_kernels_cms_call", default=None)


def current_call() -> Call | None:
    """What the MLPs that are called now are told; None outside any call."""
    return _CALL.get()


def enter(call: Call) -> None:
    """Begin a call; :func:`leave` ends it."""
    call.outer = _CALL.get()
    _CALL.set(call)


def leave() -> None:
    """End the innermost call."""
    call = _CALL.get()
    _CALL.set(None if call is None else call.outer)


@contextmanager
def during(call: Call | None) -> Iterator[None]:
    """As ``call``, wherever this runs: backward threads know nothing of the forward's context."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


@contextmanager
def carrying(context: CMSContext, *, valid: Tensor | None = None) -> Iterator[CMSContext]:
    """Calls inside go on from ``context`` and leave their states in it, for modules with :func:`replace_mlps`.

    Transformers models need it not: there the state follows the cache.

    Args:
        context: an empty :class:`CMSContext`, or one that calls have left states in.
        valid: ``[B, 2]`` int64, first and one past the last real token of each row of the calls inside; tokens
            outside are neither counted nor written, and their MLP is the one that was trained.

    Raises:
        TypeError: ``context`` is no :class:`CMSContext`.
    """
    if not isinstance(context, CMSContext):
        raise TypeError(f"context: got {type(context).__name__}; want a CMSContext")
    with during(Call(context, lambda: valid)):
        yield context
