"""Backward of a resident scan: one program per sequence and head, one launch.

Segments of K chunks are taken in reverse. The state at a segment's start comes from its checkpoint; the states at the
start of its chunks are rebuilt into slots by the forward's own function, and the chunks are walked back. The adjoint of
the state is float32 and lives in the tensors that are returned as gradients of the weights. Second-order terms are
included: the inner errors are functions of the state, so the activation's second derivative enters.

FLOPs per token, mlp with objective l2 and queries: 40 D H, 4 more than the convention's 36 since the second walk forms
pre-activations again; rebuilding a chunk's state adds 12 D H. State traffic per chunk: 14 D H values read, 2 D H
written.

Global memory written by one warp is visible to the others only behind ``tl.debug_barrier()``: a barrier stands between
a walk that writes scratch or the adjoint and the next one that reads it, and between the last read of the adjoint and
its update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hope_kernels.backends.triton.delta_rule import (
    effective_step,
    gradient_product,
    load_products,
    overlap_adjoint,
    overlap_inverse,
    retention_adjoint,
)
from hope_kernels.backends.triton.operands import (
    State,
    contiguous_state,
    contiguous_tokens,
    find_place,
    item,
    product,
    store_tokens,
)
from hope_kernels.backends.triton.resident_adjoint import (
    BETWEEN,
    D_BETWEEN,
    D_DELTA,
    D_GRAM,
    D_GRAM_HIDDEN,
    D_PRODUCT,
    D_WRITTEN,
    DELTA,
    INVERSE,
    INVERSE_HIDDEN,
    QUERIES,
    RIGHT,
    VALUES,
    Span,
    Write,
    errors_adjoint,
    input_layers,
    key_products,
    keys_adjoint,
    load_block,
    load_rows,
    load_span,
    row_tile,
    rows_adjoint,
    square_tile,
    store_rows,
    store_span,
    through_momentum,
    update_adjoint,
    workspace_of,
)
from hope_kernels.backends.triton.resident_forward import (
    Scratch,
    copy_state,
    copy_weight,
    form_delta,
    forward_chunk,
    hidden_overlaps,
    load_factor,
    load_gate,
    load_linear,
    read_rows,
)


class Results(NamedTuple):
    """Gradients, each None where the input is; of the weights and the momentum, the float32 adjoint itself."""

    q: Any
    k: Any
    v: Any
    pending_k: Any
    pending_v: Any
    coefficients: Any
    weights: Any
    momentum: Any  # () without momentum


# ---- coefficients ----------------------------------------------------------------------------------------------------


@triton.jit
def store_gate(pointer, place, chunk, x, plan: tl.constexpr):
    """The opposite of ``load_gate``; does nothing where the gradient is not wanted."""
    if pointer is not None:
        o_c = tl.arange(0, plan.block_chunk)
        row = (place.chunk_row + chunk) * plan.heads + place.head
        tl.store(pointer + row * plan.chunk + o_c, x, mask=o_c < plan.chunk)


@triton.jit
def store_factor(pointer, place, chunk, x, plan: tl.constexpr):
    if pointer is not None:
        tl.store(pointer + (place.chunk_row + chunk) * plan.heads + place.head, x)


@triton.jit
def load_write(coefficients, place, chunk, plan: tl.constexpr):
    """The coefficients of one chunk; for dgd the steps are left to the solve."""
    step = load_gate(coefficients.step, place, chunk, 0.0, plan)
    momentum_step = step
    if coefficients.momentum_step is not None:
        momentum_step = load_gate(coefficients.momentum_step, place, chunk, 0.0, plan)
    return Write(
        step,
        step,
        step,
        momentum_step,
        step,
        step,
        load_factor(coefficients.decay, place, chunk, 1.0, plan),
        load_factor(coefficients.momentum_carry, place, chunk, 0.0, plan),
        load_factor(coefficients.momentum_decay, place, chunk, 0.0, plan),
    )


@triton.jit
def clear_coefficients(coefficients, place, chunk, plan: tl.constexpr):
    zeros = tl.full([plan.block_chunk], 0.0, tl.float32)
    store_gate(coefficients.step, place, chunk, zeros, plan)
    store_gate(coefficients.retention, place, chunk, zeros, plan)
    store_gate(coefficients.momentum_step, place, chunk, zeros, plan)
    store_factor(coefficients.decay, place, chunk, 0.0, plan)
    store_factor(coefficients.momentum_carry, place, chunk, 0.0, plan)
    store_factor(coefficients.momentum_decay, place, chunk, 0.0, plan)


# ---- one chunk -------------------------------------------------------------------------------------------------------


@triton.jit
def chunk_adjoint(
    problem, grad_output, results, state, adjoint, work, place, chunk, reads: tl.constexpr, plan: tl.constexpr
):
    """The adjoint of one complete chunk: gradients of its tokens and coefficients, and the adjoint of its first state.

    Starts and ends behind a barrier.
    """
    delta_rule: tl.constexpr = plan.rule == "dgd"
    values: tl.constexpr = plan.objective == "self"
    hidden_layer: tl.constexpr = plan.form != "linear"
    head = place.head
    span = Span(chunk * plan.chunk, (chunk + 1) * plan.chunk)
    write = load_write(problem.coefficients, place, chunk, plan)

    # What the chunk computed, and the last layer's write.
    xk = load_span(problem.k, problem.pending_k, place, span, plan)
    xv = load_span(problem.v, problem.pending_v, place, span, plan)
    b_k, through, square = key_products(xk, state, adjoint, work, head, plan)
    prediction = b_k
    target = b_k
    if values:
        target = read_rows(xv, state, head, plan)
    if plan.residual:
        prediction += xk.to(tl.float32)
    delta = form_delta(prediction, xv, target, plan)
    store_rows(work, DELTA, delta, plan)
    if delta_rule:
        store_rows(work, D_DELTA, through, plan)
        store_rows(work, D_PRODUCT, b_k, plan)
    tl.debug_barrier()
    d_step = tl.full([plan.block_chunk], 0.0, tl.float32)
    d_momentum_step = d_step
    if delta_rule:
        write, d_before, d_after, d_step, d_diagonal = last_layer_solve(
            problem, place, span, chunk, square, write, work, plan
        )
    else:
        d_step -= tl.sum(through * delta, 1)
        d_written = -write.step_out[:, None] * through
        if len(adjoint.momentum) > 0:
            through = through_momentum(xk, adjoint, work, head, plan)
            d_momentum_step -= tl.sum(through * delta, 1)
            d_written -= write.momentum_step[:, None] * through
        store_rows(work, D_WRITTEN, d_written, plan)
        tl.debug_barrier()

    # The input layers' write, and how their errors depend on delta.
    if hidden_layer:
        inverses = (write.step_in, write.step_in)
        if delta_rule:
            inverses = (
                tl.load(square_tile(work.squares, INVERSE, False, plan)).to(plan.operand),
                tl.load(square_tile(work.squares, INVERSE, True, plan)).to(plan.operand),
            )
        zeros = tl.full([plan.block_chunk], 0.0, tl.float32)
        xk = load_span(problem.k, problem.pending_k, place, span, plan)
        d_delta, sums = errors_adjoint(
            xk, load_rows(work, DELTA, plan), write, inverses, (zeros, zeros), state, adjoint, work, head, plan
        )
        d_delta += load_rows(work, D_WRITTEN, plan)
        if delta_rule:
            d_before += sums[1]
        else:
            d_step += sums[0]
            d_momentum_step += sums[1]
    else:
        d_delta = load_rows(work, D_WRITTEN, plan)

    # The objective.
    if plan.objective == "error":
        store_span(results.v, results.pending_v, place, span, d_delta, plan)
    elif not values:
        store_span(results.v, results.pending_v, place, span, -d_delta, plan)
    store_rows(work, D_DELTA, d_delta, plan)
    d_product = d_delta
    if not plan.needs_prediction:
        d_product = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    if delta_rule:
        d_product += write.before[:, None] * load_rows(work, D_WRITTEN, plan)
    store_rows(work, D_PRODUCT, d_product, plan)
    tl.debug_barrier()

    # The layers at the keys.
    d_overlap = d_step
    if delta_rule and hidden_layer:
        d_step_in, d_after_in, d_diagonal_in = input_layers_solve(problem, place, span, sums[0], write, work, plan)
        d_step += d_step_in
        d_after += d_after_in
        d_overlap = load_overlap(work, D_GRAM_HIDDEN, d_diagonal, plan)
        d_diagonal = d_diagonal_in
    right = load_rows(work, RIGHT if delta_rule else DELTA, plan)
    if hidden_layer:
        d_xk = keys_adjoint(load_rows(work, D_PRODUCT, plan), right, d_overlap, write, state, adjoint, work, head, plan)
    else:
        d_xk = product(load_rows(work, D_PRODUCT, plan), tl.trans(load_linear(state, head, plan)), plan)
        d_xk -= product(write.step_out[:, None] * right, tl.trans(load_linear(adjoint, head, plan)), plan)
        if len(adjoint.momentum) > 0:
            s = load_linear(State(adjoint.momentum, (), adjoint.row), head, plan)
            d_xk -= product(write.momentum_step[:, None] * right, tl.trans(s), plan)
    if plan.residual and plan.needs_prediction:
        d_xk += load_rows(work, D_DELTA, plan)
    if delta_rule:
        xk = load_span(problem.k, problem.pending_k, place, span, plan)
        d_xk += product(load_overlap(work, D_GRAM, d_diagonal, plan), xk, plan)
    store_span(results.k, results.pending_k, place, span, d_xk, plan)

    # What the values (`self`) and the queries read.
    if values:
        xv = load_span(problem.v, problem.pending_v, place, span, plan)
        d_xv = rows_adjoint(xv, -load_rows(work, D_DELTA, plan), VALUES, state, work, head, plan)
        store_span(results.v, results.pending_v, place, span, d_xv, plan)
    if reads:
        queries_adjoint(problem, grad_output, results, state, work, place, span, plan)

    tl.debug_barrier()
    wants_decay: tl.constexpr = results.coefficients.decay is not None or results.coefficients.retention is not None
    d_decay, d_carry, d_momentum_decay = update_adjoint(
        problem, grad_output, place, span, write, state, adjoint, work, True, reads, wants_decay, plan
    )
    store_gate(results.coefficients.step, place, chunk, d_step, plan)
    store_gate(results.coefficients.momentum_step, place, chunk, d_momentum_step, plan)
    store_factor(results.coefficients.decay, place, chunk, d_decay, plan)
    store_factor(results.coefficients.momentum_carry, place, chunk, d_carry, plan)
    store_factor(results.coefficients.momentum_decay, place, chunk, d_momentum_decay, plan)
    if results.coefficients.retention is not None:
        d_retention = retention_adjoint(
            tl.load(square_tile(work.squares, BETWEEN, False, plan)),
            tl.load(square_tile(work.squares, BETWEEN, True, plan)),
            write.before,
            write.after,
            tl.load(square_tile(work.squares, D_BETWEEN, False, plan)),
            d_before,
            d_after,
            d_decay,
            plan,
        )
        store_gate(results.coefficients.retention, place, chunk, d_retention, plan)
    tl.debug_barrier()


@triton.jit
def queries_adjoint(problem, grad_output, results, state, work, place, span, plan: tl.constexpr):
    """Gradients of the queries of ``span``, read in ``state``."""
    xq = load_span(problem.q, None, place, span, plan)
    d_out = load_span(grad_output, None, place, span, plan)
    d_xq = rows_adjoint(xq, d_out, QUERIES, state, work, place.head, plan)
    store_span(results.q, None, place, span, d_xq, plan)


# ---- delta gradient descent ------------------------------------------------------------------------------------------


@triton.jit
def last_layer_solve(problem, place, span, chunk, square, write, work, plan: tl.constexpr):
    """The solves of one chunk and the adjoint of the last layer's; ``square [BC]`` are the norms of that layer's
    inputs.

    Takes delta, ``H A`` and ``H W`` from ``DELTA``, ``D_DELTA`` and ``D_PRODUCT``. Returns the completed ``write``,
    gradients ``[BC]`` of ``before``, ``after`` and the step, and the factor of the layer's inputs in their own
    gradient. Leaves ``RIGHT``, ``D_WRITTEN`` and all of ``squares`` but ``D_GRAM``, which a linear memory has instead
    of ``D_GRAM_HIDDEN``. Starts and ends behind a barrier.
    """
    linear: tl.constexpr = plan.form == "linear"
    inverse_i: tl.constexpr = INVERSE if linear else INVERSE_HIDDEN
    gram_i: tl.constexpr = D_GRAM if linear else D_GRAM_HIDDEN
    row = (place.chunk_row + chunk) * plan.heads + place.head
    before, after, between, decay = load_products(problem.coefficients.retention, row, plan)
    tl.store(square_tile(work.squares, BETWEEN, False, plan), between)
    xk = load_span(problem.k, problem.pending_k, place, span, plan)
    gram = product(xk, tl.trans(xk), plan)
    keys = xk.to(tl.float32)
    proximal = effective_step(write.lr, tl.sum(keys * keys, 1))
    step_in = proximal * after
    tl.store(square_tile(work.squares, INVERSE, False, plan), overlap_inverse(gram, proximal, between, plan))
    step_out = step_in
    if not linear:
        gram = hidden_overlaps(work, plan)
        proximal = effective_step(write.lr, square)
        step_out = proximal * after
        tl.store(square_tile(work.squares, INVERSE_HIDDEN, False, plan), overlap_inverse(gram, proximal, between, plan))
    # The overlaps wait where their gradient will be.
    tl.store(square_tile(work.squares, gram_i, False, plan), gram)
    tl.debug_barrier()

    product_out = load_rows(work, D_PRODUCT, plan)
    inverse = tl.load(square_tile(work.squares, inverse_i, False, plan))
    right = product(inverse, load_rows(work, DELTA, plan) + before[:, None] * product_out, plan)
    store_rows(work, RIGHT, right, plan)
    tl.debug_barrier()

    through = load_rows(work, D_DELTA, plan)
    d_weight = -tl.sum(through * load_rows(work, RIGHT, plan), 1)
    inverse_t = tl.load(square_tile(work.squares, inverse_i, True, plan))
    d_errors = product(inverse_t, -step_out[:, None] * through, plan)
    store_rows(work, D_WRITTEN, d_errors, plan)
    d_before = tl.sum(d_errors * load_rows(work, D_PRODUCT, plan), 1)
    right_t = tl.load(row_tile(work.tokens, RIGHT, True, plan))  # [BD, BC]
    d_gram, d_diagonal, d_step, d_after, d_between = overlap_adjoint(
        -gradient_product(d_errors, right_t, plan),
        d_weight,
        tl.load(square_tile(work.squares, gram_i, False, plan)),
        write.lr,
        square,
        tl.load(square_tile(work.squares, BETWEEN, False, plan)),
        after,
    )
    tl.debug_barrier()
    tl.store(square_tile(work.squares, gram_i, False, plan), d_gram)
    tl.store(square_tile(work.squares, D_BETWEEN, False, plan), d_between)
    tl.debug_barrier()
    completed = Write(
        write.lr,
        step_in,
        step_out,
        write.momentum_step,
        before,
        after,
        decay,
        write.carry,
        write.momentum_decay,
    )
    return completed, d_before, d_after, d_step, d_diagonal


@triton.jit
def input_layers_solve(problem, place, span, d_weight, write, work, plan: tl.constexpr):
    """Adjoint of the input layers' solve: gradients of step and ``after``, and the keys' factor in their own gradient.

    Leaves ``D_GRAM``. Starts and ends behind a barrier.
    """
    d_lower = tl.full([plan.block_chunk, plan.block_chunk], 0.0, tl.float32)
    for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
        for i in tl.static_range(input_layers(plan)):
            right = load_block(work.errors, i, h, plan)
            d_lower -= product(load_block(work.d_errors, i, h, plan), tl.trans(right), plan)
    xk = load_span(problem.k, problem.pending_k, place, span, plan)
    keys = xk.to(tl.float32)
    between = tl.load(square_tile(work.squares, BETWEEN, False, plan))
    d_gram, d_diagonal, d_step, d_after, d_between = overlap_adjoint(
        d_lower, d_weight, product(xk, tl.trans(xk), plan), write.lr, tl.sum(keys * keys, 1), between, write.after
    )
    p_between = square_tile(work.squares, D_BETWEEN, False, plan)
    d_between += tl.load(p_between)
    tl.debug_barrier()
    tl.store(p_between, d_between)
    tl.store(square_tile(work.squares, D_GRAM, False, plan), d_gram)
    tl.debug_barrier()
    return d_step, d_after, d_diagonal


@triton.jit
def load_overlap(work, i: tl.constexpr, d_diagonal, plan: tl.constexpr):
    """What a layer's inputs are multiplied by in their own gradient: ``G + G^T + diag``, ``[BC, BC]``."""
    o_c = tl.arange(0, plan.block_chunk)
    d_gram = tl.load(square_tile(work.squares, i, False, plan)) + tl.load(square_tile(work.squares, i, True, plan))
    return (d_gram + tl.where(o_c[:, None] == o_c[None, :], d_diagonal[:, None], 0.0)).to(plan.operand)


# ---- one sequence and head -------------------------------------------------------------------------------------------


@triton.jit
def clear_tokens(view, pending_view, place, first, end, plan: tl.constexpr):
    """Gradient 0 for the tokens ``first .. end``."""
    o_c = tl.arange(0, plan.block_chunk)
    o_d = tl.arange(0, plan.block_dim)
    zeros = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    for j0 in tl.range(first, end, plan.block_chunk, num_stages=1, disable_licm=True):
        j = j0 + o_c
        store_tokens(view, pending_view, place, j, j < end, o_d, o_d < plan.dim, zeros)


@triton.jit
def load_adjoint(adjoint, final, head, plan: tl.constexpr):
    """Gradients of the final state, each 0 if it is None."""
    for i in tl.static_range(len(adjoint.weights)):
        copy_weight(adjoint.weights[i], adjoint.row, final[0][i], adjoint.row, head, i, plan)
        if len(adjoint.momentum) > 0:
            copy_weight(adjoint.momentum[i], adjoint.row, final[1][i], adjoint.row, head, i, plan)


@triton.jit
def clear_adjoint(adjoint, head, plan: tl.constexpr):
    for i in tl.static_range(len(adjoint.weights)):
        copy_weight(adjoint.weights[i], adjoint.row, None, 0, head, i, plan)
        if len(adjoint.momentum) > 0:
            copy_weight(adjoint.momentum[i], adjoint.row, None, 0, head, i, plan)


@triton.jit
def rebuild_states(problem, sizes, checkpoints, running, slots, work, s, n, first, last, plan: tl.constexpr):
    """The states at the start of chunks ``first .. last`` into slots 0, 1, ..; ``first`` starts a segment.

    16-bit tokens have slots in their own dtype, since every product rounds the weights to it anyhow, and a float32
    running state. Starts and ends behind a barrier.
    """
    place = find_place(problem, sizes, s, n, plan)
    start = segment_start(running, slots, place, sizes, plan)
    if first == 0:
        copy_state(start, State(problem.weights, problem.momentum, place.sequence), place.head, plan)
    elif checkpoints is not None:
        row = place.chunk_row // sizes.interval + first // sizes.interval - 1
        copy_state(start, contiguous_state(checkpoints, row, plan), place.head, plan)
    tl.debug_barrier()
    if running is not None:
        copy_state(slot_state(slots, place, sizes, 0, plan), start, place.head, plan)
    for chunk in tl.range(first, last, num_stages=1, disable_licm=True):
        place = find_place(problem, sizes, s, n, plan)
        own = workspace_of(work, place.sequence * plan.heads + place.head, plan)
        scratch = Scratch(own.tokens, own.squares, own.hidden)
        after = slot_state(slots, place, sizes, chunk - first + 1, plan)
        if running is not None:
            state = contiguous_state(running, place.sequence, plan)
            forward_chunk(problem, None, state, state, scratch, place, chunk, False, plan)
            copy_state(after, state, place.head, plan)
        else:
            before = slot_state(slots, place, sizes, chunk - first, plan)
            forward_chunk(problem, None, before, after, scratch, place, chunk, False, plan)
    tl.debug_barrier()


@triton.jit
def segment_start(running, slots, place, sizes, plan: tl.constexpr):
    """Where the float32 state at the start of a segment goes."""
    if running is not None:
        return contiguous_state(running, place.sequence, plan)
    else:
        return slot_state(slots, place, sizes, 0, plan)


@triton.jit
def slot_state(slots, place, sizes, i, plan: tl.constexpr):
    """The state in slot ``i``."""
    return contiguous_state(slots, place.sequence * sizes.interval + i, plan)


@triton.jit
def read_adjoint(problem, grad_output, results, state, adjoint, work, place, first, end, plan: tl.constexpr):
    """The adjoint of queries ``first .. end`` alone, read in ``state``. Starts and ends behind a barrier."""
    write = Write(None, None, None, None, None, None, None, None, None)
    for j in tl.range(first, end, plan.block_chunk, num_stages=1, disable_licm=True):
        span = Span(j, tl.minimum(j + plan.block_chunk, end))
        queries_adjoint(problem, grad_output, results, state, work, place, span, plan)
        tl.debug_barrier()
        update_adjoint(
            problem, grad_output, place, span, write, state, adjoint, work, False, True, False, plan
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def chunk_task(
    problem, sizes, grad_output, results, slots, work, s, n, chunk, slot, live, reads: tl.constexpr, plan: tl.constexpr
):
    """One step back: the adjoint of ``chunk``, whose first state is in ``slot``; or of the queries behind the last one.

    ``live``: whether a gradient has reached the state after the chunk. If not, the write needs no adjoint. Returns the
    same for the state before.
    """
    place = find_place(problem, sizes, s, n, plan)
    adjoint = contiguous_state((results.weights, results.momentum), place.sequence, plan)
    state = slot_state(slots, place, sizes, slot, plan)
    own = workspace_of(work, place.sequence * plan.heads + place.head, plan)
    written = chunk < place.chunks
    if written & (sizes.bptt_chunks > 0):
        # The state after this chunk was detached.
        if (place.chunk_index + chunk + 1) % tl.maximum(sizes.bptt_chunks, 1) == 0:
            clear_adjoint(adjoint, place.head, plan)
            live = live * 0
            tl.debug_barrier()
    if written & (live > 0):
        if problem.k is not None:
            chunk_adjoint(problem, grad_output, results, state, adjoint, own, place, chunk, reads, plan)
    else:
        from_token = tl.maximum(chunk * plan.chunk, place.pending)
        to_token = place.pending + place.length
        if written:
            if problem.k is not None:
                to_token = (chunk + 1) * plan.chunk
                clear_tokens(results.k, results.pending_k, place, chunk * plan.chunk, to_token, plan)
                clear_tokens(results.v, results.pending_v, place, chunk * plan.chunk, to_token, plan)
                clear_coefficients(results.coefficients, place, chunk, plan)
        if reads:
            live = tl.where(from_token < to_token, 1, live)
            read_adjoint(problem, grad_output, results, state, adjoint, own, place, from_token, to_token, plan)
    return live


@triton.jit
def backward_task(
    problem, sizes, checkpoints, grad_output, final, results, running, slots, work, s, n, plan: tl.constexpr
):
    """The backward of the whole scan of sequence ``s`` and head ``n``."""
    reads: tl.constexpr = problem.q is not None and grad_output is not None
    place = find_place(problem, sizes, s, n, plan)
    end = place.pending + place.length
    complete = place.chunks * plan.chunk
    adjoint = contiguous_state((results.weights, results.momentum), place.sequence, plan)
    results = Results(
        None if results.q is None else contiguous_tokens(results.q, sizes.tokens, plan),
        None if results.k is None else contiguous_tokens(results.k, sizes.tokens, plan),
        None if results.v is None else contiguous_tokens(results.v, sizes.tokens, plan),
        None if results.pending_k is None else contiguous_tokens(results.pending_k, sizes.pending, plan),
        None if results.pending_v is None else contiguous_tokens(results.pending_v, sizes.pending, plan),
        results.coefficients,
        results.weights,
        results.momentum,
    )
    if final is None:
        clear_adjoint(adjoint, place.head, plan)
    else:
        load_adjoint(adjoint, final, place.head, plan)
    # Nothing behind the last complete chunk was written.
    if problem.k is not None:
        clear_tokens(results.k, results.pending_k, place, complete, end, plan)
        clear_tokens(results.v, results.pending_v, place, complete, end, plan)
    if problem.q is not None and not reads:
        clear_tokens(results.q, None, place, place.pending, end, plan)
    tl.debug_barrier()

    # The last state that anything was computed with, and the segment it lies in.
    newest = place.chunks - 1
    if reads:
        newest = tl.where(tl.maximum(complete, place.pending) < end, place.chunks, newest)
    segments = (newest + sizes.interval) // sizes.interval
    live = 0 if final is None else 1
    for back in tl.range(0, segments, num_stages=1, disable_licm=True):
        first = (segments - 1 - back) * sizes.interval
        last = tl.minimum(first + sizes.interval - 1, newest)
        rebuild_states(problem, sizes, checkpoints, running, slots, work, s, n, first, last, plan)
        for chunk_back in tl.range(0, last - first + 1, num_stages=1, disable_licm=True):
            slot = last - first - chunk_back
            live = chunk_task(
                problem, sizes, grad_output, results, slots, work, s, n, first + slot, slot, live, reads, plan
            )


@triton.jit
def backward_program(
    problem, sizes, checkpoints, grad_output, final, result, running, slots, work, program, plan: tl.constexpr
):
    """Program ``program`` of one scan, if it has that many. Returns how many it has."""
    count = sizes.sequences * plan.heads
    if (program >= 0) & (program < count):
        backward_task(
            problem, sizes, checkpoints, grad_output, final, result, running, slots, work,
            program // plan.heads, program % plan.heads, plan,
        )  # fmt: skip
    return count


@triton.jit(do_not_specialize=["sizes"])
def backward_kernel(
    problems, sizes, checkpoints, grad_outputs, finals, results, running, slots, works, plans: tl.constexpr
):
    """One or several scans that do not depend on each other; each argument has an entry per scan.

    ``checkpoints``, ``running`` (None: the slots are float32) and ``slots`` hold contiguous tensors (weights,
    momentum), ``finals`` views of the gradients of the final state (None: all are 0). Grid ``(sum of S * heads,)``, as
    for the forward.
    """
    program = tl.program_id(0)
    for i in tl.static_range(len(plans)):
        program -= backward_program(
            problems[i], sizes[i], checkpoints[i], grad_outputs[i], finals[i], results[i], running[i], slots[i],
            works[i], program, item(plans, i),
        )  # fmt: skip
