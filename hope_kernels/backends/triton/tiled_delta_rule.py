"""Delta gradient descent (``dgd``) over a chunk of any size: the C x C unit triangular systems in square blocks.

Per group of layers with the same inputs U: ``(I + L) R = E + diag(before) (U W)``,
``W' = gamma W - U^T diag(weight) R``;
see :mod:`hope_kernels.backends.triton.delta_rule`. Diagonal blocks of ``I + L`` are inverted in registers; a program
walks down the blocks of its columns of R, each block minus the products with those above it. FLOPs beyond the
convention: C for each entry of R, as much for U U^T.

Products of retentions over spans are formed as products of blocks' products: right for a retention of 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_kernels.backends.triton.delta_rule import effective_step, gradient_product, overlap_inverse
from hope_kernels.backends.triton.operands import find_place, matrix_pointers, product
from hope_kernels.backends.triton.tiled_products import (
    contract,
    is_writing,
    load_steps,
    load_tile,
    load_vector,
    locate,
    span,
    store_partial,
    store_tile,
    store_vector,
    sum_partials,
    sum_scalars,
    zeros,
)

# ---- products of retentions ------------------------------------------------------------------------------------------


@triton.jit
def retention_pointer(problem, place, chunk, plan: tl.constexpr):
    return problem.coefficients.retention + ((place.chunk_row + chunk) * plan.heads + place.head) * plan.chunk


@triton.jit
def span_product(alpha, start, stop, width: tl.constexpr):
    """Product of ``alpha[start:stop]``."""
    o = tl.arange(0, width)
    running = tl.full([width], 1.0, tl.float32)
    for j in tl.range(start, stop, width):
        running *= tl.load(alpha + j + o, mask=j + o < stop, other=1.0)
    return tl.sum(tl.where(o == width - 1, tl.cumprod(running, 0), 0.0))


@triton.jit
def products_before(alpha, start, width: tl.constexpr, plan: tl.constexpr):
    """Products of ``alpha[start:t]`` for the tokens t of the block at ``start``, ``[width]``."""
    o = tl.arange(0, width)
    earlier = tl.load(alpha + start + o - 1, mask=(o >= 1) & (start + o <= plan.chunk), other=1.0)
    return tl.cumprod(earlier, 0)


@triton.jit
def products_after(alpha, start, width: tl.constexpr, plan: tl.constexpr):
    """Products of ``alpha`` behind token t, to the end of its block at ``start``, ``[width]``."""
    o = tl.arange(0, width)
    later = tl.load(alpha + start + o + 1, mask=(o + 1 < width) & (start + o + 1 < plan.chunk), other=1.0)
    return tl.cumprod(later, 0, reverse=True)


@triton.jit
def between_tile(problem, place, chunk, i, j, width: tl.constexpr, plan: tl.constexpr):
    """Products of retentions strictly between tokens s (columns, block ``j``) and t (rows, block ``i >= j``); 0 unless
    s < t."""
    o = tl.arange(0, width)
    m_t, m_s = i * width + o < plan.chunk, j * width + o < plan.chunk
    lower = (i * width + o[:, None] > j * width + o[None, :]) & m_t[:, None] & m_s[None, :]
    if problem.coefficients.retention is None:
        return tl.where(lower, 1.0, 0.0)
    else:
        alpha = retention_pointer(problem, place, chunk, plan)
        first = i * width
        if i == j:
            earlier = tl.load(alpha + first + o - 1, mask=(o >= 1) & (first + o <= plan.chunk), other=1.0)
            factors = tl.where(o[:, None] > o[None, :] + 1, earlier[:, None], 1.0)
            between = tl.cumprod(factors, 0)
        else:
            middle = span_product(alpha, (j + 1) * width, first, width)
            rows = products_before(alpha, first, width, plan)
            columns = products_after(alpha, j * width, width, plan)
            between = rows[:, None] * (middle * columns)[None, :]
        return tl.where(lower, between, 0.0)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["chunk"])
def steps_kernel(
    problem, sizes, chunk, u, square, step, weight, before, after, gamma,
    width: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Per token of a layer group with inputs ``u [., width]``: |u|^2, the effective step and the weight of its
    corrected error; ``before`` and ``after``, the products of earlier and later retentions; ``gamma``, that of all."""
    task, i, _ = locate(triton.cdiv(plan.chunk, tile.rows), 1, tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_t = span(i, tile.rows)
    m_t = o_t < plan.chunk
    b_square = tl.full([tile.rows], 0.0, tl.float32)
    for c in tl.range(triton.cdiv(width, tile.columns)):
        o_u = c * tile.columns + tl.arange(0, tile.columns)
        b_u = load_tile(u, place, o_t, m_t, o_u, o_u < width)
        b_square += tl.sum(b_u * b_u, 1)
    b_before = tl.full([tile.rows], 1.0, tl.float32)
    b_after = b_before
    total = tl.full([], 1.0, tl.float32)
    if problem.coefficients.retention is not None:
        alpha = retention_pointer(problem, place, chunk, plan)
        start = i * tile.rows
        b_before = span_product(alpha, 0, start, tile.rows) * products_before(alpha, start, tile.rows, plan)
        b_after = products_after(alpha, start, tile.rows, plan) * span_product(
            alpha, start + tile.rows, plan.chunk, tile.rows
        )
        total = span_product(alpha, 0, plan.chunk, tile.rows)
    b_step = effective_step(load_steps(problem.coefficients.step, place, chunk, o_t, m_t, plan), b_square)
    store_vector(square, place, o_t, m_t, b_square, plan)
    store_vector(step, place, o_t, m_t, b_step, plan)
    store_vector(weight, place, o_t, m_t, b_step * b_after, plan)
    store_vector(before, place, o_t, m_t, b_before, plan)
    store_vector(after, place, o_t, m_t, b_after, plan)
    if i == 0:
        tl.store(gamma + task, total)


@triton.jit(do_not_specialize=["chunk"])
def overlap_kernel(
    problem, sizes, chunk, u, u_turned, step, lower, inverse, gram,
    width: tl.constexpr, block_plan: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """One block of ``L [C, C]`` below the diagonal, or on it the inverse of its block of ``I + L [., block]``; ``gram``
    U U^T where the backward wants it. ``block_plan`` is the plan of a chunk of one block."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    task, i, j = locate(BLOCKS, BLOCKS, tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if (j > i) | (not is_writing(place, chunk)):
        return
    o_t, o_s = span(i, tile.rows), span(j, tile.rows)
    m_t, m_s = o_t < plan.chunk, o_s < plan.chunk
    b_gram = contract(zeros(tile), u, u_turned, place, o_t, m_t, o_s, m_s, 0, width, tile, plan)
    store_tile(gram, place, o_t, m_t, o_s, m_s, b_gram)
    b_step = load_vector(step, place, o_s, m_s, plan)
    between = between_tile(problem, place, chunk, i, j, tile.rows, plan)
    if i == j:
        o = tl.arange(0, tile.rows)
        own = overlap_inverse(b_gram, b_step, between, block_plan)
        store_tile(inverse, place, o_t, o < tile.rows, o.to(tl.int64), o < tile.rows, own)
    else:
        store_tile(lower, place, o_t, m_t, o_s, m_s, b_gram * b_step[None, :] * between)


@triton.jit
def inverse_block(inverse, place, b, turned: tl.constexpr, width: tl.constexpr):
    """Block ``b`` of the inverses ``[., width]``, or its transpose."""
    o_row = span(b, width)
    o = tl.arange(0, width).to(tl.int64)
    if turned:
        return tl.load(matrix_pointers(inverse, place.sequence, place.head, o_row[None, :], o[:, None]))
    else:
        return tl.load(matrix_pointers(inverse, place.sequence, place.head, o_row[:, None], o[None, :]))


@triton.jit(do_not_specialize=["chunk"])
def solve_kernel(
    problem, sizes, chunk, right, lower, inverse, weight, corrected, weighted,
    width: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """``corrected R = (I + L)^-1 right`` and ``weighted = diag(weight) R``, some columns of both ``[C, width]``."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    task, _, c = locate(1, triton.cdiv(width, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_n = span(c, tile.columns)
    m_n = o_n < width
    for b in tl.range(BLOCKS, num_stages=1):
        o_t = span(b, tile.rows)
        m_t = o_t < plan.chunk
        acc = load_tile(right, place, o_t, m_t, o_n, m_n)
        for above in tl.range(b, num_stages=1):
            o_s = span(above, tile.rows)
            factor = load_tile(lower, place, o_t, m_t, o_s, o_s < plan.chunk)
            acc -= product(factor, load_tile(corrected, place, o_s, o_s < plan.chunk, o_n, m_n), plan)
        acc = product(inverse_block(inverse, place, b, False, tile.rows), acc, plan)
        b_weight = load_vector(weight, place, o_t, m_t, plan)
        store_tile(corrected, place, o_t, m_t, o_n, m_n, acc)
        store_tile(weighted, place, o_t, m_t, o_n, m_n, b_weight[:, None] * acc)
        tl.debug_barrier()  # the blocks below read these rows


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["chunk"])
def corrected_adjoint_kernel(
    problem, sizes, chunk, u, adjoint, weight, corrected, right, weight_partials,
    first: tl.constexpr, count: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr,
    plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """``right = -diag(weight) U G [C, outer]``, the adjoint of R through the write, and sums for that of ``weight``."""
    task, i, c = locate(triton.cdiv(plan.chunk, tile.rows), triton.cdiv(outer, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_t, o_n = span(i, tile.rows), span(c, tile.columns)
    m_t, m_n = o_t < plan.chunk, o_n < outer
    acc = contract(zeros(tile), u, adjoint, place, o_t, m_t, o_n, m_n, 0, inner, tile, plan)
    dots = tl.sum(acc * load_tile(corrected, place, o_t, m_t, o_n, m_n), 1)
    store_partial(weight_partials, place, first + c, count, o_t, m_t, -dots, plan)
    b_weight = load_vector(weight, place, o_t, m_t, plan)
    store_tile(right, place, o_t, m_t, o_n, m_n, -b_weight[:, None] * acc)


@triton.jit(do_not_specialize=["chunk"])
def solve_adjoint_kernel(
    problem, sizes, chunk, right, lower, inverse, product_uw, d_errors, before_partials,
    first: tl.constexpr, count: tl.constexpr, width: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """``d_errors = (I + L)^-T right [C, width]``, some columns of it, and sums for the adjoint of ``before``."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    task, _, c = locate(1, triton.cdiv(width, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_n = span(c, tile.columns)
    m_n = o_n < width
    for i in tl.range(BLOCKS, num_stages=1):
        b = BLOCKS - 1 - i
        o_t = span(b, tile.rows)
        m_t = o_t < plan.chunk
        acc = load_tile(right, place, o_t, m_t, o_n, m_n)
        for below in tl.range(b + 1, BLOCKS, num_stages=1):
            o_s = span(below, tile.rows)
            m_s = o_s < plan.chunk
            pointers = matrix_pointers(lower, place.sequence, place.head, o_s[None, :], o_t[:, None])
            factor = tl.load(pointers, mask=m_s[None, :] & m_t[:, None], other=0.0)
            acc -= product(factor, load_tile(d_errors, place, o_s, m_s, o_n, m_n), plan)
        acc = product(inverse_block(inverse, place, b, True, tile.rows), acc, plan)
        dots = tl.sum(acc * load_tile(product_uw, place, o_t, m_t, o_n, m_n), 1)
        store_partial(before_partials, place, first + c, count, o_t, m_t, dots, plan)
        store_tile(d_errors, place, o_t, m_t, o_n, m_n, acc)
        tl.debug_barrier()  # the blocks above read these rows


@triton.jit(do_not_specialize=["chunk"])
def lower_adjoint_kernel(
    problem,
    sizes,
    chunk,
    d_errors,
    corrected_turned,
    d_lower,
    width: tl.constexpr,
    plan: tl.constexpr,
    tile: tl.constexpr,
):
    """``d_lower = -d_errors R^T [C, C]`` in the blocks on and below the diagonal, summed over the layers of a group."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    task, i, j = locate(BLOCKS, BLOCKS, tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if (j > i) | (not is_writing(place, chunk)):
        return
    o_t, o_s = span(i, tile.rows), span(j, tile.rows)
    m_t, m_s = o_t < plan.chunk, o_s < plan.chunk
    acc = zeros(tile)
    for layer in tl.static_range(len(d_errors)):
        acc = contract(acc, d_errors[layer], corrected_turned[layer], place, o_t, m_t, o_s, m_s, 0, width, tile, plan)
    store_tile(d_lower, place, o_t, m_t, o_s, m_s, -acc)


@triton.jit(do_not_specialize=["chunk"])
def triangle_adjoint_kernel(
    problem, sizes, chunk, d_lower, gram, square, step, after, weight_partials,
    d_gram, d_norm, d_between, step_partials, after_partials, group: tl.constexpr, groups: tl.constexpr,
    count: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """From the adjoints of L and of the weights of a layer group, for a block of columns: ``d_gram [C, C]`` that of
    ``u_t . u_s`` (0 unless s < t) and ``d_norm [tasks, C]`` twice that of |u|^2; row ``group`` of the sums for lr and
    ``after``; ``d_between [C, C]``, added up over the groups."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    task, j, _ = locate(BLOCKS, 1, tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_s = span(j, tile.rows)
    m_s = o_s < plan.chunk
    b_square = load_vector(square, place, o_s, m_s, plan)
    b_step = load_vector(step, place, o_s, m_s, plan)
    d_step = tl.full([tile.rows], 0.0, tl.float32)
    for i in tl.range(j, BLOCKS):
        o_t = span(i, tile.rows)
        m_t = o_t < plan.chunk
        between = between_tile(problem, place, chunk, i, j, tile.rows, plan)
        d = load_tile(d_lower, place, o_t, m_t, o_s, m_s)
        b_gram = load_tile(gram, place, o_t, m_t, o_s, m_s)
        d_step += tl.sum(d * b_gram * between, 0)
        store_tile(d_gram, place, o_t, m_t, o_s, m_s, d * b_step[None, :] * between)
        if d_between is not None:
            b_between = tl.where(o_t[:, None] > o_s[None, :], d * b_step[None, :] * b_gram, 0.0)
            if group > 0:
                b_between += load_tile(d_between, place, o_t, m_t, o_s, m_s)
            store_tile(d_between, place, o_t, m_t, o_s, m_s, b_between)
    d_weight = sum_partials(weight_partials, place, count, o_s, m_s, tile.rows, plan)
    d_step += d_weight * load_vector(after, place, o_s, m_s, plan)
    shrink = 1.0 / (1.0 + load_steps(problem.coefficients.step, place, chunk, o_s, m_s, plan) * b_square)
    store_partial(step_partials, place, group, groups, o_s, m_s, d_step * shrink * shrink, plan)
    store_partial(after_partials, place, group, groups, o_s, m_s, d_weight * b_step, plan)
    store_vector(d_norm, place, o_s, m_s, -2.0 * d_step * b_step * b_step, plan)


@triton.jit(do_not_specialize=["chunk"])
def retention_adjoint_kernel(
    problem, sizes, chunk, d_between, before, after, gamma_partials, before_partials, after_partials, d_retention,
    tiles: tl.constexpr, count: tl.constexpr, groups: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of retentions from those of their products.

    With ``P_ts`` the product strictly between s and t (-1 and C standing for start and end of the chunk),
    ``d alpha_j = sum_{s<j<t} P_js P_tj dP_ts``.
    """
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    task, j, _ = locate(BLOCKS, 1, tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_j = span(j, tile.rows)
    m_j = o_j < plan.chunk
    b_before = load_vector(before, place, o_j, m_j, plan)
    b_after = load_vector(after, place, o_j, m_j, plan)
    total = b_before * b_after * sum_scalars(gamma_partials, task, tiles)
    for i in tl.range(j, BLOCKS):
        o_t = span(i, tile.rows)
        m_t = o_t < plan.chunk
        through = tl.full([tile.rows, tile.rows], 0.0, tl.float32)
        for k in tl.range(j + 1):
            o_s = span(k, tile.rows)
            d = load_tile(d_between, place, o_t, m_t, o_s, o_s < plan.chunk)
            through += gradient_product(d, turned_between(problem, place, chunk, j, k, tile.rows, plan), plan)
        d_before = sum_partials(before_partials, place, count, o_t, m_t, tile.rows, plan)
        through += d_before[:, None] * b_before[None, :]
        total += tl.sum(between_tile(problem, place, chunk, i, j, tile.rows, plan) * through, 0)
    for i in tl.range(j + 1):
        o_u = span(i, tile.rows)
        d_after = sum_partials(after_partials, place, groups, o_u, o_u < plan.chunk, tile.rows, plan)
        between = between_tile(problem, place, chunk, j, i, tile.rows, plan)
        total += b_after * tl.sum(between * d_after[None, :], 1)
    row = (place.chunk_row + chunk) * plan.heads + place.head
    tl.store(d_retention + row * plan.chunk + o_j, total, mask=m_j)


@triton.jit
def turned_between(problem, place, chunk, i, j, width: tl.constexpr, plan: tl.constexpr):
    """The transpose of :func:`between_tile`, formed as such: columns t of block ``i``, rows s of block ``j <= i``."""
    o = tl.arange(0, width)
    m_t, m_s = i * width + o < plan.chunk, j * width + o < plan.chunk
    lower = (i * width + o[None, :] > j * width + o[:, None]) & m_t[None, :] & m_s[:, None]
    alpha = retention_pointer(problem, place, chunk, plan)
    first = i * width
    if i == j:
        earlier = tl.load(alpha + first + o - 1, mask=(o >= 1) & (first + o <= plan.chunk), other=1.0)
        factors = tl.where(o[None, :] > o[:, None] + 1, earlier[None, :], 1.0)
        between = tl.cumprod(factors, 1)
    else:
        middle = span_product(alpha, (j + 1) * width, first, width)
        rows = products_before(alpha, first, width, plan)
        columns = products_after(alpha, j * width, width, plan)
        between = rows[None, :] * (middle * columns)[:, None]
    return tl.where(lower, between, 0.0)
