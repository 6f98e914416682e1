"""The factored plan's chunks in the compiled core: what one chunk reads and writes, forward and backward, a call each.

A scan by the factored plan is a loop over chunks (:mod:`hope_kernels.memory.factored_chunks`), and its pairs are
tensors whose gradients autograd adds up; the products and the passes between them are one call of
``csrc/cpu/factored.h`` here. It takes float32 and float64 tokens on the CPU, and D and H that are multiples of 16;
everything else is the matrix library's, 16-bit tokens among it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hope_kernels.backends import cpu
from hope_kernels.backends.core_problem import DTYPES, pointer, pointers, readable, tokens_tuple, vocabulary
from hope_kernels.memory import plain
from hope_kernels.memory.factors import INPUT_OF_LAYER, Block, Pairs
from hope_kernels.memory.networks import first_derivatives, needs_graph
from hope_kernels.memory.spec import MemorySpec

MULTIPLE = 16  # kFactoredMultiple in csrc/factored.h
DOT_ROWS = 4  # up to so many rows multiply along the rows of a matrix, without a transposed copy of it


def takes(weights: Sequence[Tensor], tokens: Sequence[Tensor]) -> bool:
    """Whether the core runs chunks of these tokens on these initial weights ``[N, in, out]``."""
    return (
        plain.without_modes()  # before anything that a trace could not follow
        and tokens[0].dtype in (torch.float32, torch.float64)
        and bool(cpu.status())
        and all(plain.is_ordinary(x) for x in (*weights, *tokens))
        and all(size > 0 and size % MULTIPLE == 0 for w in weights for size in w.shape[1:])
    )


class Chunks:
    """The chunks of one scan.

    Args:
        weights: the initial ones, each ``[N, in, out]``, any strides and dtype.
        spec: rule ``gd``.
        dtype: of the tokens, float32 or float64.
        room: tokens that the scan writes, all its chunks together: their pairs are written behind one another, not
            joined later. None where gradients are enabled: a graph refers to each chunk's own.
    """

    def __init__(self, weights: Sequence[Tensor], spec: MemorySpec, dtype: torch.dtype, room: int | None) -> None:
        self.spec, self.dtype = spec, dtype
        self.weights = [w.to(dtype).contiguous() for w in weights]
        self.inputs = len(set(INPUT_OF_LAYER[spec.form]))  # distinct ones
        self._size, self._room = room, None
        self._filled: list[int] = []  # pairs of each chunk in the room
        self._turned: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def read(self, pairs: Pairs | None, q: Tensor) -> Tensor:
        """``f_W(q)`` with all that is written: ``[B, T, N, D]``."""
        return _Chunk.apply(self, None, *self._arguments(pairs, q, None))[0]

    def write(self, pairs: Pairs | None, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """``f_W(k)`` and the chunk's pairs: inputs and errors of each layer, ``[B, N, C, .]``."""
        arguments = self._arguments(pairs, k, v)
        if self._size is None:
            output, *found = _Chunk.apply(self, None, *arguments)
            return (output, k.transpose(1, 2).clone(memory_format=torch.contiguous_format), *found)
        keys, *found = self._next_room(k)
        keys.copy_(k.transpose(1, 2))
        output = _Chunk.apply(self, found, *arguments)[0]
        return (output, keys, *found)

    def joined(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """All ``blocks`` of a scan, those that lie behind one another as one."""
        if self._room is None:
            return blocks
        whole = tuple(self._room[: self.inputs]), tuple(self._room[self.inputs :])
        return [*blocks[: len(blocks) - len(self._filled)], whole]

    def _arguments(self, pairs: Pairs | None, x: Tensor, target: Tensor | None) -> tuple[bool | Tensor | None, ...]:
        blocks = () if pairs is None else pairs.blocks
        flat = [t for inputs, errors in blocks for t in _packed((*inputs, *errors))]
        scale, decay = (None, None) if pairs is None else (pairs.weights.contiguous(), pairs.decay)
        decay = None if decay is None else decay.contiguous()
        tensors = (readable(x), readable(target), scale, decay, *self.weights, *flat)
        return needs_graph(*(t for t in tensors if t is not None)), *tensors

    def _next_room(self, k: Tensor) -> list[Tensor]:
        """Where the pairs of the next chunk go: each ``[B, N, C, .]``."""
        batch, rows, heads, dim = k.shape
        if self._room is None:
            self._room = [k.new_empty(batch, heads, self._size, size) for size in (dim, *self._features())]
        start = sum(self._filled)
        self._filled.append(rows)
        return [x[:, :, start : start + rows] for x in self._room]

    def _features(self) -> list[int]:
        """Of the hidden features, if there are any, and of each layer's errors."""
        hidden = [self.weights[0].shape[-1]] if self.inputs > 1 else []
        return hidden + [w.shape[-1] for w in self.weights]

    def results(self, batch: int, rows: int, heads: int, dim: int) -> list[Tensor]:
        """Uninitialised hidden features, if there are any, and errors of each layer: ``[B, N, C, .]``."""
        return [torch.empty(batch, heads, rows, size, dtype=self.dtype) for size in self._features()]

    def turned(self, x: Tensor, *, backward: bool) -> Tensor:
        """``[..., rows, columns]`` transposed, rows padded to whole vectors.

        Made once of what a forward has seen. A backward is handed other tensors where those are stored elsewhere or
        computed again (hooks, checkpoints): copies of them are not kept.
        """
        key = x.data_ptr(), x.shape, x.stride()
        known, found = self._turned.get(key, (None, None))
        if found is not None:
            return found
        *lead, rows, columns = x.shape
        found = x.new_empty(*lead, columns, _whole(rows))
        if found.numel():
            source = (x.data_ptr(), DTYPES[x.dtype], x[..., 0, 0].numel(), rows, columns, x.stride(-3), x.stride(-2))
            to = found.data_ptr(), found.shape[-1]
            cpu.core().transpose_matrices(source, to, torch.get_num_threads())
        if known is not None or not backward:
            # What is detached keeps no graph, which would hold on to this table; it does keep the address.
            self._turned[key] = (x.detach(), found)
        return found

    def see(self, tensors: Sequence[Tensor]) -> None:
        """Remembers what a backward may ask the transposed copies of."""
        for x in tensors:
            self._turned.setdefault((x.data_ptr(), x.shape, x.stride()), (x.detach(), None))

    # What the core is told, as ``FactoredTables`` in ``csrc/bindings.h`` reads it.

    def header(self, x: Tensor, writes: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Vocabulary and sizes."""
        return vocabulary(self.spec, self.dtype), (*x.shape, self.weights[0].shape[-1], int(writes))

    def described(
        self,
        x: Tensor,
        target: Tensor | None,
        scale: Tensor | None,
        decay: Tensor | None,
        weights: Sequence[Tensor],
        flat: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        kept: Tensor | None,
        *,
        backward: bool,
    ) -> tuple[tuple[tuple[Any, ...], ...], list[Tensor]]:
        """Header, tokens and memory, and tensors that must live as long.

        ``flat``: inputs and errors of each block; ``grads``: room for their gradients.
        """
        writes, last = target is not None, len(weights) - 1
        dots = x.shape[1] <= DOT_ROWS and not backward
        of_last = writes and self.inputs > 1 and not dots
        errors = [backward or (of_last and i == last) for i in range(last + 1)]
        alive: list[Tensor] = []

        def turned(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[int | None, ...]:
            made = [self.turned(t, backward=backward) if w else None for t, w in zip(tensors, wanted, strict=True)]
            alive.extend(t for t in made if t is not None)
            return tuple(map(pointer, made))

        cut, width, blocks = self.inputs, self.inputs + last + 1, []
        for start in range(0, len(flat), width):
            block, grad = flat[start : start + width], grads[start : start + width]
            count, dim = block[0].shape[2:]
            blocks.append(
                (
                    count,
                    block[0].stride(1) // dim,
                    _whole(count),
                    pointers(block[:cut]),
                    pointers(block[cut:]),
                    turned(block[:cut], [not dots] * cut),
                    turned(block[cut:], errors),
                    tuple(map(pointer, grad[:cut])),
                    tuple(map(pointer, grad[cut:])),
                )
            )
        memory = (
            pointers(weights),
            turned(weights, errors),
            pointer(scale),
            pointer(decay),
            tuple(blocks),
            None if kept is None else (kept.data_ptr(), kept.shape[-1]),
        )
        return (*self.header(x, writes), (tokens_tuple(x), tokens_tuple(target)), memory), alive


def _whole(count: int) -> int:
    return (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def _packed(block: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors ``[B, N, C, .]`` of a block with strides as of the same slice along C of contiguous tensors."""
    between = {x.stride(1) / x.shape[3] for x in block}
    if len(between) == 1 and all(
        x.stride() == (x.shape[1] * x.stride(1), x.stride(1), x.shape[3], 1) and x.stride(1) % x.shape[3] == 0
        for x in block
    ):
        return block
    return [x.clone(memory_format=torch.contiguous_format) for x in block]


class _Chunk(torch.autograd.Function):
    """Arguments: the chunks, room for the pairs or None, whether a graph is made, and then x, target, a, gamma, the
    weights and of each block the inputs and the errors. Results: the output and, if there are targets and no room, the
    hidden features and the errors of each layer."""

    @staticmethod
    def forward(
        ctx: Any, chunks: Chunks, room: list[Tensor] | None, graph: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        x, target, scale, decay = tensors[:4]
        count = len(chunks.weights)
        weights, flat = tensors[4 : 4 + count], tensors[4 + count :]
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        made = chunks.results(*x.shape) if target is not None and room is None else []
        kept = None
        if graph:
            size = cpu.core().factored_kept_bytes(*chunks.header(x, target is not None))
            kept = torch.empty(x.shape[0], x.shape[2], size, dtype=torch.uint8)
            chunks.see((*weights, *flat))
        if output.numel():
            found = made if room is None else room
            stride = found[0].stride(1) // found[0].shape[3] if found else x.shape[1]
            hidden = found[0] if chunks.inputs > 1 and found else None
            described, _alive = chunks.described(
                x, target, scale, decay, weights, flat, [None] * len(flat), kept, backward=False
            )
            cpu.core().factored_forward(
                *described,
                (tokens_tuple(output), stride, pointer(hidden), pointers(found[chunks.inputs - 1 :])),
                torch.get_num_threads(),
            )
        ctx.chunks = chunks
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, *tensors)
        return (output, *made)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *grad_pairs: Tensor | None) -> tuple[Any, ...]:
        kept, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        with torch.no_grad():
            gradients = _gradients(ctx.chunks, kept, tensors, grad_output, grad_pairs, wanted)
        involved = [t for t in (*tensors, grad_output, *grad_pairs) if t is not None]
        return (None, None, None, *first_derivatives(gradients, involved))


def _gradients(
    chunks: Chunks,
    kept: Tensor,
    tensors: Sequence[Tensor | None],
    grad_output: Tensor | None,
    grad_pairs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Those of a chunk's tensors, where wanted."""
    x, target, scale, decay = tensors[:4]
    count = len(chunks.weights)
    weights, flat = tensors[4 : 4 + count], tensors[4 + count :]

    def room(i: int, t: Tensor | None) -> Tensor | None:
        if t is None or not wanted[i]:
            return None
        added_to = i in (2, 3) or not x.numel()
        return (torch.zeros_like if added_to else torch.empty_like)(t, memory_format=torch.contiguous_format)

    results = [room(i, t) for i, t in enumerate(tensors)]
    if not x.numel():
        return results
    grad_output = readable(grad_output)
    upstream = [None if g is None else g.contiguous() for g in grad_pairs]
    hidden = upstream[0] if chunks.inputs > 1 and upstream else None
    # Hooks may hand back tensors of other strides.
    width = chunks.inputs + count
    flat = [t for i in range(0, len(flat), width) for t in _packed(flat[i : i + width])]
    weights, (x, target) = [w.contiguous() for w in weights], (readable(x), readable(target))
    described, _alive = chunks.described(
        x, target, scale, decay, weights, flat, results[4 + count :], kept, backward=True
    )
    cpu.core().factored_backward(
        *described,
        (tokens_tuple(grad_output), pointer(hidden), tuple(map(pointer, upstream[chunks.inputs - 1 :]))),
        (
            tokens_tuple(results[0]),
            tokens_tuple(results[1]),
            tuple(map(pointer, results[4 : 4 + count])),
            pointer(results[2]),
            pointer(results[3]),
        ),
        torch.get_num_threads(),
    )
    return results
