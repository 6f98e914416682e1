"""Forward of a resident scan: one program per sequence and head walks all chunks in one launch.

The float32 state lives in the tensor it is returned in, which stays in the GPU's L2 cache between chunks; what is on
chip is one block of the hidden layer at a time. Per chunk the hidden layer is walked twice: first for the outputs, then
for errors and update. FLOPs per token, mlp with objective l2: 16 D H, 2 D H more than the convention's 14, since the
second walk forms the keys' pre-activations again; state traffic per chunk: 4 D H values read, 2 D H written.

Global memory written by one warp is visible to the others only behind ``tl.debug_barrier()``: there is one between the
last read of a state and its first write, and one between that write and the next read. The second walk has the hidden
layer in rows, so that no result of a product has to be transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hope_kernels.backends.triton.activation import activate, activate_with_slope
from hope_kernels.backends.triton.delta_rule import effective_step, load_products, overlap_inverse
from hope_kernels.backends.triton.operands import (
    State,
    call_level,
    contiguous_state,
    copy_matrix,
    find_place,
    inner_size,
    item,
    load_tokens,
    matrix_pointers,
    opaque,
    outer_size,
    product,
    size,
    store_tokens,
)


class Scratch(NamedTuple):
    """A program's own global memory: what one walk over the hidden layer leaves for the next."""

    errors: Any  # float32 [2, BC, BD]: delta, and the errors that W_out is written with (dgd: corrected ones)
    inverse: Any  # float32 [BC, BC], dgd: (I + L)^-1 of the input layers
    hidden: Any  # operand dtype [BC, H], dgd: hidden values at the keys


# ---- reading ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_layers(state, head, h, plan: tl.constexpr):
    """Block ``h`` of the hidden layer: ``w_in, w_up [BD, BH]`` and ``w_out [BH, BD]`` (without glu, w_up is w_in)."""
    o_d = tl.arange(0, plan.block_dim)
    o_h = h + tl.arange(0, plan.block_hidden)
    m_d, m_h = o_d < plan.dim, o_h < plan.hidden
    m_in = m_d[:, None] & m_h[None, :]
    m_out = m_h[:, None] & m_d[None, :]
    p_in = matrix_pointers(state.weights[0], state.row, head, o_d[:, None], o_h[None, :])
    p_out = matrix_pointers(state.weights[plan.weights - 1], state.row, head, o_h[:, None], o_d[None, :])
    w_in = tl.load(p_in, mask=m_in, other=0.0)
    w_up = w_in
    if plan.form == "glu":
        p_up = matrix_pointers(state.weights[1], state.row, head, o_d[:, None], o_h[None, :])
        w_up = tl.load(p_up, mask=m_in, other=0.0)
    w_out = tl.load(p_out, mask=m_out, other=0.0)
    return w_in, w_up, w_out


@triton.jit
def hidden_values(x, w_in, w_up, plan: tl.constexpr):
    """``act(x W_in)``, times ``x W_up`` for glu."""
    hidden = activate(product(x, w_in, plan), plan)
    if plan.form == "glu":
        hidden *= product(x, w_up, plan)
    return hidden


@triton.jit
def load_linear(state, head, plan: tl.constexpr):
    """The whole weight of a linear memory, ``[BD, BD]``."""
    o_d = tl.arange(0, plan.block_dim)
    m_d = o_d < plan.dim
    pointers = matrix_pointers(state.weights[0], state.row, head, o_d[:, None], o_d[None, :])
    return tl.load(pointers, mask=m_d[:, None] & m_d[None, :], other=0.0)


@triton.jit
def read_rows(x, state, head, plan: tl.constexpr):
    """``f_W(x)`` for ``x [R, BD]``: ``[R, BD]`` float32."""
    if plan.form == "linear":
        out = product(x, load_linear(state, head, plan), plan)
    else:
        out = tl.full([x.shape[0], plan.block_dim], 0.0, tl.float32)
        for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
            h = opaque(h, state.row, plan.block_hidden)
            w_in, w_up, w_out = load_layers(state, head, h, plan)
            out += product(hidden_values(x, w_in, w_up, plan), w_out, plan)
    if plan.residual:
        out += x.to(tl.float32)
    return out


@triton.jit
def read_tail(problem, output, state, place, plan: tl.constexpr):
    """Outputs of the tokens behind the last complete chunk, and of all tokens where nothing is written."""
    o_c = tl.arange(0, plan.block_chunk)
    o_d = tl.arange(0, plan.block_dim)
    m_d = o_d < plan.dim
    end = place.pending + place.length
    first = tl.maximum(place.chunks * plan.chunk, place.pending)
    for j0 in tl.range(first, end, plan.block_chunk, num_stages=1, disable_licm=True):
        j = j0 + o_c
        m_j = j < end
        xq = load_tokens(problem.q, None, place, j, m_j, o_d, m_d)
        store_tokens(output, None, place, j, m_j, o_d, m_d, read_rows(xq, state, place.head, plan))


# ---- writing ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_gate(pointer, place, chunk, other, plan: tl.constexpr):
    """A per-token coefficient ``[M, heads, C]`` of one chunk, ``[BC]``; ``other`` behind its end."""
    o_c = tl.arange(0, plan.block_chunk)
    row = (place.chunk_row + chunk) * plan.heads + place.head
    return tl.load(pointer + row * plan.chunk + o_c, mask=o_c < plan.chunk, other=other)


@triton.jit
def load_factor(pointer, place, chunk, absent, plan: tl.constexpr):
    """A per-chunk coefficient ``[M, heads]``."""
    factor = tl.full([], absent, tl.float32)
    if pointer is not None:
        factor = tl.load(pointer + (place.chunk_row + chunk) * plan.heads + place.head)
    return factor


@triton.jit
def form_delta(prediction, v, target, plan: tl.constexpr):
    """``dl/df`` at the keys from ``prediction`` f(k), the values and, for objective ``self``, ``target`` f(v)."""
    if plan.objective == "l2":
        return prediction - v.to(tl.float32)
    elif plan.objective == "self":
        return prediction - target
    elif plan.objective == "dot":
        return -v.to(tl.float32)
    else:
        return v.to(tl.float32)


@triton.jit
def weighted_product(left, right, step, errors_right: tl.constexpr, plan: tl.constexpr):
    """``left diag(step) right``. The errors are what is weighted before rounding, as the eager path does: hidden values
    are smaller, and times a small step they would leave float16's range first."""
    if errors_right:
        return product(left, right * step[:, None], plan)
    else:
        return product(left * step[None, :], right, plan)


@triton.jit
def write_tile(
    before, after, i: tl.constexpr, head, o_in, o_out, mask, weight, left, right, steps, factors, plan: tl.constexpr
):
    """One tile of weight ``i`` after the chunk: ``decay W + carry S - left diag(step) right``, and of its momentum.

    ``left [rows, BC]`` and ``right [BC, columns]`` are the errors and inputs of an input layer, or the inputs and
    errors of the last one; ``steps`` holds the per-token steps of weight and momentum, ``factors`` decay, carry and
    the momentum's decay.
    """
    new = factors[0] * weight - weighted_product(left, right, steps[0], i == plan.weights - 1, plan)
    if len(before.momentum) > 0:
        p_speed = matrix_pointers(before.momentum[i], before.row, head, o_in, o_out)
        speed = tl.load(p_speed, mask=mask, other=0.0)
        new += factors[1] * speed
        new_speed = factors[2] * speed - weighted_product(left, right, steps[1], i == plan.weights - 1, plan)
        tl.store(matrix_pointers(after.momentum[i], after.row, head, o_in, o_out), new_speed, mask=mask)
    tl.store(matrix_pointers(after.weights[i], after.row, head, o_in, o_out), new, mask=mask)


@triton.jit
def scratch_tile(base, o_row, o_column, stride: tl.constexpr):
    """Pointers into a scratch matrix; exchanging the offsets' axes transposes it."""
    return base + o_row * stride + o_column


@triton.jit
def hidden_overlaps(scratch, row, plan: tl.constexpr):
    """``H H^T [BC, BC]`` of the hidden values at the keys."""
    o_c = tl.arange(0, plan.block_chunk)
    gram = tl.full([plan.block_chunk, plan.block_chunk], 0.0, tl.float32)
    for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
        h = opaque(h, row, plan.block_hidden)
        o_h = h + tl.arange(0, plan.block_hidden)
        rows = tl.load(
            scratch_tile(scratch.hidden, o_c[:, None], o_h[None, :], plan.hidden),
            mask=(o_h < plan.hidden)[None, :],
            other=0.0,
        )
        gram += product(rows, tl.trans(rows), plan)
    return gram


@triton.jit
def second_walk(
    before, after, scratch, head, xk, delta, right, inverse, earlier, step_in, step_out, momentum_step, factors,
    plan: tl.constexpr,
):  # fmt: skip
    """Errors and update of a memory with a hidden layer, one block of it at a time, the hidden layer in rows."""
    delta_rule: tl.constexpr = plan.rule == "dgd"
    o_c = tl.arange(0, plan.block_chunk)
    o_d = tl.arange(0, plan.block_dim)
    m_d = o_d < plan.dim

    p_delta = scratch_tile(scratch.errors, o_c[:, None], o_d[None, :], plan.block_dim)
    tl.store(p_delta, delta)
    if delta_rule:
        tl.store(p_delta + plan.block_chunk * plan.block_dim, right)
        tl.store(scratch_tile(scratch.inverse, o_c[:, None], o_c[None, :], plan.block_chunk), inverse)
    tl.debug_barrier()

    delta_t = tl.load(scratch_tile(scratch.errors, o_c[None, :], o_d[:, None], plan.block_dim))
    inverse_t = inverse
    if delta_rule:
        inverse_t = tl.load(scratch_tile(scratch.inverse, o_c[None, :], o_c[:, None], plan.block_chunk))
    for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
        h = opaque(h, before.row, plan.block_hidden)
        o_h = h + tl.arange(0, plan.block_hidden)
        mask = (o_h < plan.hidden)[:, None] & m_d[None, :]
        p_in = matrix_pointers(before.weights[0], before.row, head, o_d[None, :], o_h[:, None])
        p_out = matrix_pointers(before.weights[plan.weights - 1], before.row, head, o_h[:, None], o_d[None, :])
        w_in = tl.load(p_in, mask=mask, other=0.0)  # [BH, BD]
        w_out = tl.load(p_out, mask=mask, other=0.0)  # [BH, BD]
        z = product(w_in, tl.trans(xk), plan)  # [BH, BC]
        gate, slope = activate_with_slope(z, plan)
        error = product(w_out, delta_t, plan)  # [BH, BC]
        hidden = gate
        if plan.form == "glu":
            p_up = matrix_pointers(before.weights[1], before.row, head, o_d[None, :], o_h[:, None])
            w_up = tl.load(p_up, mask=mask, other=0.0)
            up = product(w_up, tl.trans(xk), plan)
            hidden = gate * up
            error_up = error * gate
            error = error * up * slope
            if delta_rule:
                error_up = product(error_up + up * earlier[None, :], inverse_t, plan)
            write_tile(
                before, after, 1, head, o_d[None, :], o_h[:, None], mask, w_up, error_up, xk,
                (step_in, momentum_step), factors, plan,
            )  # fmt: skip
        else:
            error = error * slope
        if delta_rule:
            error = product(error + z * earlier[None, :], inverse_t, plan)
        write_tile(
            before, after, 0, head, o_d[None, :], o_h[:, None], mask, w_in, error, xk,
            (step_in, momentum_step), factors, plan,
        )  # fmt: skip
        write_tile(
            before, after, plan.weights - 1, head, o_h[:, None], o_d[None, :], mask, w_out, hidden, right,
            (step_out, momentum_step), factors, plan,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def forward_chunk(problem, output, before, after, scratch, place, chunk, reads: tl.constexpr, plan: tl.constexpr):
    """One complete chunk: its outputs (``reads``), and the state ``after`` it from the one ``before`` it.

    ``after`` may be ``before``. Ends with a barrier: the next read sees the new state.
    """
    queries: tl.constexpr = reads and not plan.shared_read
    delta_rule: tl.constexpr = plan.rule == "dgd"
    keys_out: tl.constexpr = plan.needs_prediction or delta_rule or (reads and plan.shared_read)
    head = place.head
    o_c = tl.arange(0, plan.block_chunk)
    o_d = tl.arange(0, plan.block_dim)
    m_c, m_d = o_c < plan.chunk, o_d < plan.dim
    j = chunk * plan.chunk + o_c
    m_new = m_c & (j >= place.pending)

    xk = load_tokens(problem.k, problem.pending_k, place, j, m_c, o_d, m_d)
    xv = load_tokens(problem.v, problem.pending_v, place, j, m_c, o_d, m_d)
    xq = xk
    if queries:
        xq = load_tokens(problem.q, None, place, j, m_new, o_d, m_d)

    # First walk: outputs. [BC, BD]
    b_k = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    b_q = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    b_v = tl.full([plan.block_chunk, plan.block_dim], 0.0, tl.float32)
    square = tl.full([plan.block_chunk], 0.0, tl.float32)  # |h|^2 (dgd)
    if plan.form == "linear":
        weight = load_linear(before, head, plan)
        b_k = product(xk, weight, plan)
        if queries:
            b_q = product(xq, weight, plan)
        if plan.objective == "self":
            b_v = product(xv, weight, plan)
    else:
        for h in tl.range(0, plan.hidden, plan.block_hidden, num_stages=1, disable_licm=True):
            h = opaque(h, before.row, plan.block_hidden)
            w_in, w_up, w_out = load_layers(before, head, h, plan)
            if keys_out:
                hidden = hidden_values(xk, w_in, w_up, plan)
                b_k += product(hidden, w_out, plan)
                if delta_rule:
                    square += tl.sum(hidden * hidden, 1)
                    o_h = h + tl.arange(0, plan.block_hidden)
                    p_hidden = scratch_tile(scratch.hidden, o_c[:, None], o_h[None, :], plan.hidden)
                    tl.store(p_hidden, hidden.to(plan.operand), mask=(o_h < plan.hidden)[None, :])
            if queries:
                b_q += product(hidden_values(xq, w_in, w_up, plan), w_out, plan)
            if plan.objective == "self":
                b_v += product(hidden_values(xv, w_in, w_up, plan), w_out, plan)
    prediction = b_k
    if plan.residual:
        prediction += xk.to(tl.float32)
        b_q += xq.to(tl.float32)
        b_v += xv.to(tl.float32)
    if queries:
        store_tokens(output, None, place, j, m_new, o_d, m_d, b_q)
    if reads and plan.shared_read:
        store_tokens(output, None, place, j, m_new, o_d, m_d, prediction)
    delta = form_delta(prediction, xv, b_v, plan)

    # Steps and factors of the write; with dgd, corrected errors.
    step = load_gate(problem.coefficients.step, place, chunk, 0.0, plan)
    momentum_step = step
    if problem.coefficients.momentum_step is not None:
        momentum_step = load_gate(problem.coefficients.momentum_step, place, chunk, 0.0, plan)
    decay = load_factor(problem.coefficients.decay, place, chunk, 1.0, plan)
    carry = load_factor(problem.coefficients.momentum_carry, place, chunk, 0.0, plan)
    momentum_decay = load_factor(problem.coefficients.momentum_decay, place, chunk, 0.0, plan)
    step_in = step
    step_out = step
    earlier = step
    inverse = tl.full([plan.block_chunk, plan.block_chunk], 0.0, tl.float32)
    right = delta  # errors that W_out (linear: W) is written with
    if delta_rule:
        row = (place.chunk_row + chunk) * plan.heads + head
        earlier, later, between, decay = load_products(problem.coefficients.retention, row, plan)
        keys = xk.to(tl.float32)
        proximal = effective_step(step, tl.sum(keys * keys, 1))
        inverse = overlap_inverse(product(xk, tl.trans(xk), plan), proximal, between, plan)
        step_in = proximal * later
        if plan.form == "linear":
            right = product(inverse, delta + earlier[:, None] * b_k, plan)
        else:
            tl.debug_barrier()
            proximal = effective_step(step, square)
            step_out = proximal * later
            own = overlap_inverse(hidden_overlaps(scratch, before.row, plan), proximal, between, plan)
            right = product(own, delta + earlier[:, None] * b_k, plan)
    factors = (decay, carry, momentum_decay)

    if plan.form == "linear":
        tl.debug_barrier()
        mask = m_d[:, None] & m_d[None, :]
        weight = load_linear(before, head, plan)
        keys_first = tl.trans(xk).to(tl.float32)
        write_tile(
            before, after, 0, head, o_d[:, None], o_d[None, :], mask, weight, keys_first, right,
            (step_in, momentum_step), factors, plan,
        )  # fmt: skip
        tl.debug_barrier()
    else:
        second_walk(
            before, after, scratch, head, xk, delta, right, inverse, earlier, step_in, step_out, momentum_step, factors,
            plan,
        )  # fmt: skip


# ---- one sequence and head -------------------------------------------------------------------------------------------


@triton.jit
def copy_weight(to, to_row, source, source_row, head, i: tl.constexpr, plan: tl.constexpr):
    """Copies weight ``i`` of one head or its momentum, or clears it where ``source`` is None."""
    if source is not None:
        copy_matrix(to, to_row, source, source_row, head, inner_size(plan, i), outer_size(plan, i), False)
    else:
        copy_matrix(to, to_row, to, to_row, head, inner_size(plan, i), outer_size(plan, i), True)


@triton.jit
def copy_state(to, source, head, plan: tl.constexpr):
    """Weights and momentum of one head; momentum that ``source`` lacks is 0."""
    for i in tl.static_range(len(to.weights)):
        copy_weight(to.weights[i], to.row, source.weights[i], source.row, head, i, plan)
        if len(to.momentum) > 0:
            if len(source.momentum) > 0:
                copy_weight(to.momentum[i], to.row, source.momentum[i], source.row, head, i, plan)
            else:
                copy_weight(to.momentum[i], to.row, None, 0, head, i, plan)


@triton.jit
def forward_task(problem, sizes, output, state, checkpoints, scratch, s, n, plan: tl.constexpr):
    """The whole scan of sequence ``s`` and head ``n``. ``state`` and ``checkpoints`` are contiguous (weights,
    momentum)."""
    place = find_place(problem, sizes, s, n, plan)
    current = contiguous_state(state, place.sequence, plan)
    copy_state(current, State(problem.weights, problem.momentum, place.sequence), place.head, plan)
    tl.debug_barrier()
    for chunk in tl.range(0, place.chunks, num_stages=1, disable_licm=True):
        if checkpoints is not None:
            if (chunk > 0) & (chunk % size(sizes.interval) == 0):
                save_checkpoint(checkpoints, current, place, sizes, chunk, plan)
        forward_chunk(problem, output, current, current, scratch, place, chunk, problem.q is not None, plan)
    if checkpoints is not None:
        if (place.chunks > 0) & (place.chunks % size(sizes.interval) == 0):
            save_checkpoint(checkpoints, current, place, sizes, place.chunks, plan)
    if problem.q is not None:
        read_tail(problem, output, current, place, plan)


@triton.jit
def save_checkpoint(checkpoints, current, place, sizes, chunk, plan: tl.constexpr):
    """The state at the start of chunk ``jK`` goes to row ``chunk_row // K + j - 1``."""
    row = place.chunk_row // size(sizes.interval) + chunk // size(sizes.interval) - 1
    copy_state(contiguous_state(checkpoints, row, plan), current, place.head, plan)


@triton.jit
def forward_program(problem, sizes, output, state, checkpoints, scratch, program, plan: tl.constexpr):
    """Program ``program`` of one scan, if it has that many. Returns how many it has."""
    count = size(sizes.sequences) * plan.heads
    if (program >= 0) & (program < count):
        row = program.to(tl.int64) * plan.block_chunk
        own = Scratch(
            scratch.errors + row * 2 * plan.block_dim,
            None if scratch.inverse is None else scratch.inverse + row * plan.block_chunk,
            None if scratch.hidden is None else scratch.hidden + row * plan.hidden,
        )
        s, n = program // plan.heads, program % plan.heads
        forward_task(problem, sizes, output, state, checkpoints, own, s, n, plan)
    return count


@triton.jit
def forward_kernel(problems, sizes, outputs, states, checkpoints, scratches, plans: tl.constexpr):
    """One or several scans that do not depend on each other; each argument has an entry per scan.

    Grid ``(sum of S * heads,)``: the programs of the first scan, then those of the second, ..
    """
    program = tl.program_id(0)
    for i in tl.static_range(len(plans)):
        program -= forward_program(
            problems[i], sizes[i], outputs[i], states[i], checkpoints[i], scratches[i], program, item(plans, i)
        )


@triton.jit(noinline=True)
def forward_level(problem, sizes, output, state, checkpoints, scratch, program, plan):
    """:func:`forward_program`, to be called: compiled once for all scans whose plans are equal.

    Were the bodies of all scans in one function, a pass of Triton's would take time that grows with the square of their
    number.
    """
    forward_program(problem, sizes, output, state, checkpoints, scratch, program, plan)


@triton.jit
def forward_levels_kernel(problems, sizes, outputs, states, checkpoints, scratches, chunks, plans: tl.constexpr):
    """:func:`forward_kernel` for several scans. ``chunks``: their chunk sizes, encoded; 0 in the plans that leave them
    open."""
    program = tl.program_id(0)
    for i in tl.static_range(len(plans)):
        arguments = (problems[i], sizes[i], outputs[i], states[i], checkpoints[i], scratches[i])
        count = size(sizes[i].sequences) * item(plans, i).heads
        if (program >= 0) & (program < count):
            call_level(forward_level, arguments, program, chunks, plans, i)
        program -= count


@triton.jit
def read_task(problem, sizes, output, block, s, n, plan: tl.constexpr):
    """Outputs of one block of tokens of a sequence and head, where nothing is written."""
    place = find_place(problem, sizes, s, n, plan)
    o_d = tl.arange(0, plan.block_dim)
    m_d = o_d < plan.dim
    j = place.pending + block.to(tl.int64) * plan.block_chunk + tl.arange(0, plan.block_chunk)
    m_j = j < place.pending + place.length
    xq = load_tokens(problem.q, None, place, j, m_j, o_d, m_d)
    state = State(problem.weights, (), place.sequence)
    store_tokens(output, None, place, j, m_j, o_d, m_d, read_rows(xq, state, place.head, plan))


@triton.jit
def read_program(problem, sizes, output, program, plan: tl.constexpr):
    """As :func:`forward_program`, for reads."""
    count = size(sizes.sequences) * plan.heads
    block = tl.program_id(0)
    if (program >= 0) & (program < count) & (block * plan.block_chunk < size(sizes.tokens)):
        read_task(problem, sizes, output, block, program // plan.heads, program % plan.heads, plan)
    return count


@triton.jit
def read_kernel(problems, sizes, outputs, plans: tl.constexpr):
    """Reads without writes, as :func:`forward_kernel`. Grid ``(most blocks of tokens, sum of S * heads)``."""
    program = tl.program_id(1)
    for i in tl.static_range(len(plans)):
        program -= read_program(problems[i], sizes[i], outputs[i], program, item(plans, i))
