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
    call_level,
    contiguous_state,
    item,
    opaque,
    product,
    size,
)
from hope_kernels.backends.triton.resident_adjoint import (
    AFTER,
    BEFORE,
    BETWEEN,
    D_AFTER,
    D_BEFORE,
    D_BEFORE_IN,
    D_BETWEEN,
    D_DELTA,
    D_DIAGONAL,
    D_DIAGONAL_HIDDEN,
    D_GRAM,
    D_GRAM_HIDDEN,
    D_PRODUCT,
    D_STEP,
    D_WEIGHT_IN,
    D_WRITTEN,
    DECAY,
    DELTA,
    INVERSE,
    INVERSE_HIDDEN,
    QUERIES,
    RIGHT,
    SQUARE,
    STEP_IN,
    STEP_OUT,
    VALUES,
    Span,
    Task,
    Write,
    corrected_errors,
    enter,
    errors_adjoint,
    input_layers,
    key_products,
    keys_adjoint,
    load_block,
    load_rows,
    load_span,
    load_vector,
    place_of,
    row_tile,
    rows_adjoint,
    slot_state,
    solve_errors,
    square_tile,
    store_rows,
    store_span,
    store_vector,
    through_momentum,
    update_adjoint,
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
def load_write(coefficients, place, chunk, work, plan: tl.constexpr):
    """How the chunk writes, from the coefficients; for dgd from what its solve left in ``vectors``."""
    step = load_gate(coefficients.step, place, chunk, 0.0, plan)
    if plan.rule == "dgd":
        return Write(
            step,
            load_vector(work, STEP_IN, plan),
            load_vector(work, STEP_OUT, plan),
            step,
            load_vector(work, BEFORE, plan),
            load_vector(work, AFTER, plan),
        )
    else:
        momentum_step = step
        if coefficients.momentum_step is not None:
            momentum_step = load_gate(coefficients.momentum_step, place, chunk, 0.0, plan)
        return Write(step, step, step, momentum_step, step, step)


@triton.jit
def load_factors(coefficients, place, chunk, work, plan: tl.constexpr):
    """Decay, carry and the momentum's decay of the chunk."""
    decay = load_factor(coefficients.decay, place, chunk, 1.0, plan)
    if plan.rule == "dgd":
        decay = tl.load(work.vectors + DECAY * plan.block_chunk)
    return (
        decay,
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
def chunk_adjoint(task, chunk, slot, reads: tl.constexpr, plan: tl.constexpr):
    """The adjoint of one complete chunk: gradients of its tokens and coefficients, and the adjoint of its first state.

    Starts and ends behind a barrier.
    """
    delta_rule: tl.constexpr = plan.rule == "dgd"
    values: tl.constexpr = plan.objective == "self"
    hidden_layer: tl.constexpr = plan.form != "linear"
    problem = task.problem
    results = task.results
    coefficients = problem.coefficients
    span = Span(chunk * plan.chunk, (chunk + 1) * plan.chunk)

    # What the chunk computed, and the last layer's write.
    if values:
        place, state, adjoint, work = enter(task, slot, plan)
        xv = load_span(problem.v, problem.pending_v, place, span, plan)
        store_rows(work, D_WRITTEN, read_rows(xv, state, place.head, plan), plan)
    place, state, adjoint, work = enter(task, slot, plan)
    xk = load_span(problem.k, problem.pending_k, place, span, plan)
    b_k, through, square = key_products(xk, state, adjoint, work, place.head, plan)
    tl.debug_barrier()
    place, state, adjoint, work = enter(task, slot, plan)
    delta = b_k
    if plan.residual:
        delta += load_span(problem.k, problem.pending_k, place, span, plan).to(tl.float32)
    target = load_rows(work, D_WRITTEN, plan) if values else b_k
    delta = form_delta(delta, load_span(problem.v, problem.pending_v, place, span, plan), target, plan)
    store_rows(work, DELTA, delta, plan)
    d_momentum_step = tl.full([plan.block_chunk], 0.0, tl.float32)
    if delta_rule:
        store_rows(work, D_DELTA, through, plan)
        store_rows(work, D_PRODUCT, b_k, plan)
        store_vector(work, SQUARE, square, plan)
        tl.debug_barrier()
        last_layer_solve(task, slot, span, chunk, plan)
    else:
        write = load_write(coefficients, place, chunk, work, plan)
        d_step = -tl.sum(through * delta, 1)
        tl.debug_barrier()
        store_rows(work, D_WRITTEN, -write.step_out[:, None] * through, plan)
        tl.debug_barrier()
        if len(adjoint.momentum) > 0:
            place, state, adjoint, work = enter(task, slot, plan)
            xk = load_span(problem.k, problem.pending_k, place, span, plan)
            through = through_momentum(xk, adjoint, work, place.head, plan)
            place, state, adjoint, work = enter(task, slot, plan)
            write = load_write(coefficients, place, chunk, work, plan)
            d_momentum_step -= tl.sum(through * load_rows(work, DELTA, plan), 1)
            d_written = load_rows(work, D_WRITTEN, plan) - write.momentum_step[:, None] * through
            tl.debug_barrier()
            store_rows(work, D_WRITTEN, d_written, plan)
            tl.debug_barrier()

    # The input layers' write, and how their errors depend on delta.
    place, state, adjoint, work = enter(task, slot, plan)
    if hidden_layer:
        if delta_rule:
            write = load_write(coefficients, place, chunk, work, plan)
            xk = load_span(problem.k, problem.pending_k, place, span, plan)
            delta = load_rows(work, DELTA, plan).to(plan.operand)
            corrected_errors(xk, delta, write, state, work, place.head, plan)
            tl.debug_barrier()
            place, state, adjoint, work = enter(task, slot, plan)
            write = load_write(coefficients, place, chunk, work, plan)
            xk = load_span(problem.k, problem.pending_k, place, span, plan)
            inverses = (
                tl.load(square_tile(work.squares, INVERSE, False, plan)).to(plan.operand),
                tl.load(square_tile(work.squares, INVERSE, True, plan)).to(plan.operand),
            )
            store_vector(work, D_WEIGHT_IN, solve_errors(xk, write, inverses, adjoint, work, place.head, plan), plan)
            tl.debug_barrier()
            place, state, adjoint, work = enter(task, slot, plan)
        write = load_write(coefficients, place, chunk, work, plan)
        xk = load_span(problem.k, problem.pending_k, place, span, plan)
        delta = load_rows(work, DELTA, plan).to(plan.operand)
        d_delta, sums = errors_adjoint(xk, delta, write, state, adjoint, work, place.head, plan)
        place, state, adjoint, work = enter(task, slot, plan)
        d_delta += load_rows(work, D_WRITTEN, plan)
        if delta_rule:
            store_vector(work, D_BEFORE_IN, sums[1], plan)
        else:
            d_step += sums[0]
            d_momentum_step += sums[1]
    else:
        d_delta = load_rows(work, D_WRITTEN, plan)
    if not delta_rule:
        store_gate(results.coefficients.step, place, chunk, d_step, plan)
        store_gate(results.coefficients.momentum_step, place, chunk, d_momentum_step, plan)

    # The objective.
    if plan.objective == "error":
        store_span(results.v, results.pending_v, task.sizes, place, span, d_delta, plan)
    elif not values:
        store_span(results.v, results.pending_v, task.sizes, place, span, -d_delta, plan)
    store_rows(work, D_DELTA, d_delta, plan)
    d_product = d_delta
    if not plan.needs_prediction:
        d_product = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    if delta_rule:
        before = load_vector(work, BEFORE, plan)
        d_product += before[:, None] * load_rows(work, D_WRITTEN, plan)
    store_rows(work, D_PRODUCT, d_product, plan)
    tl.debug_barrier()

    # The layers at the keys.
    if delta_rule:
        if hidden_layer:
            input_layers_solve(task, slot, span, chunk, plan)
        else:
            store_gate(results.coefficients.step, place, chunk, load_vector(work, D_STEP, plan), plan)
    place, state, adjoint, work = enter(task, slot, plan)
    write = load_write(coefficients, place, chunk, work, plan)
    d_overlap = write.lr
    if delta_rule and hidden_layer:
        d_overlap = load_overlap(work, D_GRAM_HIDDEN, D_DIAGONAL_HIDDEN, plan)
    right = load_rows(work, RIGHT if delta_rule else DELTA, plan)
    d_out = load_rows(work, D_PRODUCT, plan).to(plan.operand)
    if hidden_layer:
        d_xk = keys_adjoint(d_out, right, d_overlap, write, state, adjoint, work, place.head, plan)
        place, state, adjoint, work = enter(task, slot, plan)
    else:
        d_xk = product(d_out, tl.trans(load_linear(state, place.head, plan)), plan)
        d_xk -= product(write.step_out[:, None] * right, tl.trans(load_linear(adjoint, place.head, plan)), plan)
        if len(adjoint.momentum) > 0:
            s = load_linear(State(adjoint.momentum, (), adjoint.row), place.head, plan)
            d_xk -= product(write.momentum_step[:, None] * right, tl.trans(s), plan)
    if plan.residual and plan.needs_prediction:
        d_xk += load_rows(work, D_DELTA, plan)
    if delta_rule:
        xk = load_span(problem.k, problem.pending_k, place, span, plan)
        d_xk += product(load_overlap(work, D_GRAM, D_DIAGONAL, plan), xk, plan)
    store_span(results.k, results.pending_k, task.sizes, place, span, d_xk, plan)

    # What the values (`self`) and the queries read.
    if values:
        place, state, adjoint, work = enter(task, slot, plan)
        xv = load_span(problem.v, problem.pending_v, place, span, plan)
        d_out = (-load_rows(work, D_DELTA, plan)).to(plan.operand)
        d_xv = rows_adjoint(xv, d_out, VALUES, state, work, place.head, plan)
        place, state, adjoint, work = enter(task, slot, plan)
        if plan.residual:
            d_xv -= load_rows(work, D_DELTA, plan)
        store_span(results.v, results.pending_v, task.sizes, place, span, d_xv, plan)
    if reads:
        queries_adjoint(task, slot, span, plan)

    tl.debug_barrier()
    wants_decay: tl.constexpr = results.coefficients.decay is not None or results.coefficients.retention is not None
    place, state, adjoint, work = enter(task, slot, plan)
    factors = load_factors(coefficients, place, chunk, work, plan)
    d_decay, d_carry, d_momentum_decay = update_adjoint(task, slot, span, factors, True, reads, wants_decay, plan)
    place, state, adjoint, work = enter(task, slot, plan)
    store_factor(results.coefficients.decay, place, chunk, d_decay, plan)
    store_factor(results.coefficients.momentum_carry, place, chunk, d_carry, plan)
    store_factor(results.coefficients.momentum_decay, place, chunk, d_momentum_decay, plan)
    if results.coefficients.retention is not None:
        d_retention = retention_adjoint(
            tl.load(square_tile(work.squares, BETWEEN, False, plan)),
            tl.load(square_tile(work.squares, BETWEEN, True, plan)),
            load_vector(work, BEFORE, plan),
            load_vector(work, AFTER, plan),
            tl.load(square_tile(work.squares, D_BETWEEN, False, plan)),
            load_vector(work, D_BEFORE, plan),
            load_vector(work, D_AFTER, plan),
            d_decay,
            plan,
        )
        store_gate(results.coefficients.retention, place, chunk, d_retention, plan)
    tl.debug_barrier()


@triton.jit
def queries_adjoint(task, slot, span, plan: tl.constexpr):
    """Gradients of the queries of ``span``, read in the state of ``slot``."""
    place, state, _, work = enter(task, slot, plan)
    xq = load_span(task.problem.q, None, place, span, plan)
    d_out = load_span(task.grad_output, None, place, span, plan).to(plan.operand)
    d_xq = rows_adjoint(xq, d_out, QUERIES, state, work, place.head, plan)
    place = place_of(task, plan)
    if plan.residual:
        d_xq += load_span(task.grad_output, None, place, span, plan).to(tl.float32)
    store_span(task.results.q, None, task.sizes, place, span, d_xq, plan)


# ---- delta gradient descent ------------------------------------------------------------------------------------------


@triton.jit
def last_layer_solve(task, slot, span, chunk, plan: tl.constexpr):
    """The solves of one chunk and the adjoint of the last layer's.

    Takes delta, ``H A`` and ``H W`` from ``DELTA``, ``D_DELTA`` and ``D_PRODUCT``, and ``SQUARE``. Leaves ``RIGHT``,
    ``D_WRITTEN``, all of ``vectors`` that the input layers do not leave, and all of ``squares`` but ``D_GRAM``, which a
    linear memory has instead of ``D_GRAM_HIDDEN``. Starts and ends behind a barrier.
    """
    linear: tl.constexpr = plan.form == "linear"
    inverse_i: tl.constexpr = INVERSE if linear else INVERSE_HIDDEN
    gram_i: tl.constexpr = D_GRAM if linear else D_GRAM_HIDDEN
    diagonal_i: tl.constexpr = D_DIAGONAL if linear else D_DIAGONAL_HIDDEN
    problem = task.problem
    place, _, _, work = enter(task, slot, plan)
    lr = load_gate(problem.coefficients.step, place, chunk, 0.0, plan)
    row = (place.chunk_row + chunk) * plan.heads + place.head
    before, after, between, decay = load_products(problem.coefficients.retention, row, plan)
    tl.store(square_tile(work.squares, BETWEEN, False, plan), between)
    tl.store(work.vectors + DECAY * plan.block_chunk, decay)
    store_vector(work, BEFORE, before, plan)
    store_vector(work, AFTER, after, plan)
    xk = load_span(problem.k, problem.pending_k, place, span, plan)
    keys = xk.to(tl.float32)
    proximal = effective_step(lr, tl.sum(keys * keys, 1))
    store_vector(work, STEP_IN, proximal * after, plan)
    gram = product(xk, tl.trans(xk), plan)
    if linear:
        store_vector(work, STEP_OUT, proximal * after, plan)
        # The overlaps wait where their gradient will be.
        tl.store(square_tile(work.squares, gram_i, False, plan), gram)
    tl.store(square_tile(work.squares, INVERSE, False, plan), overlap_inverse(gram, proximal, between, plan))
    if not linear:
        tl.debug_barrier()
        place, state, _, work = enter(task, slot, plan)
        gram = hidden_overlaps(work, state.row, plan)
        tl.store(square_tile(work.squares, gram_i, False, plan), gram)
        lr = load_gate(problem.coefficients.step, place, chunk, 0.0, plan)
        proximal = effective_step(lr, load_vector(work, SQUARE, plan))
        between = tl.load(square_tile(work.squares, BETWEEN, False, plan))
        store_vector(work, STEP_OUT, proximal * load_vector(work, AFTER, plan), plan)
        tl.store(square_tile(work.squares, INVERSE_HIDDEN, False, plan), overlap_inverse(gram, proximal, between, plan))
    tl.debug_barrier()

    place, _, _, work = enter(task, slot, plan)
    before = load_vector(work, BEFORE, plan)
    inverse = tl.load(square_tile(work.squares, inverse_i, False, plan))
    corrected = load_rows(work, DELTA, plan) + before[:, None] * load_rows(work, D_PRODUCT, plan)
    right = product(inverse, corrected, plan)
    store_rows(work, RIGHT, right, plan)
    tl.debug_barrier()

    place, _, _, work = enter(task, slot, plan)
    through = load_rows(work, D_DELTA, plan)
    d_weight = -tl.sum(through * load_rows(work, RIGHT, plan), 1)
    inverse_t = tl.load(square_tile(work.squares, inverse_i, True, plan))
    d_errors = product(inverse_t, -load_vector(work, STEP_OUT, plan)[:, None] * through, plan)
    store_rows(work, D_WRITTEN, d_errors, plan)
    store_vector(work, D_BEFORE, tl.sum(d_errors * load_rows(work, D_PRODUCT, plan), 1), plan)
    right_t = tl.load(row_tile(work.tokens, RIGHT, True, plan))  # [BD, BC]
    d_gram, d_diagonal, d_step, d_after, d_between = overlap_adjoint(
        -gradient_product(d_errors, right_t, plan),
        d_weight,
        tl.load(square_tile(work.squares, gram_i, False, plan)),
        load_gate(problem.coefficients.step, place, chunk, 0.0, plan),
        load_vector(work, SQUARE, plan),
        tl.load(square_tile(work.squares, BETWEEN, False, plan)),
        load_vector(work, AFTER, plan),
    )
    tl.debug_barrier()
    tl.store(square_tile(work.squares, gram_i, False, plan), d_gram)
    tl.store(square_tile(work.squares, D_BETWEEN, False, plan), d_between)
    store_vector(work, D_AFTER, d_after, plan)
    store_vector(work, diagonal_i, d_diagonal, plan)
    store_vector(work, D_STEP, d_step, plan)
    tl.debug_barrier()


@triton.jit
def input_layers_solve(task, slot, span, chunk, plan: tl.constexpr):
    """Adjoint of the input layers' solve, which completes the gradient of the step.

    Takes ``D_STEP``, ``D_WEIGHT_IN`` and ``D_BEFORE_IN``. Leaves ``D_GRAM`` and ``D_DIAGONAL``. Starts and ends behind
    a barrier.
    """
    problem = task.problem
    place, state, _, work = enter(task, slot, plan)
    d_lower = tl.full([plan.block_chunk, plan.block_chunk], 0.0, tl.float32)
    for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
        h = opaque(h, state.row, plan.block_hidden)
        for i in tl.static_range(input_layers(plan)):
            right = load_block(work.errors, i, h, plan)
            d_lower -= product(load_block(work.d_errors, i, h, plan), tl.trans(right), plan)
    place, _, _, work = enter(task, slot, plan)
    xk = load_span(problem.k, problem.pending_k, place, span, plan)
    keys = xk.to(tl.float32)
    lr = load_gate(problem.coefficients.step, place, chunk, 0.0, plan)
    between = tl.load(square_tile(work.squares, BETWEEN, False, plan))
    after = load_vector(work, AFTER, plan)
    d_gram, d_diagonal, d_step_in, d_after, d_between = overlap_adjoint(
        d_lower, load_vector(work, D_WEIGHT_IN, plan), product(xk, tl.trans(xk), plan), lr, tl.sum(keys * keys, 1),
        between, after,
    )  # fmt: skip
    d_step = load_vector(work, D_STEP, plan) + d_step_in
    store_gate(task.results.coefficients.step, place, chunk, d_step, plan)
    d_between += tl.load(square_tile(work.squares, D_BETWEEN, False, plan))
    d_after += load_vector(work, D_AFTER, plan)
    d_before = load_vector(work, D_BEFORE_IN, plan) + load_vector(work, D_BEFORE, plan)
    tl.debug_barrier()
    tl.store(square_tile(work.squares, D_BETWEEN, False, plan), d_between)
    tl.store(square_tile(work.squares, D_GRAM, False, plan), d_gram)
    store_vector(work, D_AFTER, d_after, plan)
    store_vector(work, D_BEFORE, d_before, plan)
    store_vector(work, D_DIAGONAL, d_diagonal, plan)
    tl.debug_barrier()


@triton.jit
def load_overlap(work, gram: tl.constexpr, diagonal: tl.constexpr, plan: tl.constexpr):
    """What a layer's inputs are multiplied by in their own gradient: ``G + G^T + diag``, ``[BC, BC]``."""
    o_c = tl.arange(0, plan.block_chunk)
    d_gram = tl.load(square_tile(work.squares, gram, False, plan))
    d_gram += tl.load(square_tile(work.squares, gram, True, plan))
    d_diagonal = load_vector(work, diagonal, plan)
    return (d_gram + tl.where(o_c[:, None] == o_c[None, :], d_diagonal[:, None], 0.0)).to(plan.operand)


# ---- one sequence and head -------------------------------------------------------------------------------------------


@triton.jit
def clear_tokens(to, pending_to, sizes, place, first, end, plan: tl.constexpr):
    """Gradient 0 for the tokens ``first .. end``."""
    zeros = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    for j in tl.range(first, end, plan.block_chunk, num_stages=1, disable_licm=True):
        store_span(to, pending_to, sizes, place, Span(j, end), zeros, plan)


@triton.jit
def load_adjoint(adjoint, final, head, plan: tl.constexpr):
    """Gradients of the final state."""
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
def rebuild_states(task, first, last, plan: tl.constexpr):
    """The states at the start of chunks ``first .. last`` into slots 0, 1, ..; ``first`` starts a segment.

    16-bit tokens have slots in their own dtype, since every product rounds the weights to it anyhow, and a float32
    running state. Starts and ends behind a barrier.
    """
    problem = task.problem
    sizes = task.sizes
    place = place_of(task, plan)
    start = segment_start(task.running, task.slots, place, sizes, plan)
    if first == 0:
        copy_state(start, State(problem.weights, problem.momentum, place.sequence), place.head, plan)
    elif task.checkpoints is not None:
        row = place.chunk_row // size(sizes.interval) + first // size(sizes.interval) - 1
        copy_state(start, contiguous_state(task.checkpoints, row, plan), place.head, plan)
    tl.debug_barrier()
    if task.running is not None:
        copy_state(slot_state(task.slots, place, sizes, 0, plan), start, place.head, plan)
    for chunk in tl.range(first, last, num_stages=1, disable_licm=True):
        tl.debug_barrier()
        place, before, _, work = enter(task, chunk - first, plan)
        chunk = opaque(chunk, place.sequence, 1)
        scratch = Scratch(work.tokens, work.squares, work.hidden)
        after = slot_state(task.slots, place, sizes, chunk - first + 1, plan)
        if task.running is not None:
            state = contiguous_state(task.running, place.sequence, plan)
            forward_chunk(problem, None, state, state, scratch, place, chunk, False, plan)
            place = place_of(task, plan)
            state = contiguous_state(task.running, place.sequence, plan)
            after = slot_state(task.slots, place, sizes, chunk - first + 1, plan)
            copy_state(after, state, place.head, plan)
        else:
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
def read_adjoint(task, slot, first, end, plan: tl.constexpr):
    """The adjoint of queries ``first .. end`` alone, read in ``slot``. Starts and ends behind a barrier."""
    for j in tl.range(first, end, plan.block_chunk, num_stages=1, disable_licm=True):
        span = Span(j, tl.minimum(j + plan.block_chunk, end))
        queries_adjoint(task, slot, span, plan)
        tl.debug_barrier()
        update_adjoint(task, slot, span, (1.0, 0.0, 0.0), False, True, False, plan)
        tl.debug_barrier()


@triton.jit
def chunk_task(task, chunk, slot, live, reads: tl.constexpr, plan: tl.constexpr):
    """One step back: the adjoint of ``chunk``, whose first state is in ``slot``; or of the queries behind the last one.

    ``live``: whether a gradient has reached the state after the chunk. If not, the write needs no adjoint. Returns the
    same for the state before.
    """
    results = task.results
    place = place_of(task, plan)
    chunk = opaque(chunk, place.sequence, 1)
    written = chunk < place.chunks
    bptt_chunks = size(task.sizes.bptt_chunks)
    if written & (bptt_chunks > 0):
        # The state after this chunk was detached.
        if (place.chunk_index + chunk + 1) % tl.maximum(bptt_chunks, 1) == 0:
            adjoint = contiguous_state((results.weights, results.momentum), place.sequence, plan)
            clear_adjoint(adjoint, place.head, plan)
            live = live * 0
            tl.debug_barrier()
    if written & (live > 0):
        if task.problem.k is not None:
            chunk_adjoint(task, chunk, slot, reads, plan)
    else:
        from_token = tl.maximum(chunk * plan.chunk, place.pending)
        to_token = place.pending + place.length
        if written:
            if task.problem.k is not None:
                to_token = (chunk + 1) * plan.chunk
                clear_tokens(results.k, results.pending_k, task.sizes, place, chunk * plan.chunk, to_token, plan)
                clear_tokens(results.v, results.pending_v, task.sizes, place, chunk * plan.chunk, to_token, plan)
                clear_coefficients(results.coefficients, place, chunk, plan)
        if reads:
            live = tl.where(from_token < to_token, 1, live)
            read_adjoint(task, slot, from_token, to_token, plan)
    return live


@triton.jit
def backward_task(
    problem, sizes, checkpoints, grad_output, final, results, running, slots, work, program, plan: tl.constexpr
):
    """The backward of the whole scan of the sequence and head of ``program``."""
    reads: tl.constexpr = problem.q is not None and grad_output is not None
    number = work[2] + program
    tl.store(number, program)
    tl.debug_barrier()
    task = Task(problem, sizes, checkpoints, grad_output, results, running, slots, work, number)
    place = place_of(task, plan)
    end = place.pending + place.length
    complete = place.chunks * plan.chunk
    adjoint = contiguous_state((results.weights, results.momentum), place.sequence, plan)
    if len(final) == 0:
        clear_adjoint(adjoint, place.head, plan)
    else:
        load_adjoint(adjoint, final, place.head, plan)
    # Nothing behind the last complete chunk was written.
    if problem.k is not None:
        clear_tokens(results.k, results.pending_k, sizes, place, complete, end, plan)
        clear_tokens(results.v, results.pending_v, sizes, place, complete, end, plan)
    if problem.q is not None and not reads:
        clear_tokens(results.q, None, sizes, place, place.pending, end, plan)
    tl.debug_barrier()

    # The last state that anything was computed with.
    newest = place.chunks - 1
    if reads:
        newest = tl.where(tl.maximum(complete, place.pending) < end, place.chunks, newest)
    live = 0 if len(final) == 0 else 1
    for back in tl.range(0, newest + 1, num_stages=1, disable_licm=True):
        chunk = newest - back
        interval = size(sizes.interval)
        first = chunk // interval * interval
        if (back == 0) | (chunk - first == interval - 1):
            rebuild_states(task, first, chunk, plan)
        live = chunk_task(task, chunk, chunk - first, live, reads, plan)


@triton.jit
def backward_program(
    problem, sizes, checkpoints, grad_output, final, result, running, slots, work, program, plan: tl.constexpr
):
    """Program ``program`` of one scan, if it has that many. Returns how many it has."""
    count = size(sizes.sequences) * plan.heads
    if (program >= 0) & (program < count):
        backward_task(
            problem, sizes, checkpoints, grad_output, final, result, running, slots, work, program, plan
        )  # fmt: skip
    return count


@triton.jit
def backward_kernel(
    problems, sizes, checkpoints, grad_outputs, finals, results, running, slots, works, plans: tl.constexpr
):
    """One or several scans that do not depend on each other; each argument has an entry per scan.

    ``checkpoints``, ``running`` (None: the slots are float32) and ``slots`` hold contiguous tensors (weights,
    momentum), ``finals`` views of the gradients of the final state (empty: all are 0). Grid ``(sum of S * heads,)``, as
    for the forward.
    """
    program = tl.program_id(0)
    for i in tl.static_range(len(plans)):
        program -= backward_program(
            problems[i], sizes[i], checkpoints[i], grad_outputs[i], finals[i], results[i], running[i], slots[i],
            works[i], program, item(plans, i),
        )  # fmt: skip


@triton.jit(noinline=True)
def backward_level(problem, sizes, checkpoints, grad_output, final, result, running, slots, work, program, plan):
    """:func:`backward_program`, as ``forward_level``."""
    backward_program(
        problem, sizes, checkpoints, grad_output, final, result, running, slots, work, program, plan
    )  # fmt: skip


@triton.jit
def backward_levels_kernel(
    problems, sizes, checkpoints, grad_outputs, finals, results, running, slots, works, chunks, plans: tl.constexpr
):
    """:func:`backward_kernel` for several scans, as ``forward_levels_kernel``."""
    program = tl.program_id(0)
    for i in tl.static_range(len(plans)):
        arguments = (
            problems[i], sizes[i], checkpoints[i], grad_outputs[i], finals[i], results[i], running[i], slots[i],
            works[i],
        )  # fmt: skip
        count = size(sizes[i].sequences) * item(plans, i).heads
        if (program >= 0) & (program < count):
            call_level(backward_level, arguments, program, chunks, plans, i)
        program -= count
