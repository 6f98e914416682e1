"""Forward of a tiled scan: each chunk is a few launches, every one a matrix product over all sequences and heads.

A program makes one tile of one product and finishes it in registers (activation, error, weighting by step, decay and
accumulation into the state), so that each intermediate is written once. FLOPs per token, mlp with objective l2: the
convention's 14 D H. The float32 state is read and written once per chunk; what the products read of it in 16 bits is a
copy that the same write leaves. Kernels are in the order of a chunk's launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_kernels.backends.triton.activation import activate, activate_with_curve, activate_with_slope
from hope_kernels.backends.triton.operands import find_place, load_tokens, matrix_pointers, size, store_tokens
from hope_kernels.backends.triton.resident_forward import form_delta, load_factor
from hope_kernels.backends.triton.tiled_products import (
    contract,
    is_writing,
    load_steps,
    load_tile,
    load_vector,
    locate,
    only_rows,
    section_is_active,
    section_rows,
    span,
    store_tile,
    zeros,
)


@triton.jit(do_not_specialize=["chunk"])
def gather_kernel(
    problem, sizes, chunk, grad_output, x, d_out, plan: tl.constexpr, sections: tl.constexpr, tile: tl.constexpr
):
    """Stacks the chunk's tokens: ``x [R, D]``; ``d_out`` likewise takes the outputs' gradients in the queries' rows."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    task, i, c = locate(sections.count * BLOCKS, triton.cdiv(plan.dim, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    section = i // BLOCKS
    if not section_is_active(place, chunk, section, sections, plan):
        return
    o_t = span(i % BLOCKS, tile.rows)
    o_d = span(c, tile.columns)
    m_d = o_d < plan.dim
    j, m_j = section_rows(place, chunk, section, o_t, sections, plan)
    rows = section * plan.chunk + o_t
    m_t = o_t < plan.chunk
    if sections.queries:
        if section >= sections.written:
            xq = load_tokens(problem.q, None, place, j, m_j, o_d, m_d)
            store_tile(x, place, rows, m_t, o_d, m_d, xq)
            if d_out is not None:
                dy = load_tokens(grad_output, None, place, j, m_j, o_d, m_d)
                store_tile(d_out, place, rows, m_t, o_d, m_d, dy)
    if sections.keys:
        if section == 0:
            xk = load_tokens(problem.k, problem.pending_k, place, j, m_j, o_d, m_d)
            store_tile(x, place, rows, m_t, o_d, m_d, xk)
    if sections.values:
        if section == 1:
            xv = load_tokens(problem.v, problem.pending_v, place, j, m_j, o_d, m_d)
            store_tile(x, place, rows, m_t, o_d, m_d, xv)


@triton.jit(do_not_specialize=["chunk"])
def hidden_kernel(
    problem, sizes, chunk, x, weights, hidden, z, gate, up, slope, curve,
    keep: tl.constexpr, plan: tl.constexpr, sections: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Hidden layer of all rows: ``hidden [R, H]``, and what errors need of it at the keys: ``slope`` act', ``z`` (dgd),
    ``gate`` act(z) and ``up`` (glu). ``keep`` (backward): at all rows, and ``curve`` act'' at the keys."""
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    task, i, c = locate(sections.count * BLOCKS, triton.cdiv(plan.hidden, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    section = i // BLOCKS
    if not section_is_active(place, chunk, section, sections, plan):
        return
    o_t = span(i % BLOCKS, tile.rows)
    o_h = span(c, tile.columns)
    m_t, m_h = o_t < plan.chunk, o_h < plan.hidden
    rows = section * plan.chunk + o_t
    b_z = contract(zeros(tile), x, weights[0], place, rows, m_t, o_h, m_h, 0, plan.dim, tile, plan)
    b_up = b_z
    if plan.form == "glu":
        b_up = contract(zeros(tile), x, weights[1], place, rows, m_t, o_h, m_h, 0, plan.dim, tile, plan)
    m_key = only_rows(section < sections.keys, o_t, plan)
    m_kept = m_t if keep else m_key
    if curve is not None:
        b_gate, b_slope, b_curve = activate_with_curve(b_z, plan)
        store_tile(curve, place, o_t, m_key, o_h, m_h, b_curve)
        store_tile(slope, place, rows, m_kept, o_h, m_h, b_slope)
    elif slope is not None:
        b_gate, b_slope = activate_with_slope(b_z, plan)
        store_tile(slope, place, rows, m_kept, o_h, m_h, b_slope)
    else:
        b_gate = activate(b_z, plan)
    store_tile(z, place, o_t, m_key, o_h, m_h, b_z)
    if plan.form == "glu":
        store_tile(gate, place, rows, m_kept, o_h, m_h, b_gate)
        store_tile(up, place, rows, m_kept, o_h, m_h, b_up)
        b_gate *= b_up
    store_tile(hidden, place, rows, m_t, o_h, m_h, b_gate)


@triton.jit(do_not_specialize=["chunk"])
def out_kernel(
    problem, sizes, chunk, output, x, u, weight, delta, weighted, momentum_weighted, product, right, before,
    writes: tl.constexpr, plan: tl.constexpr, sections: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Outputs: those of the queries to ``output``, and at the keys the error ``delta [C, D]``, alone and by step.

    ``u [R, .]`` are the last layer's inputs. dgd: also the keys' ``product`` u W and the solve's ``right`` hand side.
    """
    BLOCKS: tl.constexpr = triton.cdiv(plan.chunk, tile.rows)
    WIDTH: tl.constexpr = plan.dim if plan.form == "linear" else plan.hidden
    DELTA_RULE: tl.constexpr = writes and plan.rule == "dgd"
    PREDICT: tl.constexpr = sections.shared or (writes and (plan.needs_prediction or plan.rule == "dgd"))
    task, i, c = locate((sections.keys + sections.queries) * BLOCKS, triton.cdiv(plan.dim, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    # The values' rows have no output of their own.
    section = i // BLOCKS
    section = tl.where(section >= sections.keys, section + sections.values, section)
    if not section_is_active(place, chunk, section, sections, plan):
        return
    o_t = span(i % BLOCKS, tile.rows)
    o_d = span(c, tile.columns)
    m_t, m_d = o_t < plan.chunk, o_d < plan.dim
    rows = section * plan.chunk + o_t
    is_query = section >= sections.written
    terms = WIDTH if PREDICT else tl.where(is_query, WIDTH, 0)
    b_product = contract(zeros(tile), u, weight, place, rows, m_t, o_d, m_d, 0, terms, tile, plan)
    b_output = b_product
    if plan.residual:
        b_output += load_tile(x, place, rows, m_t, o_d, m_d)
    j, m_j = section_rows(place, chunk, section, o_t, sections, plan)
    if output is not None:
        if is_query | sections.shared:
            store_tokens(output, None, place, j, m_j, o_d, m_d, b_output)
    if writes:
        if (not is_query) & is_writing(place, chunk):
            if plan.objective == "self":
                # The values' product is added to minus the keys': one sum in registers, not two.
                o_v = plan.chunk + o_t
                b_delta = -contract(-b_product, u, weight, place, o_v, m_t, o_d, m_d, 0, WIDTH, tile, plan)
                if plan.residual:
                    b_delta += load_tile(x, place, rows, m_t, o_d, m_d) - load_tile(x, place, o_v, m_t, o_d, m_d)
            else:
                b_v = load_tokens(problem.v, problem.pending_v, place, j, m_j, o_d, m_d)
                b_delta = form_delta(b_output, b_v, b_output, plan)
            store_tile(delta, place, o_t, m_t, o_d, m_d, b_delta)
            if DELTA_RULE:
                b_before = load_vector(before, place, o_t, m_t, plan)
                store_tile(product, place, o_t, m_t, o_d, m_d, b_product)
                store_tile(right, place, o_t, m_t, o_d, m_d, b_delta + b_before[:, None] * b_product)
            else:
                b_step = load_steps(problem.coefficients.step, place, chunk, o_t, m_t, plan)
                store_tile(weighted, place, o_t, m_t, o_d, m_d, b_step[:, None] * b_delta)
                if momentum_weighted is not None:
                    b_step = load_steps(problem.coefficients.momentum_step, place, chunk, o_t, m_t, plan)
                    store_tile(momentum_weighted, place, o_t, m_t, o_d, m_d, b_step[:, None] * b_delta)


@triton.jit(do_not_specialize=["chunk"])
def errors_kernel(
    problem, sizes, chunk, delta, last_turned, slope, gate, up, z, before, error_hidden, weighted, momentum_weighted,
    right, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Errors of the input layers, from ``error_hidden = delta W_out^T [C, H]`` (stored where the backward wants it):
    times the steps, or (dgd) as the ``right`` hand sides of their solves."""
    task, i, c = locate(triton.cdiv(plan.chunk, tile.rows), triton.cdiv(plan.hidden, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_t = span(i, tile.rows)
    o_h = span(c, tile.columns)
    m_t, m_h = o_t < plan.chunk, o_h < plan.hidden
    b_eh = contract(zeros(tile), delta, last_turned, place, o_t, m_t, o_h, m_h, 0, plan.dim, tile, plan)
    store_tile(error_hidden, place, o_t, m_t, o_h, m_h, b_eh)
    LAYERS: tl.constexpr = plan.inputs
    for layer in tl.static_range(LAYERS):
        b_error = layer_error(b_eh, slope, gate, up, layer, place, o_t, m_t, o_h, m_h, plan)
        if plan.rule == "dgd":
            b_before = load_vector(before, place, o_t, m_t, plan)
            b_product = load_tile(z if layer == 0 else up, place, o_t, m_t, o_h, m_h)
            store_tile(right[layer], place, o_t, m_t, o_h, m_h, b_error + b_before[:, None] * b_product)
        else:
            b_step = load_steps(problem.coefficients.step, place, chunk, o_t, m_t, plan)
            store_tile(weighted[layer], place, o_t, m_t, o_h, m_h, b_step[:, None] * b_error)
            if len(momentum_weighted) > 0:
                b_step = load_steps(problem.coefficients.momentum_step, place, chunk, o_t, m_t, plan)
                store_tile(momentum_weighted[layer], place, o_t, m_t, o_h, m_h, b_step[:, None] * b_error)


@triton.jit
def layer_error(b_eh, slope, gate, up, layer: tl.constexpr, place, o_t, m_t, o_h, m_h, plan: tl.constexpr):
    """Errors of input layer ``layer`` at the keys from those of the hidden values."""
    if layer == 1:
        return b_eh * load_tile(gate, place, o_t, m_t, o_h, m_h)
    b_error = b_eh * load_tile(slope, place, o_t, m_t, o_h, m_h)
    if plan.form == "glu":
        b_error *= load_tile(up, place, o_t, m_t, o_h, m_h)
    return b_error


@triton.jit(do_not_specialize=["chunk"])
def write_kernel(
    problem, sizes, chunk, u_turned, weighted, before, speed, after, copy, gamma, decay, carry,
    inner: tl.constexpr, outer: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """``after = decay before + carry speed - U^T (step E)``, one state matrix ``[inner, outer]``; ``copy`` is what
    products read of it. ``after`` may be ``before``. dgd: the decay is ``gamma [tasks]``."""
    task, i, c = locate(triton.cdiv(inner, tile.rows), triton.cdiv(outer, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if not is_writing(place, chunk):
        return
    o_in = span(i, tile.rows)
    o_out = span(c, tile.columns)
    m_in, m_out = o_in < inner, o_out < outer
    acc = contract(zeros(tile), u_turned, weighted, place, o_in, m_in, o_out, m_out, 0, plan.chunk, tile, plan)
    factor = tl.load(gamma + task) if plan.rule == "dgd" else load_factor(decay, place, chunk, 1.0, plan)
    new = factor * load_tile(before, place, o_in, m_in, o_out, m_out) - acc
    if speed is not None:
        new += load_factor(carry, place, chunk, 0.0, plan) * load_tile(speed, place, o_in, m_in, o_out, m_out)
    store_tile(after, place, o_in, m_in, o_out, m_out, new)
    store_tile(copy, place, o_in, m_in, o_out, m_out, new)


@triton.jit(do_not_specialize=["chunk"])
def checkpoint_kernel(
    problem, sizes, chunk, checkpoint, state, copy,
    save: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr, plan: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """One ``state`` matrix at the start of ``chunk``: ``save`` to its checkpoint, or load from it (and ``copy``)."""
    task, i, c = locate(triton.cdiv(inner, tile.rows), triton.cdiv(outer, tile.columns), tile)
    place = find_place(problem, sizes, task // plan.heads, task % plan.heads, plan)
    if chunk > place.chunks:
        return
    o_in = span(i, tile.rows)
    o_out = span(c, tile.columns)
    m_in, m_out = o_in < inner, o_out < outer
    row = place.chunk_row // size(sizes.interval) + chunk // size(sizes.interval) - 1
    pointers = matrix_pointers(checkpoint, row, place.head, o_in[:, None], o_out[None, :])
    mask = m_in[:, None] & m_out[None, :]
    if save:
        tl.store(pointers, load_tile(state, place, o_in, m_in, o_out, m_out), mask=mask)
    else:
        new = tl.load(pointers, mask=mask, other=0.0)
        store_tile(state, place, o_in, m_in, o_out, m_out, new)
        store_tile(copy, place, o_in, m_in, o_out, m_out, new)
