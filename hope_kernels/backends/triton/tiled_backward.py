"""Backward of a tiled scan: the adjoint of one chunk in a few launches, each a matrix product with its passes fused.

The chunk is recomputed from its state by the kernels of the forward, which keep slopes and curvatures; then the adjoint
runs from the write back to the tokens. FLOPs per token, mlp with objective l2: the convention's 36 D H. The adjoint of
the state is float32 and updated in place, once per chunk and weight, by the last product that adds to it; products read
the copy which that update leaves. Sums over columns that belong to several programs go to a scratch of partial sums,
which the last launch adds up in fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_kernels.backends.triton.operands import find_place, matrix_pointers, size, store_tokens
from hope_kernels.backends.triton.resident_forward import load_factor
from hope_kernels.backends.triton.tiled_forward import layer_error
from hope_kernels.backends.triton.tiled_products import (
    contract,
    is_reading,
    is_writing,
    load_steps,
    load_tile,
    load_vector,
    locate,
    only_rows,
    section_is_active,
    section_rows,
    span,
    store_partial,
    store_tile,
    sum_partials,
    sum_scalars,
    zeros,
)


@triton.jit
def update_adjoint(
    problem, chunk, u, adjoint, momentum_adjoint, b_error, step_partials, momentum_partials,
    index, count: tl.constexpr, inner: tl.constexpr, place, o_t, m_t, o_n, m_n, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Adjoint of a layer's errors through ``W' = .. - U^T diag(step) E`` (and the momentum's): one tile of
    ``-diag(step) U G - ..``; leaves the tile's part of the steps' gradients in row ``index`` of the partial sums."""
    acc = contract(zeros(tile), u, adjoint, place, o_t, m_t, o_n, m_n, 0, inner, tile, plan)
    store_partial(step_partials, place, index, count, o_t, m_t, -tl.sum(acc * b_error, 1), plan)
    d_error = -load_steps(problem.coefficients.step, place, chunk, o_t, m_t, plan)[:, None] * acc
    if momentum_adjoint is not None:
        acc = contract(zeros(tile), u, momentum_adjoint, place, o_t, m_t, o_n, m_n, 0, inner, tile, plan)
        store_partial(momentum_partials, place, index, count, o_t, m_t, -tl.sum(acc * b_error, 1), plan)
        d_error -= load_steps(problem.coefficients.momentum_step, place, chunk, o_t, m_t, plan)[:, None] * acc
    return d_error


@triton.jit
def store_errors_adjoint(
    d_gate, d_up, direct_gate, direct_up, error_hidden, slope, curve, gate, up, d_error_hidden, extra,
    place, o_t, m_t, o_h, m_h, plan: tl.constexpr,
):  # fmt: skip
    """Adjoint of the forward's ``layer_error``, one tile; ``direct_*`` reach the pre-activations by another way."""
    b_eh = load_tile(error_hidden, place, o_t, m_t, o_h, m_h)
    b_slope = load_tile(slope, place, o_t, m_t, o_h, m_h)
    b_curve = load_tile(curve, place, o_t, m_t, o_h, m_h)
    if plan.form == "glu":
        b_gate = load_tile(gate, place, o_t, m_t, o_h, m_h)
        b_up = load_tile(up, place, o_t, m_t, o_h, m_h)
        d_eh = d_gate * b_up * b_slope + d_up * b_gate
        direct_gate += b_eh * (d_gate * b_up * b_curve + d_up * b_slope)
        direct_up += d_gate * b_eh * b_slope
        store_tile(extra[1], place, o_t, m_t, o_h, m_h, direct_up)
    else:
        d_eh = d_gate * b_slope
        direct_gate += d_gate * b_eh * b_curve
    store_tile(d_error_hidden, place, o_t, m_t, o_h, m_h, d_eh)
    store_tile(extra[0], place, o_t, m_t, o_h, m_h, direct_gate)


@triton.jit(do_not_specialize=["chunk"])
def input_errors_adjoint_kernel(
    problem, sizes, chunk, x, adjoints, momentum_adjoints, error_hidden, slope, curve, gate, up, d_error_hidden, extra,
    step_partials, momentum_partials, count: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """gd: adjoint of the input layers' errors and, through them, of ``error_hidden`` and the pre-activations."""
    COLUMNS: tl.constexpr = triton.cdiv(plan.hidden, tile.columns)
    task, i, c = locate(triton.cdiv(plan.chunk, tile.rows), COLUMNS, tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_t, o_h = span(i, tile.rows), span(c, tile.columns)
    m_t, m_h = o_t < plan.chunk, o_h < plan.hidden
    b_eh = load_tile(error_hidden, place, o_t, m_t, o_h, m_h)
    d_gate = update_adjoint(
        problem, chunk, x, adjoints[0], momentum_adjoints[0] if len(momentum_adjoints) > 0 else None,
        layer_error(b_eh, slope, gate, up, 0, place, o_t, m_t, o_h, m_h, plan), step_partials, momentum_partials,
        c, count, plan.dim, place, o_t, m_t, o_h, m_h, plan, tile,
    )  # fmt: skip
    d_up = d_gate
    if plan.form == "glu":
        d_up = update_adjoint(
            problem, chunk, x, adjoints[1], momentum_adjoints[1] if len(momentum_adjoints) > 0 else None,
            layer_error(b_eh, slope, gate, up, 1, place, o_t, m_t, o_h, m_h, plan), step_partials, momentum_partials,
            COLUMNS + c, count, plan.dim, place, o_t, m_t, o_h, m_h, plan, tile,
        )  # fmt: skip
    store_errors_adjoint(
        d_gate, d_up, zeros(tile), zeros(tile), error_hidden, slope, curve, gate, up, d_error_hidden, extra,
        place, o_t, m_t, o_h, m_h, plan,
    )  # fmt: skip


@triton.jit(do_not_specialize=["chunk"])
def errors_adjoint_kernel(
    problem, sizes, chunk, d_errors, error_hidden, slope, curve, gate, up, before, d_error_hidden, extra,
    plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """dgd: from the adjoints of the input layers' errors: that of ``error_hidden`` and, in ``extra``, what reaches the
    pre-activations directly, all ``[C, H]``."""
    task, i, c = locate(triton.cdiv(plan.chunk, tile.rows), triton.cdiv(plan.hidden, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_t, o_h = span(i, tile.rows), span(c, tile.columns)
    m_t, m_h = o_t < plan.chunk, o_h < plan.hidden
    b_before = load_vector(before, place, o_t, m_t, plan)[:, None]
    d_gate = load_tile(d_errors[0], place, o_t, m_t, o_h, m_h)
    d_up = d_gate
    if plan.form == "glu":
        d_up = load_tile(d_errors[1], place, o_t, m_t, o_h, m_h)
    store_errors_adjoint(
        d_gate, d_up, b_before * d_gate, b_before * d_up, error_hidden, slope, curve, gate, up, d_error_hidden, extra,
        place, o_t, m_t, o_h, m_h, plan,
    )  # fmt: skip


@triton.jit(do_not_specialize=["chunk"])
def delta_adjoint_kernel(
    problem, sizes, chunk, u, adjoint, momentum_adjoint, delta, d_error_hidden, weight, d_errors, before,
    d_out, d_prediction, d_v, d_pending_v, step_partials, momentum_partials,
    first: tl.constexpr, count: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Adjoint of delta, from the last layer's errors and through ``error_hidden = delta W_out^T``; and through the
    objective that of the outputs at the keys (and values), ``d_out``, and of v.

    dgd: ``d_errors`` is the adjoint of the last layer's errors; what reaches the outputs through its product ``u W``
    does not pass the residual, whose part is ``d_prediction``.
    """
    WIDTH: tl.constexpr = plan.dim if plan.form == "linear" else plan.hidden
    task, i, c = locate(triton.cdiv(plan.chunk, tile.rows), triton.cdiv(plan.dim, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_t, o_d = span(i, tile.rows), span(c, tile.columns)
    m_t, m_d = o_t < plan.chunk, o_d < plan.dim
    if plan.rule == "dgd":
        acc = load_tile(d_errors, place, o_t, m_t, o_d, m_d)
        d_product = load_vector(before, place, o_t, m_t, plan)[:, None] * acc
    else:
        acc = update_adjoint(
            problem, chunk, u, adjoint, momentum_adjoint, load_tile(delta, place, o_t, m_t, o_d, m_d),
            step_partials, momentum_partials, first + c, count, WIDTH, place, o_t, m_t, o_d, m_d, plan, tile,
        )  # fmt: skip
        d_product = zeros(tile)
    if plan.form != "linear":
        acc = contract(acc, d_error_hidden, weight, place, o_t, m_t, o_d, m_d, 0, plan.hidden, tile, plan)
    if plan.needs_prediction:
        store_tile(d_out, place, o_t, m_t, o_d, m_d, acc + d_product)
        store_tile(d_prediction, place, o_t, m_t, o_d, m_d, acc)
        if plan.objective == "self":
            store_tile(d_out, place, plan.chunk + o_t, m_t, o_d, m_d, -acc)
    elif plan.rule == "dgd":
        store_tile(d_out, place, o_t, m_t, o_d, m_d, d_product)
    if plan.objective != "self":
        j = chunk.to(tl.int64) * plan.chunk + o_t
        d_target = acc if plan.objective == "error" else -acc
        store_tokens(d_v, d_pending_v, place, j, m_t, o_d, m_d, d_target)


@triton.jit
def through_write(
    section, weighted, momentum_weighted, adjoint_turned, momentum_turned, d_gram, d_gram_turned, d_norm, u,
    terms: tl.constexpr, place, o_t, m_t, o_n, m_n, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A tile of the adjoint of a layer group's inputs through the write: ``-diag(step) E G^T`` over its layers
    (``terms`` wide), and (dgd) through the triangle of their overlaps. 0 beyond the keys' section."""
    acc = zeros(tile)
    if section == 0:
        for layer in tl.static_range(len(weighted)):
            acc = contract(acc, weighted[layer], adjoint_turned[layer], place, o_t, m_t, o_n, m_n, 0, terms, tile, plan)
            if len(momentum_weighted) > 0:
                acc = contract(
                    acc, momentum_weighted[layer], momentum_turned[layer], place, o_t, m_t, o_n, m_n, 0, terms,
                    tile, plan,
                )  # fmt: skip
        acc = -acc
        if plan.rule == "dgd":
            first = tl.min(o_t).to(tl.int32)
            last = tl.minimum(first + tile.rows, plan.chunk)
            acc = contract_mixed(acc, d_gram, u, place, o_t, m_t, o_n, m_n, 0, last, tile, plan)
            acc = contract_mixed(acc, d_gram_turned, u, place, o_t, m_t, o_n, m_n, first, plan.chunk, tile, plan)
            acc += load_vector(d_norm, place, o_t, m_t, plan)[:, None] * load_tile(u, place, o_t, m_t, o_n, m_n)
    return acc


@triton.jit
def contract_mixed(acc, a, b, place, o_m, m_m, o_n, m_n, start, stop, tile: tl.constexpr, plan: tl.constexpr):
    """:func:`~hope_kernels.backends.triton.tiled_products.contract` with a float32 ``A``: gradients that 16-bit factors
    would round or flush to 0."""
    for k in tl.range(start, stop, tile.inner, num_stages=2):
        o_k = (k + tl.arange(0, tile.inner)).to(tl.int64)
        m_k = o_k < stop
        x = tl.load(
            matrix_pointers(a, place.sequence, place.head, o_m[:, None], o_k[None, :]),
            mask=m_m[:, None] & m_k[None, :],
            other=0.0,
        )
        y = tl.load(
            matrix_pointers(b, place.sequence, place.head, o_k[:, None], o_n[None, :]),
            mask=m_k[:, None] & m_n[None, :],
            other=0.0,
        )
        precision: tl.constexpr = plan.precision if plan.operand == tl.float32 else "tf32"
        acc = tl.dot(x, y.to(tl.float32), acc, input_precision=precision, out_dtype=tl.float32)
    return acc


@triton.jit(do_not_specialize=["chunk"])
def hidden_adjoint_kernel(
    problem, sizes, chunk, d_out, last_turned, weighted, momentum_weighted, adjoint_turned, momentum_turned,
    d_gram, d_gram_turned, d_norm, hidden, slope, gate, up, extra, d_z,
    plan: tl.constexpr, sections: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Adjoint of the pre-activations ``d_z [R, H]``: from the outputs, and at the keys through the write of W_out and
    what the errors add (``extra``)."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    THROUGH: tl.constexpr = plan.needs_prediction or plan.rule == "dgd"  # whether the keys' outputs matter
    task, i, c = locate(sections.count * BLOCKS, triton.cdiv(plan.hidden, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    section = i // BLOCKS
    if not section_is_active(place, chunk, section, sections, plan):
        return
    o_t, o_h = span(i % BLOCKS, tile.rows), span(c, tile.columns)
    m_t, m_h = o_t < plan.chunk, o_h < plan.hidden
    rows = section * plan.chunk + o_t
    acc = zeros(tile)
    if sections.keys:
        acc = through_write(
            section, weighted, momentum_weighted, adjoint_turned, momentum_turned, d_gram, d_gram_turned, d_norm,
            hidden, plan.dim, place, o_t, m_t, o_h, m_h, plan, tile,
        )  # fmt: skip
    terms = plan.dim if THROUGH else tl.where(section >= sections.keys, plan.dim, 0)
    acc = contract(acc, d_out, last_turned, place, rows, m_t, o_h, m_h, 0, terms, tile, plan)
    d_gate = acc * load_tile(slope, place, rows, m_t, o_h, m_h)
    m_key = only_rows(section == 0, o_t, plan)
    if plan.form == "glu":
        d_gate *= load_tile(up, place, rows, m_t, o_h, m_h)
        d_up = acc * load_tile(gate, place, rows, m_t, o_h, m_h)
        if sections.keys:
            d_up += load_tile(extra[1], place, o_t, m_key, o_h, m_h)
        store_tile(d_z[1], place, rows, m_t, o_h, m_h, d_up)
    if sections.keys:
        d_gate += load_tile(extra[0], place, o_t, m_key, o_h, m_h)
    store_tile(d_z[0], place, rows, m_t, o_h, m_h, d_gate)


@triton.jit(do_not_specialize=["chunk"])
def token_adjoint_kernel(
    problem, sizes, chunk, d_z, weights_turned, weighted, momentum_weighted, adjoints_turned, momentum_turned,
    d_gram, d_gram_turned, d_norm, x, d_out, d_prediction, d_q, d_k, d_pending_k, d_v, d_pending_v,
    plan: tl.constexpr, sections: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of all rows, through the input layers, the residual and, at the keys, the write."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    THROUGH: tl.constexpr = plan.needs_prediction or plan.rule == "dgd" or plan.form != "linear"
    task, i, c = locate(sections.count * BLOCKS, triton.cdiv(plan.dim, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    section = i // BLOCKS
    if not section_is_active(place, chunk, section, sections, plan):
        return
    o_t, o_d = span(i % BLOCKS, tile.rows), span(c, tile.columns)
    m_t, m_d = o_t < plan.chunk, o_d < plan.dim
    rows = section * plan.chunk + o_t
    acc = zeros(tile)
    if sections.keys:
        acc = through_write(
            section, weighted, momentum_weighted, adjoints_turned, momentum_turned, d_gram, d_gram_turned, d_norm, x,
            plan.hidden, place, o_t, m_t, o_d, m_d, plan, tile,
        )  # fmt: skip
    LAYERS: tl.constexpr = plan.inputs
    terms = plan.hidden if THROUGH else tl.where(section >= sections.keys, plan.hidden, 0)
    for layer in tl.static_range(LAYERS):
        acc = contract(acc, d_z[layer], weights_turned[layer], place, rows, m_t, o_d, m_d, 0, terms, tile, plan)
    if plan.residual:
        m_beyond = only_rows(section >= sections.keys, o_t, plan)
        if not plan.needs_prediction:
            acc += load_tile(d_out, place, rows, m_beyond, o_d, m_d)
        elif plan.rule == "dgd" and sections.keys:
            acc += load_tile(d_out, place, rows, m_beyond, o_d, m_d)
            acc += load_tile(d_prediction, place, o_t, only_rows(section == 0, o_t, plan), o_d, m_d)
        else:
            acc += load_tile(d_out, place, rows, m_t, o_d, m_d)
    j, m_j = section_rows(place, chunk, section, o_t, sections, plan)
    if sections.queries:
        if section >= sections.written:
            store_tokens(d_q, None, place, j, m_j, o_d, m_d, acc)
    if sections.keys:
        if section == 0:
            store_tokens(d_k, d_pending_k, place, j, m_j, o_d, m_d, acc)
    if sections.values:
        if section == 1:
            store_tokens(d_v, d_pending_v, place, j, m_j, o_d, m_d, acc)


@triton.jit(do_not_specialize=["chunk"])
def state_adjoint_kernel(
    problem, sizes, chunk, u_turned, d_outputs, d_error_turned, delta, adjoint, copy, momentum_adjoint, momentum_copy,
    weight, speed, decay_partials, carry_partials, momentum_decay_partials,
    first: tl.constexpr, count: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr, from_keys: tl.constexpr,
    gamma, plan: tl.constexpr, sections: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """The adjoint of one weight ``[inner, outer]`` (and its momentum) before the chunk from the one behind it, in
    place: ``decay G + U^T dOut`` over all rows (``from_keys``: also the keys' and values'), and for W_out
    ``d_error_hidden^T delta``. Parts of ``<G, W>`` and the like go to column ``first + tile`` of the partial sums.
    Truncated backpropagation cuts here."""
    COLUMNS: tl.constexpr = triton.cdiv(outer, tile.columns)
    task, i, c = locate(triton.cdiv(inner, tile.rows), COLUMNS, tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    writing = is_writing(place, chunk) & (sections.keys == 1)
    reading = is_reading(place, chunk, plan) & (sections.queries == 1)
    bptt_chunks = size(sizes.bptt_chunks)
    cut = (chunk > 0) & (chunk <= place.chunks) & (bptt_chunks > 0)
    cut = cut & ((place.chunk_index + chunk) % tl.maximum(bptt_chunks, 1) == 0)
    if not (writing | reading | cut):
        return
    o_in, o_out = span(i, tile.rows), span(c, tile.columns)
    m_in, m_out = o_in < inner, o_out < outer
    WRITTEN: tl.constexpr = sections.written * plan.chunk
    FROM: tl.constexpr = 0 if from_keys else WRITTEN
    start = tl.where(writing, FROM, WRITTEN)
    stop = tl.where(reading, sections.count * plan.chunk, WRITTEN)
    acc = contract(zeros(tile), u_turned, d_outputs, place, o_in, m_in, o_out, m_out, start, stop, tile, plan)
    if d_error_turned is not None:
        terms = tl.where(writing, plan.chunk, 0)
        acc = contract(acc, d_error_turned, delta, place, o_in, m_in, o_out, m_out, 0, terms, tile, plan)
    g = load_tile(adjoint, place, o_in, m_in, o_out, m_out)
    if momentum_adjoint is not None:
        gs = load_tile(momentum_adjoint, place, o_in, m_in, o_out, m_out)
        new_gs = gs
    new = g
    if writing:
        slot = task.to(tl.int64) * count + first + i * COLUMNS + c
        if plan.rule == "dgd":
            factor = tl.load(gamma + task)
        else:
            factor = load_factor(problem.coefficients.decay, place, chunk, 1.0, plan)
        new = factor * g
        if decay_partials is not None:
            b_weight = load_tile(weight, place, o_in, m_in, o_out, m_out)
            tl.store(decay_partials + slot, tl.sum(tl.sum(g * b_weight, 1), 0))
        if momentum_adjoint is not None:
            b_speed = load_tile(speed, place, o_in, m_in, o_out, m_out)
            tl.store(carry_partials + slot, tl.sum(tl.sum(g * b_speed, 1), 0))
            tl.store(momentum_decay_partials + slot, tl.sum(tl.sum(gs * b_speed, 1), 0))
            new_gs = load_factor(problem.coefficients.momentum_decay, place, chunk, 0.0, plan) * gs
            new_gs += load_factor(problem.coefficients.momentum_carry, place, chunk, 0.0, plan) * g
    new = tl.where(cut, 0.0, new + acc)
    store_tile(adjoint, place, o_in, m_in, o_out, m_out, new)
    store_tile(copy, place, o_in, m_in, o_out, m_out, new)
    if momentum_adjoint is not None:
        new_gs = tl.where(cut, 0.0, new_gs)
        store_tile(momentum_adjoint, place, o_in, m_in, o_out, m_out, new_gs)
        store_tile(momentum_copy, place, o_in, m_in, o_out, m_out, new_gs)


@triton.jit(do_not_specialize=["chunk"])
def finish_kernel(
    problem, sizes, chunk, token_partials, d_tokens, scalar_partials, d_scalars,
    rows: tl.constexpr, tiles: tl.constexpr, plan: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Adds up the chunk's partial sums into gradients of coefficients: ``token_partials [tasks, rows, C]`` into
    ``d_tokens [M, heads, C]``, ``scalar_partials [tasks, tiles]`` into ``d_scalars [M, heads]``."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, width)
    task = tl.program_id(0) // BLOCKS
    i = tl.program_id(0) % BLOCKS
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_t = span(i, width)
    m_t = o_t < plan.chunk
    row = (place.chunk_row + chunk) * plan.heads + place.head
    for p in tl.static_range(len(token_partials)):
        total = sum_partials(token_partials[p], place, rows, o_t, m_t, width, plan)
        tl.store(d_tokens[p] + row * plan.chunk + o_t, total, mask=m_t)
    if i == 0:
        for p in tl.static_range(len(scalar_partials)):
            tl.store(d_scalars[p] + row, sum_scalars(scalar_partials[p], task, tiles))
