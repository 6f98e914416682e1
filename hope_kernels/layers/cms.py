"""The Continuum Memory System (equations 70 to 74): memories written at different frequencies, as one layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hope_kernels import backends
from hope_kernels.layers.checks import check_batch_size, check_input, check_width
from hope_kernels.layers.cms_state import CMSBuffer, CMSState
from hope_kernels.layers.level import CMSLevel, MemoryLevel, PlainLevel
from hope_kernels.layers.one_launch import OneLaunch, Refused
from hope_kernels.memory.scan import scan_together
from hope_kernels.memory.state import state_dtype

Variant = Literal["sequential", "independent", "nested"]


class CMS(nn.Module):
    """Levels of memory, each written at its own frequency, in place of a block's MLP.

    Level ``l`` has a memory per head, with weights of its own for every sequence: every token reads it, every
    ``chunk_size`` tokens it is written by one step of gradient descent towards targets made from those tokens. A
    level with ``chunk_size=None`` is a plain MLP. The variants differ in how levels are joined:

    * ``"sequential"`` (70): a chain; the first level reads ``x``, each next one the output of the one before;
    * ``"independent"`` (74): every level reads ``x``; outputs are mixed by learned softmax weights, uniform at start;
    * ``"nested"`` (72): a chain; in addition level ``l`` starts again from its learned initial weights and zero
      momentum at every chunk boundary of level ``l + 1`` (never below a plain level).

    ``cms(x)`` treats ``x [B, T, dim]`` as fresh sequences. :meth:`stream` carries a state across calls: any split of
    a sequence into calls gives the same outputs, states and gradients, to rounding. :meth:`step` serves one token
    at a time from a buffer that is updated in place. Rows of a batch never influence each other.

    Inputs have about unit entries (normalise before the layer, as for an MLP). ``x`` has the dtype of the
    parameters, or, under autocast, any dtype autocast takes; gates, norms and state are float32 (float64 for
    float64) throughout.

    Args:
        dim: features of a token.
        levels: fastest first. Each chunk size divides the next one; None only in the last place.
        heads: memories per level, each ``dim / heads`` wide.
        variant: how the levels are joined.
        backend: as in :func:`hope_kernels.memory_scan`; None picks the fastest.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an argument is out of range; levels do not fit together.
    """

    def __init__(
        self,
        dim: int,
        levels: Sequence[CMSLevel],
        heads: int = 4,
        variant: Variant = "sequential",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        levels = checked_levels(levels)
        check_width("CMS", dim, heads)
        if variant not in get_args(Variant):
            raise ValueError(f"CMS: variant is {variant!r}; want one of {', '.join(map(repr, get_args(Variant)))}")
        backends.check_name(backend)
        self.dim, self.heads, self.variant, self.backend = dim, heads, variant, backend
        self.levels = nn.ModuleList()
        for index, level in enumerate(levels):
            if level.chunk_size is None:
                self.levels.append(PlainLevel(dim, level, device=device, dtype=dtype))
                continue
            slower = levels[index + 1].chunk_size if index + 1 < len(levels) else None
            # In a chain only the first level reads the layer's input; the others read unit vectors per head.
            chained = index > 0 and variant != "independent"
            self.levels.append(
                MemoryLevel(
                    dim,
                    heads,
                    level,
                    segment=slower if variant == "nested" else None,
                    input_rms=(dim // heads) ** -0.5 if chained else 1.0,
                    backend=backend,
                    device=device,
                    dtype=dtype,
                )
            )
        if variant == "independent":
            self.mix = nn.Parameter(torch.zeros(len(levels), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for level in self.levels:
            level.reset_parameters()
        if self.variant == "independent":
            nn.init.zeros_(self.mix)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, variant={self.variant!r}, backend={self.backend!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Fresh sequences, ``x [B, T, dim]`` -> ``[B, T, dim]``."""
        self._check_input(x)
        return self._run(x, [None] * len(self.levels))[0]

    def init_state(self, batch_size: int) -> CMSState:
        """The state before the first token of ``batch_size`` sequences.

        It refers to the parameters and copies nothing: gradients through it reach them.
        """
        check_batch_size("CMS", batch_size)
        levels = (x.initial_state(batch_size) if isinstance(x, MemoryLevel) else None for x in self.levels)
        return CMSState(0, batch_size, tuple(levels))

    def stream(self, x: Tensor, state: CMSState) -> tuple[Tensor, CMSState]:
        """The next tokens of sequences that have a state: ``x [B, T, dim]`` -> output, and a new state.

        ``state`` is not changed. Gradients flow through it (``state.detach()`` cuts them).

        Raises:
            ValueError, TypeError: ``x`` or ``state`` does not fit this layer or the other.
        """
        self._check_input(x)
        self._check_carried("state", state, CMSState, x)
        output, levels = self._run(x, state.levels)
        return output, CMSState(state.position + x.shape[1], state.batch_size, levels)

    def make_buffer(self, state_or_batch_size: CMSState | int) -> CMSBuffer:
        """A buffer for :meth:`step`: a copy of a state, or of the initial one for that many sequences.

        All storage is allocated here. Tokens are kept in the dtype of the parameters, or of autocast where
        that is on.

        On a GPU, with ``backend`` None or ``"cuda"``, a step is one launch where the CUDA engine is built and takes
        the layer; ``buffer.refused`` says why where it does not. Levels are then served one after the other by the
        backend of the scan.

        Raises:
            ValueError, TypeError: the state does not fit this layer.
            RuntimeError: the backend asked for cannot serve it; the message says why.
        """
        if isinstance(state_or_batch_size, CMSState):
            state = state_or_batch_size
            self._check_carried("state", state, CMSState)
        else:
            state = self.init_state(state_or_batch_size)
        dtype = self._token_dtype()
        levels = [
            None if held is None else level.make_buffer(held, dtype)
            for level, held in zip(self.levels, state.levels, strict=True)
        ]
        try:
            kernel, refused = OneLaunch(self, levels, state.batch_size, state.position), None
        except Refused as reason:
            kernel, refused = None, str(reason)
            # Asked here, a backend that cannot run a level says so before a step leaves the buffer half updated.
            for level in self.levels:
                if isinstance(level, MemoryLevel):
                    level.check_backend(dtype)
        return CMSBuffer(state.position, state.batch_size, levels, self._segments(), dtype, kernel, refused)

    @torch.no_grad()
    def replace_sequences(self, buffer: CMSBuffer, rows: Tensor | Sequence[int], state: CMSState | None = None) -> None:
        """Put other sequences in the places ``rows`` of a buffer, as continuous batching does; all others stay.

        Later steps take every sequence on from its own token. Nothing is allocated anew: a captured graph of
        :meth:`step` stays valid. Where a kernel counts the tokens, this waits for the device.

        Args:
            buffer: of this layer.
            rows: R different places, ``0 .. B - 1``.
            state: of R sequences, such as :meth:`stream` returns after their prompts; None begins them anew.

        Raises:
            ValueError, TypeError, IndexError: ``buffer``, ``rows`` or ``state`` does not fit; the buffer is unchanged.
        """
        self._check_carried("buffer", buffer, CMSBuffer)
        found = buffer.checked_rows(rows)
        if state is None:
            state = self.init_state(len(found))
        self._check_carried("state", state, CMSState)
        if state.batch_size != len(found):
            raise ValueError(f"CMS: state has batch size {state.batch_size}, rows are {len(found)}; want the same")
        if len(found):
            levels = [
                None if held is None else level.make_buffer(held, buffer.dtype)
                for level, held in zip(self.levels, state.levels, strict=True)
            ]
            buffer.replace(found, levels, state.position)

    def step(self, x: Tensor, buffer: CMSBuffer) -> Tensor:
        """One token per sequence, ``[B, dim]`` or ``[B, 1, dim]`` -> the same shape; moves ``buffer`` on in place.

        The results are those of :meth:`stream` for the same tokens, to rounding. Nothing is differentiated.

        Raises:
            ValueError, TypeError: ``x`` or ``buffer`` does not fit; the buffer is unchanged.
        """
        kernel = buffer.kernel if isinstance(buffer, CMSBuffer) else None
        if kernel is None or not kernel.ready(self, x):
            self._check_step(x, buffer)
            if kernel is not None and not kernel.serves(self):
                return self._step_by_levels(x, buffer)
        if kernel is None:
            return self._step_by_levels(x, buffer)
        output = kernel.step(x if x.dim() == 2 else x[:, 0])
        for held, segment in zip(buffer.levels, buffer.segments, strict=True):
            if held is not None:
                held.count(segment)
        buffer.counted = buffer.counted + 1
        return output.view(x.shape)

    def _check_step(self, x: Tensor, buffer: CMSBuffer) -> None:
        token = x.unsqueeze(1) if isinstance(x, Tensor) and x.dim() == 2 else x
        self._check_input(token, tokens=1)
        self._check_carried("buffer", buffer, CMSBuffer, token)
        if buffer.dtype != self._token_dtype():
            raise ValueError(
                f"CMS: buffer keeps {buffer.dtype} tokens, this call has {self._token_dtype()}; want the dtype (and "
                "autocast) it was made with"
            )

    @torch.no_grad()
    def _step_by_levels(self, x: Tensor, buffer: CMSBuffer) -> Tensor:
        kernel, token = buffer.kernel, x.unsqueeze(1) if x.dim() == 2 else x
        outputs: list[Tensor] = []
        if kernel is not None:
            _ = buffer.position  # counted by the device, which replays of a graph move on unseen
        for level, held in zip(self.levels, buffer.levels, strict=True):
            outputs.append(level.step(self._level_input(token, outputs), held))
        buffer.counted = buffer.counted + 1
        if kernel is not None:
            kernel.follow()
        return self._join(outputs).view_as(x)

    def _run(self, x: Tensor, states: Sequence) -> tuple[Tensor, tuple]:
        if self.variant == "independent":
            return self._run_together(x, states)
        outputs: list[Tensor] = []
        after = []
        for level, state in zip(self.levels, states, strict=True):
            output, state = level(self._level_input(x, outputs), state)
            outputs.append(output)
            after.append(state)
        return self._join(outputs), tuple(after)

    def _run_together(self, x: Tensor, states: Sequence) -> tuple[Tensor, tuple]:
        """Levels that all read ``x``: the scans of their memories are handed over at once."""
        written = [
            (level, state) for level, state in zip(self.levels, states, strict=True) if isinstance(level, MemoryLevel)
        ]
        scans = iter(scan_together([level.scan_arguments(level.tokens(x), state) for level, state in written]))
        outputs: list[Tensor] = []
        after = []
        for level, state in zip(self.levels, states, strict=True):
            if isinstance(level, PlainLevel):
                output, state = level(x)
            else:
                begun = 0 if state is None else state.position
                output, state = next(scans)
                output = level.joined_heads(x, begun, output)
            outputs.append(output)
            after.append(state)
        return self._join(outputs), tuple(after)

    def _level_input(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the next level reads, after those that gave ``outputs``."""
        return x if self.variant == "independent" or not outputs else outputs[-1]

    def _join(self, outputs: list[Tensor]) -> Tensor:
        if self.variant != "independent":
            return outputs[-1]
        share = torch.softmax(self.mix.to(state_dtype(self.mix.dtype)), 0)
        mixed = sum(part * output for part, output in zip(share.unbind(), outputs, strict=True))
        return mixed.to(outputs[0].dtype)

    def _segments(self) -> tuple[int | None, ...]:
        """Per level, the tokens after which it starts again, or None."""
        return tuple(level.segment if isinstance(level, MemoryLevel) else None for level in self.levels)

    @property
    def _parameter(self) -> Tensor:
        """One of the parameters, which share a dtype and a device."""
        return self.levels[0].weights[0]

    def _token_dtype(self) -> torch.dtype:
        """The dtype of keys and targets: that of the parameters, or of autocast where that is on."""
        parameter = self._parameter
        if parameter.dtype != torch.float64 and torch.is_autocast_enabled(parameter.device.type):
            return torch.get_autocast_dtype(parameter.device.type)
        return parameter.dtype

    def _check_input(self, x: Tensor, tokens: int | None = None) -> None:
        check_input("CMS", x, self.dim, self._parameter, tokens)

    def _check_carried(self, name: str, carried: CMSState | CMSBuffer, kind: type, x: Tensor | None = None) -> None:
        """That a state or buffer was made by a layer like this one, and for as many sequences as ``x`` has."""
        if not isinstance(carried, kind):
            raise TypeError(f"CMS: {name} is a {type(carried).__name__}; want a {kind.__name__}")
        if x is not None and carried.batch_size != x.shape[0]:
            raise ValueError(f"CMS: {name} has batch size {carried.batch_size}, x has {x.shape[0]} rows; want the same")
        if len(carried.levels) != len(self.levels):
            raise ValueError(f"CMS: {name} has {len(carried.levels)} levels; want {len(self.levels)}")
        for index, (level, held) in enumerate(zip(self.levels, carried.levels, strict=True)):
            plain = isinstance(level, PlainLevel)
            if plain != (held is None):
                came, want = ("no", "one") if held is None else ("a", "none")
                raise ValueError(f"CMS: {name} has {came} memory for level {index}; want {want}")
            if plain:
                continue
            weights = held.weights
            here, want = weights[0].device, level.target.weight.device
            if here != want:
                raise ValueError(f"CMS: {name} of level {index} is on {here}; want {want}, with the parameters")
            if (held.spec, held.chunk_size) != (level.spec, level.chunk_size):
                raise ValueError(
                    f"CMS: {name} of level {index} is for {held.spec} and chunk size {held.chunk_size}; want "
                    f"{level.spec} and {level.chunk_size}"
                )
            came, want = [tuple(w.shape[-3:]) for w in weights], level.weight_shapes
            if came != want:
                raise ValueError(f"CMS: {name} of level {index} has weights {came}; want {want}")
            came, want = held.gates, (level.level.retention, level.level.momentum)
            if came is not None and came != want:
                raise ValueError(f"CMS: {name} of level {index} has (retention, momentum) {came}; want {want}")
            if isinstance(carried, CMSBuffer):
                self._check_segment(index, carried.segments[index], level.segment)
                continue
            seen = carried.position
            position = seen if level.segment is None else seen % level.segment
            if held.position != position:
                raise ValueError(
                    f"CMS: {name} of level {index} is at token {held.position}; want {position}, where variant "
                    f"{self.variant!r} has it at token {seen}"
                )

    def _check_segment(self, index: int, came: int | None, want: int | None) -> None:
        if came != want:
            came, want = ("never" if x is None else f"every {x} tokens" for x in (came, want))
            raise ValueError(
                f"CMS: buffer of level {index} starts again {came}; want {want}, as in variant {self.variant!r}"
            )


def checked_levels(levels: Sequence[CMSLevel], owner: str = "CMS") -> tuple[CMSLevel, ...]:
    """Levels that fit together, fastest first; ``owner`` begins the messages.

    Raises:
        ValueError, TypeError: they do not.
    """
    if not isinstance(levels, Sequence) or not levels or not all(isinstance(x, CMSLevel) for x in levels):
        raise TypeError(f"{owner}: levels is {levels!r}; want a non-empty sequence of CMSLevel, fastest first")
    for index, (fast, slow) in enumerate(itertools.pairwise(levels)):
        if fast.chunk_size is None:
            raise ValueError(
                f"{owner}: levels[{index}] has chunk_size None; want that in the last of the {len(levels)} levels only"
            )
        if slow.chunk_size is not None and slow.chunk_size % fast.chunk_size:
            raise ValueError(
                f"{owner}: levels[{index}] and [{index + 1}] have chunk_size {fast.chunk_size} and {slow.chunk_size}; "
                "want the fastest level first and each chunk size dividing the next"
            )
    return tuple(levels)
