"""The walks over the hidden layer that a chunk's backward is made of, and the memory they leave things in for each
other.

Each walk is short, few products and at most two float32 tiles carried, because a loop that holds more spills
registers. For the same reason hardly anything stays in registers between two walks: tokens are loaded again, and what
one walk computes for the next goes through scratch memory that stays in the GPU's caches. There,
results of products are also transposed: never in registers. No walk has a barrier in it; the caller puts one between a
walk that writes something and the next one that reads it, or the other way round.

Letters: ``d_x`` is the gradient of the outer loss with respect to ``x``; ``error`` that of the inner loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hope_kernels.backends.triton.activation import activate_with_curve, activate_with_slope
from hope_kernels.backends.triton.operands import (
    State,
    contiguous_state,
    contiguous_tokens,
    find_place,
    load_tokens,
    matrix_pointers,
    opaque,
    product,
    size,
    store_tokens,
)
from hope_kernels.backends.triton.resident_forward import hidden_values, load_layers, load_linear, scratch_tile


class Workspace(NamedTuple):
    """A program's own memory for one chunk. BC, BD: block sizes; H: hidden units; layers: 1, or 2 for glu."""

    tokens: Any  # float32 [5, BC, BD]
    squares: Any  # float32 [6, BC, BC], dgd
    vectors: Any  # float32 [13, BC], dgd
    slopes: Any  # float32 [2 layers, BC, H]: of hidden values by pre-activations; what errors add to their adjoints
    hidden: Any  # operand dtype [2 or (self) 3, BC, H]: hidden values at keys, queries and values
    d_inputs: Any  # operand dtype [2 or 3, layers, BC, H]: adjoints of the pre-activations
    d_passed: Any  # operand dtype [BC, H]: adjoint of the errors passed back through W_out
    errors: Any  # operand dtype [layers, BC, H]: what the input layers are written with
    d_errors: Any  # operand dtype [layers, BC, H], dgd: their adjoints


@triton.constexpr_function
def workspace_sizes(plan):
    """Elements of each part of a program's workspace, in the order of :class:`Workspace`."""
    area = 0 if plan.form == "linear" else plan.block_chunk * plan.hidden
    rows = 3 if plan.objective == "self" else 2
    delta_rule = 1 if plan.rule == "dgd" else 0
    return (
        5 * plan.block_chunk * plan.block_dim,
        6 * plan.block_chunk * plan.block_chunk * delta_rule,
        13 * plan.block_chunk * delta_rule,
        2 * plan.inputs * area,
        rows * area,
        rows * plan.inputs * area,
        area,
        plan.inputs * area,
        plan.inputs * area * delta_rule,
    )


# The first parts of a workspace are float32.
FLOAT_PARTS = 4


@triton.constexpr_function
def offset_of(plan, part):
    """Where a part begins: among those of its dtype for one program, or (the part behind the last) how much they
    are."""
    sizes = workspace_sizes(plan)
    return sum(sizes[FLOAT_PARTS if part > FLOAT_PARTS else 0 : part])


@triton.jit
def workspace_of(work, program, plan: tl.constexpr):
    """A program's part of ``work``: one tensor of float32 and one in the operand dtype, for all programs."""
    floats = work[0] + program * offset_of(plan, 4)
    operands = work[1] + program * offset_of(plan, 9)
    return Workspace(
        floats,
        floats + offset_of(plan, 1),
        floats + offset_of(plan, 2),
        floats + offset_of(plan, 3),
        operands,
        operands + offset_of(plan, 5),
        operands + offset_of(plan, 6),
        operands + offset_of(plan, 7),
        operands + offset_of(plan, 8),
    )


# Rows of tokens, in the order they have in ``hidden`` and ``d_inputs``.
KEYS = tl.constexpr(0)
QUERIES = tl.constexpr(1)
VALUES = tl.constexpr(2)

# Matrices in ``tokens``.
RIGHT = tl.constexpr(0)  # errors the last layer is written with: delta, or (dgd) the corrected ones
DELTA = tl.constexpr(1)
D_WRITTEN = tl.constexpr(2)  # gradient of the last layer's errors through its write alone
D_DELTA = tl.constexpr(3)
D_PRODUCT = tl.constexpr(4)  # gradient of the last layer's product at the keys

# Matrices in ``squares``.
INVERSE = tl.constexpr(0)  # (I + L)^-1 of the input layers (linear: of the only one)
INVERSE_HIDDEN = tl.constexpr(1)  # of the last layer
BETWEEN = tl.constexpr(2)
D_BETWEEN = tl.constexpr(3)
D_GRAM = tl.constexpr(4)
D_GRAM_HIDDEN = tl.constexpr(5)

# Rows of ``vectors``, each a value per token; DECAY has one value.
STEP_IN = tl.constexpr(0)
STEP_OUT = tl.constexpr(1)
BEFORE = tl.constexpr(2)
AFTER = tl.constexpr(3)
DECAY = tl.constexpr(4)
D_BEFORE = tl.constexpr(5)
D_AFTER = tl.constexpr(6)
D_DIAGONAL = tl.constexpr(7)  # factor of the input layers' inputs in their own gradient (linear: of the only one's)
D_DIAGONAL_HIDDEN = tl.constexpr(8)  # of the last layer's
SQUARE = tl.constexpr(9)  # squared norms of the last layer's inputs
D_STEP = tl.constexpr(10)  # gradient of the step through the last layer
D_WEIGHT_IN = tl.constexpr(11)  # of the weights of the input layers' write
D_BEFORE_IN = tl.constexpr(12)  # of ``before``, through the input layers


@triton.constexpr_function
def input_layers(plan):
    """How many layers read the token and feed the hidden layer."""
    return 0 if plan.form == "linear" else plan.inputs


class Write(NamedTuple):
    """How one chunk writes: the forward's coefficients and, for dgd, its solve."""

    lr: Any  # [BC]: gd and output: the step of the errors; dgd: the raw learning rate
    step_in: Any  # [BC]: weight of each token in the input layers
    step_out: Any  # [BC]: in the last layer (linear: the only one)
    momentum_step: Any
    before: Any  # [BC], dgd: products of the retention over earlier tokens
    after: Any  # [BC], dgd: over later tokens


class Span(NamedTuple):
    """Tokens ``first .. end`` of a sequence, pending ones counted; at most BC of them."""

    first: Any
    end: Any


class Task(NamedTuple):
    """One program's scan: the arguments of ``backward_kernel`` for it, and where its own number is."""

    problem: Any
    sizes: Any
    checkpoints: Any
    grad_output: Any
    results: Any
    running: Any
    slots: Any
    work: Any
    number: Any  # pointer


@triton.jit
def place_of(task, plan: tl.constexpr):
    """Where the program's tokens and chunks lie, from its number in memory.

    Each walk begins with this. From a number known to all of them a compiler would derive every address but once, and
    keep them all for the whole scan: on the stack, since registers do not suffice.
    """
    number = tl.load(task.number)
    return find_place(task.problem, task.sizes, number // plan.heads, number % plan.heads, plan)


@triton.jit
def slot_state(slots, place, sizes, i, plan: tl.constexpr):
    """The state in slot ``i``."""
    return contiguous_state(slots, place.sequence * size(sizes.interval) + i, plan)


@triton.jit
def enter(task, slot, plan: tl.constexpr):
    """What a walk works on: the place, the state in ``slot``, the adjoint and the program's workspace."""
    place = place_of(task, plan)
    adjoint = contiguous_state((task.results.weights, task.results.momentum), place.sequence, plan)
    work = workspace_of(task.work, place.sequence * plan.heads + place.head, plan)
    slot = opaque(slot, place.sequence, 1)
    return place, slot_state(task.slots, place, task.sizes, slot, plan), adjoint, work


# ---- blocks ----------------------------------------------------------------------------------------------------------


@triton.jit
def load_span(view, pending_view, place, span, plan: tl.constexpr):
    """``[BC, BD]`` in their own dtype; zeros where there is no token."""
    j = opaque(span.first, place.sequence, 1) + tl.arange(0, plan.block_chunk)
    o_d = tl.arange(0, plan.block_dim)
    return load_tokens(view, pending_view, place, j, j < span.end, o_d, o_d < plan.dim)


@triton.jit
def store_span(to, pending_to, sizes, place, span, x, plan: tl.constexpr):
    """Into contiguous results, of new tokens and pending ones; either may be None."""
    j = opaque(span.first, place.sequence, 1) + tl.arange(0, plan.block_chunk)
    o_d = tl.arange(0, plan.block_dim)
    view = None if to is None else contiguous_tokens(to, size(sizes.tokens), place, plan)
    pending_view = None if pending_to is None else contiguous_tokens(pending_to, size(sizes.pending), place, plan)
    store_tokens(view, pending_view, place, j, j < span.end, o_d, o_d < plan.dim, x)


@triton.jit
def row_tile(base, i: tl.constexpr, transposed: tl.constexpr, plan: tl.constexpr):
    """Pointers to matrix ``i`` of ``tokens``."""
    o_c = tl.arange(0, plan.block_chunk)
    o_d = tl.arange(0, plan.block_dim)
    matrix = base + i * plan.block_chunk * plan.block_dim
    if transposed:
        return scratch_tile(matrix, o_c[None, :], o_d[:, None], plan.block_dim)
    else:
        return scratch_tile(matrix, o_c[:, None], o_d[None, :], plan.block_dim)


@triton.jit
def load_rows(work, i: tl.constexpr, plan: tl.constexpr):
    return tl.load(row_tile(work.tokens, i, False, plan))


@triton.jit
def store_rows(work, i: tl.constexpr, x, plan: tl.constexpr):
    tl.store(row_tile(work.tokens, i, False, plan), x)


@triton.jit
def input_tile(view, row, head, h, plan: tl.constexpr):
    """Block ``h`` of an input layer's matrix, pointers and mask: ``[BD, BH]``."""
    o_d = tl.arange(0, plan.block_dim)[:, None]
    o_h = h + tl.arange(0, plan.block_hidden)[None, :]
    return matrix_pointers(view, row, head, o_d, o_h), (o_d < plan.dim) & (o_h < plan.hidden)


@triton.jit
def output_tile(view, row, head, h, plan: tl.constexpr):
    """Block ``h`` of the output layer's matrix, pointers and mask: ``[BH, BD]``."""
    o_h = h + tl.arange(0, plan.block_hidden)[:, None]
    o_d = tl.arange(0, plan.block_dim)[None, :]
    return matrix_pointers(view, row, head, o_h, o_d), (o_h < plan.hidden) & (o_d < plan.dim)


@triton.jit
def load_input(view, row, head, h, plan: tl.constexpr):
    pointers, mask = input_tile(view, row, head, h, plan)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_output(view, row, head, h, plan: tl.constexpr):
    pointers, mask = output_tile(view, row, head, h, plan)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_vector(work, i: tl.constexpr, plan: tl.constexpr):
    return tl.load(work.vectors + i * plan.block_chunk + tl.arange(0, plan.block_chunk))


@triton.jit
def store_vector(work, i: tl.constexpr, x, plan: tl.constexpr):
    tl.store(work.vectors + i * plan.block_chunk + tl.arange(0, plan.block_chunk), x)


@triton.jit
def load_block(base, i: tl.constexpr, h, plan: tl.constexpr):
    """Block ``h`` of matrix ``i`` of scratch ``[.., BC, H]``: ``[BC, BH]``."""
    o_c = tl.arange(0, plan.block_chunk)[:, None]
    o_h = h + tl.arange(0, plan.block_hidden)[None, :]
    pointers = scratch_tile(base + i * plan.block_chunk * plan.hidden, o_c, o_h, plan.hidden)
    return tl.load(pointers, mask=o_h < plan.hidden, other=0.0)


@triton.jit
def store_block(base, i: tl.constexpr, h, x, plan: tl.constexpr):
    o_c = tl.arange(0, plan.block_chunk)[:, None]
    o_h = h + tl.arange(0, plan.block_hidden)[None, :]
    pointers = scratch_tile(base + i * plan.block_chunk * plan.hidden, o_c, o_h, plan.hidden)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=o_h < plan.hidden)


@triton.jit
def square_tile(base, i: tl.constexpr, transposed: tl.constexpr, plan: tl.constexpr):
    """Pointers to matrix ``i`` of ``squares``."""
    o_c = tl.arange(0, plan.block_chunk)
    matrix = base + i * plan.block_chunk * plan.block_chunk
    if transposed:
        return scratch_tile(matrix, o_c[None, :], o_c[:, None], plan.block_chunk)
    else:
        return scratch_tile(matrix, o_c[:, None], o_c[None, :], plan.block_chunk)


# ---- reading ---------------------------------------------------------------------------------------------------------


@triton.jit
def rows_adjoint(x, d_out, rows: tl.constexpr, state, work, head, plan: tl.constexpr):
    """Adjoint of ``f_W(x)`` without the residual by ``x``: ``[BC, BD]`` float32. ``d_out`` is in the operand dtype.

    Leaves the hidden values and the adjoints of the pre-activations of these rows for :func:`update_adjoint`.
    """
    if plan.form == "linear":
        d_x = product(d_out, tl.trans(load_linear(state, head, plan)), plan)
    else:
        d_x = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
        for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
            h = opaque(h, state.row, plan.block_hidden)
            w_in, w_up, w_out = load_layers(state, head, h, plan)
            hidden, slope = activate_with_slope(product(x, w_in, plan), plan)
            d_hidden = product(d_out, tl.trans(w_out), plan)
            if plan.form == "glu":
                up = product(x, w_up, plan)
                d_up = d_hidden * hidden
                d_hidden *= up
                hidden *= up
                store_block(work.d_inputs, rows * plan.inputs + 1, h, d_up, plan)
                d_x += product(d_up, tl.trans(w_up), plan)
            d_z = d_hidden * slope
            store_block(work.hidden, rows, h, hidden, plan)
            store_block(work.d_inputs, rows * plan.inputs, h, d_z, plan)
            d_x += product(d_z, tl.trans(w_in), plan)
    return d_x


# ---- writing ---------------------------------------------------------------------------------------------------------


@triton.jit
def key_products(xk, state, adjoint, work, head, plan: tl.constexpr):
    """``f_W(k)`` without the residual, ``H A`` with the last layer's adjoint, both ``[BC, BD]``, and ``|h|^2 [BC]``.

    H are the last layer's inputs: its hidden values, which stay in ``work``, or the keys of a linear memory.
    """
    out = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    through = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    square = tl.full([plan.block_chunk], 0.0, tl.float32)
    if plan.form == "linear":
        if plan.needs_prediction or plan.rule == "dgd":
            out = product(xk, load_linear(state, head, plan), plan)
        through = product(xk, load_linear(adjoint, head, plan), plan)
        keys = xk.to(tl.float32)
        square = tl.sum(keys * keys, 1)
    else:
        for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
            h = opaque(h, state.row, plan.block_hidden)
            w_in, w_up, w_out = load_layers(state, head, h, plan)
            hidden = hidden_values(xk, w_in, w_up, plan)
            store_block(work.hidden, KEYS, h, hidden, plan)
            if plan.rule == "dgd":
                square += tl.sum(hidden * hidden, 1)
            if plan.needs_prediction or plan.rule == "dgd":
                out += product(hidden, w_out, plan)
            a_out = load_output(adjoint.weights[plan.weights - 1], adjoint.row, head, h, plan)
            through += product(hidden, a_out, plan)
    return out, through, square


@triton.jit
def through_momentum(xk, adjoint, work, head, plan: tl.constexpr):
    """``H S`` with the adjoint of the last layer's momentum, ``[BC, BD]``."""
    if plan.form == "linear":
        return product(xk, load_linear(State(adjoint.momentum, (), adjoint.row), head, plan), plan)
    else:
        through = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
        for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
            h = opaque(h, adjoint.row, plan.block_hidden)
            s_out = load_output(adjoint.momentum[plan.weights - 1], adjoint.row, head, h, plan)
            through += product(load_block(work.hidden, KEYS, h, plan), s_out, plan)
        return through


@triton.jit
def corrected_errors(xk, delta, write, state, work, head, plan: tl.constexpr):
    """dgd: what the solve of the input layers starts from, ``E + diag(before) Z``, into the keys' ``d_inputs``, which
    are free until :func:`keys_adjoint`. ``delta`` is in the operand dtype.

    This and :func:`solve_errors` are walks of their own: in one with :func:`errors_adjoint` they would spill.
    """
    for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
        h = opaque(h, state.row, plan.block_hidden)
        w_in, w_up, w_out = load_layers(state, head, h, plan)
        z = product(xk, w_in, plan)
        gate, slope = activate_with_slope(z, plan)
        passed = product(delta, tl.trans(w_out), plan)
        if plan.form == "glu":
            up = product(xk, w_up, plan)
            corrected = passed * gate + write.before[:, None] * up
            store_block(work.d_inputs, KEYS * plan.inputs + 1, h, corrected, plan)
            passed *= up
        store_block(work.d_inputs, KEYS * plan.inputs, h, passed * slope + write.before[:, None] * z, plan)


@triton.jit
def solve_errors(xk, write, inverses, adjoint, work, head, plan: tl.constexpr):
    """dgd: solves for the errors that the input layers are written with, and for the adjoints of the corrected ones.

    Returns what their write adds to the gradient ``[BC]`` of the step.
    """
    d_step = tl.full([plan.block_chunk], 0.0, tl.float32)
    for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
        h = opaque(h, adjoint.row, plan.block_hidden)
        for i in tl.static_range(input_layers(plan)):
            right = product(inverses[0], load_block(work.d_inputs, KEYS * plan.inputs + i, h, plan), plan)
            store_block(work.errors, i, h, right, plan)
            through = product(xk, load_input(adjoint.weights[i], adjoint.row, head, h, plan), plan)
            d_step -= tl.sum(through * right, 1)
            store_block(work.d_errors, i, h, product(inverses[1], -write.step_in[:, None] * through, plan), plan)
    return d_step


@triton.jit
def input_layer_adjoint(i: tl.constexpr, xk, z, error, write, sums, adjoint, work, head, h, plan: tl.constexpr):
    """Block ``h`` of the write of input layer ``i``: the adjoint ``[BC, BH]`` of its ``error``.

    ``sums`` gathers gradients per token, gd: of step and momentum step; dgd: of ``before``, as the second.
    """
    if plan.rule == "dgd":
        d_error = load_block(work.d_errors, i, h, plan).to(tl.float32)
        return d_error, (sums[0], sums[1] + tl.sum(d_error * z, 1))
    else:
        through = product(xk, load_input(adjoint.weights[i], adjoint.row, head, h, plan), plan)
        store_block(work.errors, i, h, error, plan)
        first = sums[0] - tl.sum(through * error, 1)
        second = sums[1]
        d_error = -write.step_in[:, None] * through
        if len(adjoint.momentum) > 0:
            through = product(xk, load_input(adjoint.momentum[i], adjoint.row, head, h, plan), plan)
            second -= tl.sum(through * error, 1)
            d_error -= write.momentum_step[:, None] * through
        return d_error, (first, second)


@triton.jit
def errors_adjoint(xk, delta, write, state, adjoint, work, head, plan: tl.constexpr):
    """The write of the input layers and the way their errors are formed: what it adds to ``d_delta [BC, BD]``, and the
    sums of :func:`input_layer_adjoint`. ``delta`` is in the operand dtype.

    Leaves for later walks the errors, what passes W_out, the slopes and what pre-activations get directly.
    """
    d_delta = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    zeros = tl.full([plan.block_chunk], 0.0, tl.float32)
    sums = (zeros, zeros)
    for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
        h = opaque(h, state.row, plan.block_hidden)
        w_in, w_up, w_out = load_layers(state, head, h, plan)
        z = product(xk, w_in, plan)
        gate, slope, curve = activate_with_curve(z, plan)
        passed = product(delta, tl.trans(w_out), plan)
        if plan.form == "glu":
            up = product(xk, w_up, plan)
            error = passed * up * slope
            d_error, sums = input_layer_adjoint(0, xk, z, error, write, sums, adjoint, work, head, h, plan)
            d_up_error, sums = input_layer_adjoint(
                1, xk, up, passed * gate, write, sums, adjoint, work, head, h, plan
            )  # fmt: skip
            d_passed = d_error * up * slope + d_up_error * gate
            extra = passed * (d_error * up * curve + d_up_error * slope)
            extra_up = passed * d_error * slope
            if plan.rule == "dgd":
                extra_up += write.before[:, None] * d_up_error
            store_block(work.slopes, 2, h, gate, plan)
            store_block(work.slopes, 3, h, extra_up, plan)
            slope *= up
        else:
            d_error, sums = input_layer_adjoint(0, xk, z, passed * slope, write, sums, adjoint, work, head, h, plan)
            d_passed = d_error * slope
            extra = d_error * passed * curve
        if plan.rule == "dgd":
            extra += write.before[:, None] * d_error
        store_block(work.slopes, 0, h, slope, plan)
        store_block(work.slopes, 1, h, extra, plan)
        store_block(work.d_passed, 0, h, d_passed, plan)
        d_delta += product(d_passed, w_out, plan)
    return d_delta, sums


@triton.jit
def keys_adjoint(d_out, right, d_overlap, write, state, adjoint, work, head, plan: tl.constexpr):
    """Gradient ``[BC, BD]`` of the keys as inputs of the layers; leaves the adjoints of the pre-activations.

    ``d_out`` is in the operand dtype; ``right`` are the errors the last layer is written with; ``d_overlap [BC, BC]``,
    dgd: the adjoint of its inputs' overlaps.
    """
    d_x = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    written = (write.step_out[:, None] * right).to(plan.operand)
    if len(adjoint.momentum) > 0:
        sped = (write.momentum_step[:, None] * right).to(plan.operand)
    for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
        h = opaque(h, state.row, plan.block_hidden)
        w_in, w_up, w_out = load_layers(state, head, h, plan)
        a_out = load_output(adjoint.weights[plan.weights - 1], adjoint.row, head, h, plan)
        d_hidden = -product(written, tl.trans(a_out), plan)
        if len(adjoint.momentum) > 0:
            s_out = load_output(adjoint.momentum[plan.weights - 1], adjoint.row, head, h, plan)
            d_hidden -= product(sped, tl.trans(s_out), plan)
        if plan.needs_prediction or plan.rule == "dgd":
            d_hidden += product(d_out, tl.trans(w_out), plan)
        if plan.rule == "dgd":
            d_hidden += product(d_overlap, load_block(work.hidden, KEYS, h, plan), plan)
        for i in tl.static_range(input_layers(plan)):
            d_z = d_hidden * load_block(work.slopes, 2 * i, h, plan) + load_block(work.slopes, 2 * i + 1, h, plan)
            store_block(work.d_inputs, KEYS * plan.inputs + i, h, d_z, plan)
            d_x += product(d_z, tl.trans(w_in if i == 0 else w_up), plan)
            error = load_block(work.errors, i, h, plan).to(tl.float32)
            a_in = load_input(adjoint.weights[i], adjoint.row, head, h, plan)
            d_x -= product(write.step_in[:, None] * error, tl.trans(a_in), plan)
            if len(adjoint.momentum) > 0:
                s_in = load_input(adjoint.momentum[i], adjoint.row, head, h, plan)
                d_x -= product(write.momentum_step[:, None] * error, tl.trans(s_in), plan)
    return d_x


@triton.jit
def carry_adjoint(
    i: tl.constexpr,
    pointers,
    mask,
    sums,
    factors,
    state,
    adjoint,
    head,
    o_in,
    o_out,
    wants_decay: tl.constexpr,
    plan: tl.constexpr,
):
    """A tile of the adjoint of weight ``i`` through ``decay W + carry S``; that of the momentum is updated in place.

    ``sums`` gathers the gradients of decay, carry and the momentum's decay, one partial sum per column.
    """
    tile = tl.load(pointers, mask=mask, other=0.0)
    d_decay, d_carry, d_momentum_decay = sums
    new = factors[0] * tile
    if wants_decay:
        w = tl.load(matrix_pointers(state.weights[i], state.row, head, o_in, o_out), mask=mask, other=0.0)
        d_decay += tl.sum(tile * w.to(tl.float32), 0)
    if len(adjoint.momentum) > 0:
        speed = tl.load(matrix_pointers(state.momentum[i], state.row, head, o_in, o_out), mask=mask, other=0.0)
        p_adjoint = matrix_pointers(adjoint.momentum[i], adjoint.row, head, o_in, o_out)
        d_speed = tl.load(p_adjoint, mask=mask, other=0.0)
        d_carry += tl.sum(tile * speed.to(tl.float32), 0)
        d_momentum_decay += tl.sum(d_speed * speed.to(tl.float32), 0)
        tl.store(p_adjoint, factors[1] * tile + factors[2] * d_speed, mask=mask)
    return new, (d_decay, d_carry, d_momentum_decay)


@triton.jit
def load_adjoint_tile(
    i: tl.constexpr, pointers, mask, sums, factors, state, adjoint, head, o_in, o_out,
    keys: tl.constexpr, wants_decay: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """A tile of the adjoint of weight ``i`` after the chunk, through the carry where the chunk writes (``keys``)."""
    if keys:
        return carry_adjoint(
            i, pointers, mask, sums, factors, state, adjoint, head, o_in, o_out, wants_decay, plan
        )  # fmt: skip
    else:
        return tl.load(pointers, mask=mask, other=0.0), sums


@triton.jit
def update_adjoint(
    task, slot, span, factors, keys: tl.constexpr, reads: tl.constexpr, wants_decay: tl.constexpr, plan: tl.constexpr
):
    """The adjoint of the state before the chunk from that after it: through carry and write (``keys``), and ``reads``.

    ``factors``: decay, carry and the momentum's decay. Returns their gradients.
    """
    values: tl.constexpr = keys and plan.objective == "self"
    prediction: tl.constexpr = plan.needs_prediction or plan.rule == "dgd"
    problem = task.problem
    o_d = tl.arange(0, plan.block_dim)
    last: tl.constexpr = plan.weights - 1
    d_decay = 0.0
    d_carry = 0.0
    d_momentum_decay = 0.0
    for i in tl.static_range(input_layers(plan)):
        place, state, adjoint, work = enter(task, slot, plan)
        zeros = tl.full([plan.block_hidden], 0.0, tl.float32)
        sums = (zeros, zeros, zeros)
        xk = load_span(problem.k, problem.pending_k, place, span, plan) if keys else None
        xv = load_span(problem.v, problem.pending_v, place, span, plan) if values else None
        xq = load_span(problem.q, None, place, span, plan) if reads else None
        for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
            h = opaque(h, state.row, plan.block_hidden)
            o_h = h + tl.arange(0, plan.block_hidden)
            pointers, mask = input_tile(adjoint.weights[i], adjoint.row, place.head, h, plan)
            tile, sums = load_adjoint_tile(
                i, pointers, mask, sums, factors, state, adjoint, place.head, o_d[:, None], o_h[None, :],
                keys, wants_decay, plan,
            )  # fmt: skip
            if keys:
                d_z = load_block(work.d_inputs, KEYS * plan.inputs + i, h, plan)
                tile += product(tl.trans(xk), d_z, plan)
            if values:
                d_z = load_block(work.d_inputs, VALUES * plan.inputs + i, h, plan)
                tile += product(tl.trans(xv), d_z, plan)
            if reads:
                d_z = load_block(work.d_inputs, QUERIES * plan.inputs + i, h, plan)
                tile += product(tl.trans(xq), d_z, plan)
            tl.store(pointers, tile, mask=mask)
        d_decay += tl.sum(sums[0])
        d_carry += tl.sum(sums[1])
        d_momentum_decay += tl.sum(sums[2])

    place, state, adjoint, work = enter(task, slot, plan)
    delta = load_rows(work, DELTA, plan).to(plan.operand) if keys and plan.form != "linear" else None
    d_fk = load_rows(work, D_PRODUCT, plan).to(plan.operand) if keys and prediction else None
    d_fv = (-load_rows(work, D_DELTA, plan)).to(plan.operand) if values else None
    d_fq = load_span(task.grad_output, None, place, span, plan) if reads else None
    zeros = tl.full([plan.block_dim], 0.0, tl.float32)
    sums = (zeros, zeros, zeros)
    if plan.form == "linear":
        pointers = matrix_pointers(adjoint.weights[0], adjoint.row, place.head, o_d[:, None], o_d[None, :])
        mask = (o_d[:, None] < plan.dim) & (o_d[None, :] < plan.dim)
        tile, sums = load_adjoint_tile(
            0, pointers, mask, sums, factors, state, adjoint, place.head, o_d[:, None], o_d[None, :],
            keys, wants_decay, plan,
        )  # fmt: skip
        if keys and prediction:
            tile += product(tl.trans(load_span(problem.k, problem.pending_k, place, span, plan)), d_fk, plan)
        if values:
            tile += product(tl.trans(load_span(problem.v, problem.pending_v, place, span, plan)), d_fv, plan)
        if reads:
            tile += product(tl.trans(load_span(problem.q, None, place, span, plan)), d_fq, plan)
        tl.store(pointers, tile, mask=mask)
    else:
        for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
            h = opaque(h, state.row, plan.block_hidden)
            o_h = h + tl.arange(0, plan.block_hidden)
            pointers, mask = output_tile(adjoint.weights[last], adjoint.row, place.head, h, plan)
            tile, sums = load_adjoint_tile(
                last, pointers, mask, sums, factors, state, adjoint, place.head, o_h[:, None], o_d[None, :],
                keys, wants_decay, plan,
            )  # fmt: skip
            if keys:
                tile += product(tl.trans(load_block(work.d_passed, 0, h, plan)), delta, plan)
                if prediction:
                    tile += product(tl.trans(load_block(work.hidden, KEYS, h, plan)), d_fk, plan)
            if values:
                tile += product(tl.trans(load_block(work.hidden, VALUES, h, plan)), d_fv, plan)
            if reads:
                tile += product(tl.trans(load_block(work.hidden, QUERIES, h, plan)), d_fq, plan)
            tl.store(pointers, tile, mask=mask)
    return d_decay + tl.sum(sums[0]), d_carry + tl.sum(sums[1]), d_momentum_decay + tl.sum(sums[2])
