"""Linear attention over written pairs, ``(a . (u U^T)) E``, as one differentiable function that keeps no scores.

The forward multiplies block after block of pairs (one per chunk written) and lets its scores go; the backward computes
them again. So a scan over T tokens keeps the pairs, linear in T, and never a ``[C, S]`` matrix for every chunk. Per
token and pair of a layer: forward ``2 (in + out)`` FLOPs, backward ``2 in`` for the scores again and ``4 (in + out)``.

That is by the matrix library; an engine with kernels for it is asked in :mod:`hope_kernels.memory.joined_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hope_kernels.memory.joined_pairs import PairEngine, joined_products
from hope_kernels.memory.networks import first_derivatives, multiply, needs_graph


class _PairProducts(torch.autograd.Function):
    """Arguments: what operands are rounded to, the number of value lists, ``u [M, T, in]``, ``a [M, S]`` and for each
    block its keys ``[M, C, in]`` and as many values ``[M, C, out]``; results ``[M, T, out]`` in the state dtype."""

    @staticmethod
    def forward(
        ctx: Any, operand: torch.dtype, count: int, u: Tensor, a: Tensor, *blocks: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.operand, ctx.count = operand, count
        ctx.save_for_backward(u, a, *blocks)
        return _products(operand, count, u, a, *blocks)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        u, a, *blocks = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx.operand, ctx.count, u, a, blocks, upstream, ctx.needs_input_grad[2:])
        return (None, None, *first_derivatives(gradients, (u, a, *blocks, *upstream)))


def _products(operand: torch.dtype, count: int, u: Tensor, a: Tensor, *blocks: Tensor) -> tuple[Tensor, ...]:
    """What :class:`_PairProducts` gives, of the same arguments."""
    results: list[Tensor | None] = [None] * count
    for keys, values, weights in _blocks(count, a, blocks):
        scores = multiply(u, keys.transpose(1, 2), operand) * weights
        for n, value in enumerate(values):
            results[n] = _accumulate(results[n], scores, value, operand)
    return tuple(results)  # type: ignore[arg-type]


def _gradients(
    operand: torch.dtype,
    count: int,
    u: Tensor,
    a: Tensor,
    blocks: Sequence[Tensor],
    upstream: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Those of ``u``, ``a`` and the blocks, where wanted, from those of the results."""
    for_u, for_a, *for_blocks = wanted
    d_u: Tensor | None = None
    d_a: list[Tensor] = []
    d_blocks: list[Tensor | None] = []
    for i, (keys, values, weights) in enumerate(_blocks(count, a, blocks)):
        for_keys, *for_values = for_blocks[i * (count + 1) : (i + 1) * (count + 1)]
        plain = multiply(u, keys.transpose(1, 2), operand) if for_a or any(for_values) else None
        d_scores: Tensor | None = None
        for gradient, value in zip(upstream, values, strict=True):
            d_scores = _accumulate(d_scores, gradient, value.transpose(1, 2), operand)
        if for_a:
            d_a.append((d_scores * plain).sum(1))
        d_plain = d_scores * weights
        d_blocks.append(multiply(d_plain.transpose(1, 2), u, operand).to(keys.dtype) if for_keys else None)
        scores = plain * weights if any(for_values) else None
        for n, (gradient, value) in enumerate(zip(upstream, values, strict=True)):
            d_value = multiply(scores.transpose(1, 2), gradient, operand).to(value.dtype) if for_values[n] else None
            d_blocks.append(d_value)
        if for_u:
            d_u = _accumulate(d_u, d_plain, keys, operand)
    return [None if d_u is None else d_u.to(u.dtype), torch.cat(d_a, 1) if for_a else None, *d_blocks]


def _blocks(count: int, a: Tensor, blocks: Sequence[Tensor]) -> list[tuple[Tensor, Sequence[Tensor], Tensor]]:
    """Keys, values and weights ``[M, 1, C]`` of each block."""
    found, start = [], 0
    for i in range(0, len(blocks), count + 1):
        stop = start + blocks[i].shape[1]
        found.append((blocks[i], blocks[i + 1 : i + 1 + count], a[:, None, start:stop]))
        start = stop
    return found


def _accumulate(total: Tensor | None, a: Tensor, b: Tensor, operand: torch.dtype) -> Tensor:
    """``total + a @ b``, in place."""
    if total is None:
        return multiply(a, b, operand)
    if operand == a.dtype == b.dtype == total.dtype:
        return total.baddbmm_(a, b)
    return total.add_(multiply(a, b, operand))


def pair_products(
    u: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Sequence[Tensor]],
    weights: Tensor,
    operand: torch.dtype,
    engine: PairEngine | None = None,
) -> tuple[Tensor, ...]:
    """``(a . (u K^T)) V`` for every list of values: one ``[B, T, N, out]`` in the state dtype for each.

    Args:
        u: ``[B, T, N, in]``.
        keys: blocks ``[B, N, C, in]``, in the order of ``weights``.
        values: lists of such blocks ``[B, N, C, out]``, all multiplied with the same scores.
        weights: ``a [B, N, S]``, state dtype, S over all blocks.
        operand: dtype that operands of products are rounded to.
        engine: whose kernels multiply (:func:`hope_kernels.backends.pair_engine`); None for the matrix library.

    First derivatives only, as the compiled engines.
    """
    if engine is not None:
        return joined_products(engine, u, keys, values, weights, operand)
    batch, length, heads, _ = u.shape
    with torch.autocast(u.device.type, enabled=False):
        blocks = [x.flatten(0, 1) for block in zip(keys, *values, strict=True) for x in block]
        tensors = (u.transpose(1, 2).flatten(0, 1), weights.flatten(0, 1), *blocks)
        # Without a graph to make, a compiler traces what a Function does, and cannot trace that it keeps a dtype.
        function = _PairProducts.apply if needs_graph(*tensors) else _products
        results = function(operand, len(values), *tensors)
    return tuple(x.view(batch, heads, length, x.shape[-1]).transpose(1, 2) for x in results)
