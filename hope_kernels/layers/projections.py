"""Projections that are memories: keys, targets and gates read off ``M_k``, ``M_v``, ``M_η`` and ``M_α`` (84), (90)."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor, nn

from hope_kernels.layers.level import START_FORGETTING, START_STEP, Tokens
from hope_kernels.layers.primitives import (
    HeadReadout,
    clip_norm,
    clip_spectral_norm,
    inverse_sigmoid,
    inverse_softplus,
    l2_norm,
    memory_gates,
)
from hope_kernels.memory import MemorySpec, MemoryState, memory_read, memory_write

# What may be adaptive, by the names of the arguments of a memory.
ADAPTIVE = ("k", "v", "lr", "retention")
# Where the gates start, before their nonlinearity: that of CMS levels.
GATE_STARTS = {"lr": inverse_sigmoid(START_STEP), "retention": inverse_softplus(START_FORGETTING)}


def checked_adaptive(owner: str, adaptive: Sequence[str] | None, retention: bool) -> tuple[str, ...]:
    """The adaptive projections, each once and in one order; None is all. ``owner`` begins the messages.

    Raises:
        ValueError, TypeError: they are not of :data:`ADAPTIVE`, or ``"retention"`` is among them where there is none.
    """
    if adaptive is None:
        return tuple(name for name in ADAPTIVE if retention or name != "retention")
    if isinstance(adaptive, str) or not isinstance(adaptive, Sequence):
        raise TypeError(f"{owner}: adaptive is {adaptive!r}; want a sequence of names, or None for all")
    for name in adaptive:
        if name not in ADAPTIVE:
            raise ValueError(f"{owner}: adaptive has {name!r}; want some of {', '.join(map(repr, ADAPTIVE))}")
    if "retention" in adaptive and not retention:
        raise ValueError(f"{owner}: adaptive has 'retention' with retention=False; want one or the other")
    return tuple(name for name in ADAPTIVE if name in adaptive)


def tokens_of(raw: dict[str, Tensor], lr_max: float, value_norm_max: float | None = None) -> Tokens:
    """What a memory is given, from the results of the projections.

    Args:
        raw: ``k, v [B, T, N, D]``, the key not yet of unit length; ``lr``, ``retention`` and ``momentum [B, T, N]``
            before their nonlinearities, the last two where there are such gates.
        lr_max: bound of the step.
        value_norm_max: longer targets are shortened to this norm; None leaves them.
    """
    gates = memory_gates(lr_max, raw["lr"], raw.get("retention"), raw.get("momentum"))
    v = raw["v"] if value_norm_max is None else clip_norm(raw["v"], value_norm_max).to(raw["v"].dtype)
    return Tokens(l2_norm(raw["k"]).to(raw["k"].dtype), v, *gates)


def starting_weights(weights: Sequence[Tensor], weight_norm_max: float | None) -> tuple[Tensor, ...]:
    """The weights that memories start from: the last layer's of a spectral norm of at most ``weight_norm_max``.

    That layer's norm is the curvature of all before it: by ``|W_out|^2`` the step of ``W_in`` can overshoot.
    """
    if weight_norm_max is None:
        return tuple(weights)
    return (*weights[:-1], clip_spectral_norm(weights[-1], weight_norm_max))


class ProjectionMemories(nn.Module):
    """One memory per head for each adaptive projection, all of them read by one call and written by another.

    The memories lie side by side along the head axis, head ``n`` of projection ``m`` at ``m * heads + n``. In a chunk
    of C tokens, at the weights of its start, ``M_k`` and ``M_v`` read what comes from the convolution, ``M_η`` and
    ``M_α`` the layer's input, and a vector that is no memory reads a number off each of the latter. With the key, step
    and retention that result, every memory is written towards its own target ``M(v)``. Chunks follow one another in a
    loop: the keys of one depend on the write of the one before.

    Args:
        adaptive: the projections that are memories, some of ``"k", "v", "lr", "retention"``.
        heads, head_dim: N and D.
        hidden: H of each memory.
        chunk_size: tokens per write.
        spec: what each memory is.
        lr_max, value_norm_max: bounds of the step and of a target's norm, see :func:`tokens_of`.
        weight_norm_max: bound of the initial weights, see :func:`starting_weights`.
        bptt_chunks: detach the weights written into chunk n, 2n, ..; None for never.
        backend: as in :func:`hope_kernels.memory_scan`.
    """

    def __init__(
        self,
        adaptive: Sequence[str],
        heads: int,
        head_dim: int,
        hidden: int,
        chunk_size: int,
        *,
        spec: MemorySpec,
        lr_max: float,
        value_norm_max: float | None = None,
        weight_norm_max: float | None = None,
        bptt_chunks: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.adaptive, self.heads, self.chunk_size, self.spec = tuple(adaptive), heads, chunk_size, spec
        self.lr_max, self.value_norm_max, self.weight_norm_max = lr_max, value_norm_max, weight_norm_max
        self.bptt_chunks, self.backend = bptt_chunks, backend
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(len(self.adaptive) * heads, *shape, device=device, dtype=dtype))
            for shape in spec.weight_shapes(head_dim, hidden)
        )
        self.readouts = nn.ModuleDict(
            {
                name: HeadReadout(heads, head_dim, start, device=device, dtype=dtype)
                for name, start in GATE_STARTS.items()
                if name in self.adaptive
            }
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights:
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)
        for readout in self.readouts.values():
            readout.reset_parameters()

    def extra_repr(self) -> str:
        return f"adaptive={self.adaptive}, C={self.chunk_size}"

    def initial_state(self, batch_size: int) -> MemoryState:
        """The state before the first token; it refers to the parameters, so gradients reach them."""
        weights = starting_weights(self.weights, self.weight_norm_max)
        return MemoryState.initial(weights, spec=self.spec, chunk_size=self.chunk_size, batch_size=batch_size)

    def forward(
        self, x: Tensor, mixed: Tensor, fixed: dict[str, Tensor], state: MemoryState, pending: Tokens | None
    ) -> tuple[Tokens, MemoryState, Tokens | None]:
        """Keys, targets and gates of the next tokens, and the state after them.

        Args:
            x, mixed: ``[B, T, N, D]``, the layer's input and what the convolution makes of it.
            fixed: the results of the projections that are no memories, see :func:`tokens_of`.
            state: the memories at the start of the chunk in progress.
            pending: the tokens of that chunk so far.
        """
        read_from = {"k": mixed, "v": mixed, "lr": x, "retention": x}
        inputs = torch.cat([read_from[name] for name in self.adaptive], 2)
        found, start = [], 0
        kept = 0 if pending is None else pending.k.shape[1]
        # In a trace a length may be a symbol: how many chunks there are must be a constant, which index() makes of it.
        for length in _parts(index(x.shape[1]), self.chunk_size, index(kept)):
            read = memory_read(inputs.narrow(1, start, length), state, spec=self.spec, backend=self.backend)
            raw = {name: value.narrow(1, start, length) for name, value in fixed.items()}
            for name, value in zip(self.adaptive, read.unflatten(2, (-1, self.heads)).unbind(2), strict=True):
                raw[name] = self.readouts[name](value) if name in self.readouts else value
            tokens = tokens_of(raw, self.lr_max, self.value_norm_max)
            found.append(tokens)
            chunk = tokens if pending is None else joined([pending, tokens])
            if chunk.k.shape[1] == self.chunk_size:
                state, pending = self._write(chunk, state), None
            elif length:
                pending = chunk
            start += length
        if pending is not None:  # a copy: a few tokens do not hold on to all
            pending = pending.map(lambda _, value: value.clone(memory_format=torch.contiguous_format))
        return joined(found), state, pending

    def _write(self, chunk: Tokens, state: MemoryState) -> MemoryState:
        """Every memory takes the same tokens; it makes its own target of them."""
        chunk = chunk.map(lambda _, value: torch.cat([value] * len(self.adaptive), 2))
        written = memory_write(
            chunk.k,
            chunk.v,
            chunk.lr,
            state,
            spec=self.spec,
            retention=chunk.retention,
            backend=self.backend,
        )
        cut = self.bptt_chunks is not None and written.chunk_index % self.bptt_chunks == 0
        return written.detach() if cut else written


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Tokens one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(*(None if values[0] is None else torch.cat(values, 1) for values in zip(*parts, strict=True)))


def _parts(length: int, chunk_size: int, pending: int) -> list[int]:
    """Lengths of the parts into which the ends of chunks cut ``length`` tokens; one part at least."""
    first = min(length, chunk_size - pending)
    whole, rest = divmod(length - first, chunk_size)
    return [first, *[chunk_size] * whole, *([rest] if rest else [])]
