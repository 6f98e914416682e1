"""Kernels of the products with written pairs, ``(a . (u K^T)) V``, forward and backward: linear attention in tiles.

Roofline, per head, for T tokens, S pairs, ``in`` features of a key and ``out`` of a value: the forward is
``2 T S (in + out)`` FLOPs, the backward ``2 T S (3 in + 2 out)`` (the scores are formed again). Scores are written once
to scratch, ``[T, S]`` in the dtype of the operands, gone with the call. A program that kept them to itself could hold
no more than ``rows x columns`` of the result, so that each of the ``out / columns`` programs of a row block would form
them again: ``2 T S (in out / columns + out)`` FLOPs in place of ``2 T S (in + out)``. With 128 columns that is 13.6
times as many for 2048 features and 8192 hidden units, and equal at 128 features. Through scratch scores cost a write
and a read, ``2 T S`` numbers, beside the ``S (in + out)`` of the pairs: fewer as long as a chunk is shorter than
``(in + out) / 2``. While a sequence has at most the ``D H / (D + H)`` pairs after which it turns dense, scratch is
smaller than the call's tokens and than its results.

Nothing is atomic: a program makes a tile of the result and sums in order. Sizes that change from call to call (T, S)
are run-time values. Scratch matrices have both sizes padded to :data:`PAD`, zeros there: their loads need no mask that
a compiler could not see to be whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from hope_kernels.backends.triton.operands import matrix_pointers
from hope_kernels.backends.triton.tiled_products import span, zeros

PAD = 16


@dataclass(frozen=True)
class PairPlan:
    """What the kernels are compiled for beside sizes: N, and how operands are rounded and multiplied."""

    heads: int
    operand: tl.dtype
    precision: str  # of float32 products: "ieee" or "tf32"


@triton.jit
def locate_pairs(row_blocks, column_blocks, plan: tl.constexpr, tile: tl.constexpr):
    """This program's sequence and head, row block and column block; ``tile.group`` row blocks share their columns."""
    program = tl.program_id(0)
    tiles = row_blocks * column_blocks
    task = (program // tiles).to(tl.int64)
    i = program % tiles
    per_group = tile.group * column_blocks
    first = i // per_group * tile.group
    rows = tl.minimum(row_blocks - first, tile.group)
    return task // plan.heads, task % plan.heads, first + i % per_group % rows, i % per_group // rows


@triton.jit
def contract_pairs(
    acc, a, b, s, n, o_m, m_m, o_n, m_n, a_terms, b_terms, whole: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr
):
    """``acc + A[o_m, :] B[:, o_n]``, operands rounded, summed in float32, in order.

    ``a_terms`` and ``b_terms`` are the terms that are there of each; ``whole``: as many, and a multiple of the block.
    """
    o_k = tl.arange(0, tile.inner)
    p_a = matrix_pointers(a, s, n, o_m[:, None], o_k[None, :].to(tl.int64))
    p_b = matrix_pointers(b, s, n, o_k[:, None].to(tl.int64), o_n[None, :])
    step_a = tl.full([], tile.inner, tl.int64) * a.outer
    step_b = tl.full([], tile.inner, tl.int64) * b.inner
    for k in tl.range(0, a_terms, tile.inner):
        if whole:
            x = tl.load(p_a, mask=m_m[:, None], other=0.0)
            y = tl.load(p_b, mask=m_n[None, :], other=0.0)
        else:
            x = tl.load(p_a, mask=m_m[:, None] & (o_k < a_terms - k)[None, :], other=0.0)
            y = tl.load(p_b, mask=(o_k < b_terms - k)[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(
            x.to(plan.operand), y.to(plan.operand), acc, input_precision=plan.precision, out_dtype=tl.float32
        )
        p_a += step_a
        p_b += step_b
    return acc


@triton.jit
def store_padded(view, s, n, o_m, m_m, rows, o_n, m_n, columns, x):
    """A tile of a scratch matrix ``[rows, columns]``, zeros where a mask is false; nothing where the view is None."""
    if view is not None:
        pointers = matrix_pointers(view, s, n, o_m[:, None], o_n[None, :])
        x = tl.where(m_m[:, None] & m_n[None, :], x, 0.0)
        tl.store(pointers, x.to(view.data.dtype.element_ty), mask=(o_m < rows)[:, None] & (o_n < columns)[None, :])


@triton.jit(do_not_specialize=["tokens", "pairs"])
def scores_kernel(
    u, keys, weights, scores, tokens, pairs, padded_tokens, padded_pairs,
    features: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A tile of ``scores = a . (u K^T)`` ``[T, S]``. ``keys`` is the view of K^T, ``weights`` a ``[., N, S]``."""
    s, n, i, c = locate_pairs(tl.cdiv(tokens, tile.rows), tl.cdiv(pairs, tile.columns), plan, tile)
    o_t, o_s = span(i, tile.rows), span(c, tile.columns)
    m_t, m_s = o_t < tokens, o_s < pairs
    acc = contract_pairs(
        zeros(tile), u, keys, s, n, o_t, m_t, o_s, m_s, features, features, tile.even, plan, tile
    )  # fmt: skip
    b_a = tl.load(weights + (s * plan.heads + n) * pairs + o_s, mask=m_s, other=0.0)
    store_padded(scores, s, n, o_t, m_t, padded_tokens, o_s, m_s, padded_pairs, acc * b_a[None, :])


@triton.jit(do_not_specialize=["rows", "terms"])
def sums_kernel(
    a, values, results, rows, terms, padded_rows, padded_terms,
    features: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A tile of ``A V [rows, features]`` for each V of a tuple, A a padded scratch matrix or its transpose."""
    s, n, i, c = locate_pairs(tl.cdiv(rows, tile.rows), tl.cdiv(features, tile.columns), plan, tile)
    o_m, o_n = span(i, tile.rows), span(c, tile.columns)
    m_n = o_n < features
    for index in tl.static_range(len(values)):
        acc = contract_pairs(
            zeros(tile), a, values[index], s, n, o_m, o_m < padded_rows, o_n, m_n, padded_terms, terms, False, plan,
            tile,
        )  # fmt: skip
        result = results[index]
        if result is not None:
            pointers = matrix_pointers(result, s, n, o_m[:, None], o_n[None, :])
            tl.store(pointers, acc.to(result.data.dtype.element_ty), mask=(o_m < rows)[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["tokens", "pairs"])
def scores_adjoint_kernel(
    u, keys, gradients, values, weights, scores, d_products, d_weights,
    tokens, pairs, padded_tokens, padded_pairs,
    features: tl.constexpr, outer: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """From the gradients G of the results, a tile of ``d_scores = sum G V^T``, and of it ``d_products = a . d_scores``,
    the adjoint of ``u K^T``; ``scores`` again; ``d_weights [., row blocks, S]``, the row block's part of the sum of
    ``d_scores . (u K^T)`` over the tokens. Any of the three may be None. ``keys`` and ``values`` are views of K^T, V^T.
    """
    row_blocks = tl.cdiv(tokens, tile.rows)
    s, n, i, c = locate_pairs(row_blocks, tl.cdiv(pairs, tile.columns), plan, tile)
    o_t, o_s = span(i, tile.rows), span(c, tile.columns)
    m_t, m_s = o_t < tokens, o_s < pairs
    task = s * plan.heads + n
    b_a = tl.load(weights + task * pairs + o_s, mask=m_s, other=0.0)
    b_product = zeros(tile)
    if (scores is not None) or (d_weights is not None):
        b_product = contract_pairs(
            b_product, u, keys, s, n, o_t, m_t, o_s, m_s, features, features, tile.even, plan, tile
        )  # fmt: skip
        store_padded(scores, s, n, o_t, m_t, padded_tokens, o_s, m_s, padded_pairs, b_product * b_a[None, :])
    if (d_products is not None) or (d_weights is not None):
        d_scores = zeros(tile)
        for index in tl.static_range(len(gradients)):
            d_scores = contract_pairs(
                d_scores, gradients[index], values[index], s, n, o_t, m_t, o_s, m_s, outer, outer, tile.even, plan,
                tile,
            )  # fmt: skip
        store_padded(d_products, s, n, o_t, m_t, padded_tokens, o_s, m_s, padded_pairs, d_scores * b_a[None, :])
        if d_weights is not None:
            tl.store(d_weights + (task * row_blocks + i) * pairs + o_s, tl.sum(d_scores * b_product, 0), mask=m_s)
