"""Written pairs for an engine's kernels: those of all chunks in one growing tensor, and products with them.

The matrix library takes a block of pairs per chunk (:mod:`hope_kernels.memory.pair_products`), so what it launches for
a read grows with the chunks written. Kernels take them all at once, and for that they lie behind one another. Gradients
come back the same way, as one tensor for all pairs, which every chunk takes its own rows of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hope_kernels.memory.networks import first_derivatives, needs_graph


class PairEngine(Protocol):
    """A backend with kernels for pairs: ``results_n = (a . (u K^T)) V_n``, ``u [B, T, N, in]``, keys ``[B, N, S, in]``,
    values ``[B, N, S, out]``, weights ``a [B, N, S]``; results ``[B, T, N, out]`` in the state dtype."""

    def pair_products(
        self, u: Tensor, keys: Tensor, values: Sequence[Tensor], weights: Tensor, operand: torch.dtype
    ) -> tuple[Tensor, ...]: ...

    def pair_gradients(
        self,
        u: Tensor,
        keys: Tensor,
        values: Sequence[Tensor],
        weights: Tensor,
        operand: torch.dtype,
        upstream: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
        """Of u, weights, keys and values, None where not ``wanted`` (in this order)."""
        ...


class Grown:
    """``rows [B, N, S, features]``, differentiable, that blocks are appended to without a copy of the earlier ones.

    Every length it has had is a tensor of its own that stays as it is: all begin the same storage, whose rows are
    written once. (Autograd would take a write behind one of them for a change of it, so they are no views.) Where a
    storage is full, the rows are copied to a longer one.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self.rows, self._storage = rows, None

    @property
    def count(self) -> int:
        return 0 if self.rows is None else self.rows.shape[2]

    def append(self, block: Tensor, *, room: int) -> Tensor:
        """All rows, with ``block [B, N, C, features]`` behind them; a new storage has ``room`` for so many more."""
        stop = self.count + block.shape[2]
        if self._storage is None or self._storage.shape[2] < stop:
            size = (*block.shape[:2], stop + room, block.shape[3])
            self._storage = torch.empty(size, dtype=block.dtype, device=block.device)
            if self.rows is not None:
                self._storage[:, :, : self.count] = self.rows.detach()
        known = [x for x in (self.rows, block) if x is not None]
        self.rows = _Appended.apply(self, self.rows, block) if needs_graph(*known) else self.extended(block)
        return self.rows

    def extended(self, block: Tensor) -> Tensor:
        """The rows with a block that there is room for."""
        stop = self.count + block.shape[2]
        self._storage[:, :, self.count : stop] = block.detach()
        size = (*block.shape[:2], stop, block.shape[3])
        return self._storage.new_empty(0).set_(self._storage.untyped_storage(), 0, size, self._storage.stride())


class _Appended(torch.autograd.Function):
    """:meth:`Grown.extended` of rows (None: there were none) and a block."""

    @staticmethod
    def forward(ctx: Any, grown: Grown, rows: Tensor | None, block: Tensor) -> Tensor:
        ctx.start = grown.count
        return grown.extended(block)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, gradient[:, :, : ctx.start] if ctx.start else None, gradient[:, :, ctx.start :]


class _Products(torch.autograd.Function):
    """Products by an engine, as :class:`PairEngine` has them."""

    @staticmethod
    def forward(
        ctx: Any, engine: PairEngine, operand: torch.dtype, u: Tensor, a: Tensor, keys: Tensor, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.engine, ctx.operand = engine, operand
        ctx.save_for_backward(u, a, keys, *values)
        return engine.pair_products(u, keys, values, a, operand)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        u, a, keys, *values = ctx.saved_tensors
        with torch.no_grad():
            d_u, d_a, d_keys, d_values = ctx.engine.pair_gradients(
                u, keys, values, a, ctx.operand, upstream, ctx.needs_input_grad[2:]
            )
        return (None, None, *first_derivatives((d_u, d_a, d_keys, *d_values), (u, a, keys, *values, *upstream)))


def joined_products(
    engine: PairEngine,
    u: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Sequence[Tensor]],
    weights: Tensor,
    operand: torch.dtype,
) -> tuple[Tensor, ...]:
    """:func:`hope_kernels.memory.pair_products.pair_products` by an engine, all values of one width."""

    def joined(blocks: Sequence[Tensor]) -> Tensor:
        return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), 2)

    pairs = (joined(keys), *map(joined, values))
    with torch.autocast(u.device.type, enabled=False):
        if needs_graph(u, weights, *pairs):
            return _Products.apply(engine, operand, u, weights, *pairs)
        return engine.pair_products(u, pairs[0], pairs[1:], weights, operand)
