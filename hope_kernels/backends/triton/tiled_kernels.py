"""Forward of a tiled scan: each chunk is a few launches, every one a matrix product over all sequences and heads.

A program makes one tile of one product and finishes it in registers (activation, error, weighting by step, decay and
accumulation into the state), so that each intermediate is written once. FLOPs per token, mlp with objective l2: the
convention's 14 D H. The float32 state is read and written once per chunk; what the products read of it in 16 bits is a
copy that the same write leaves.

The rows of a chunk are stacked in sections of C rows: keys, values (objective ``self``), queries. Rows of a section
without a token are 0, sections without any are left out: every kernel asks :func:`section_is_active`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from hope_kernels.backends.triton.activation import activate, activate_with_curve, activate_with_slope
from hope_kernels.backends.triton.operands import find_place, load_tokens, matrix_pointers, store_tokens
from hope_kernels.backends.triton.resident_forward import form_delta, load_factor


@dataclass(frozen=True)
class Tile:
    """How a product is cut: a program makes ``rows x columns`` of it, ``inner`` terms at a time."""

    rows: int
    columns: int
    inner: int
    group: int  # row blocks that go through all column blocks together: they find their operands in the L2 cache
    warps: int
    stages: int
    even: bool  # C, D and H are multiples of rows, columns and inner: products need no masks


@dataclass(frozen=True)
class Sections:
    """Which sections a chunk's stack of rows has, as 0 or 1, in their order."""

    keys: int
    values: int
    queries: int
    shared: bool = False  # the queries are the keys: the keys' outputs are what was read

    @property
    def count(self) -> int:
        return self.keys + self.values + self.queries

    @property
    def written(self) -> int:
        """Sections that belong to the write; the queries follow them."""
        return self.keys + self.values


# ---- finding work ----------------------------------------------------------------------------------------------------


@triton.jit
def locate(row_blocks: tl.constexpr, column_blocks: tl.constexpr, tile: tl.constexpr):
    """This program's task (sequence and head), row block and column block."""
    program = tl.program_id(0)
    tiles: tl.constexpr = row_blocks * column_blocks
    task = program // tiles
    i = program % tiles
    per_group: tl.constexpr = tile.group * column_blocks
    first = i // per_group * tile.group
    rows = tl.minimum(row_blocks - first, tile.group)
    return task, first + i % per_group % rows, i % per_group // rows


@triton.jit
def span(index, width: tl.constexpr):
    """Indices of block ``index``, 64 bits."""
    return (tl.zeros([], tl.int64) + index) * width + tl.arange(0, width)


@triton.jit
def is_writing(place, chunk):
    return chunk < place.chunks


@triton.jit
def is_reading(place, chunk, plan: tl.constexpr):
    """Whether any new token lies in the chunk."""
    begin = chunk.to(tl.int64) * plan.chunk
    return (begin < place.pending + place.length) & (begin + plan.chunk > place.pending)


@triton.jit
def section_is_active(place, chunk, section, sections: tl.constexpr, plan: tl.constexpr):
    """Whether the rows of a section are there (in stack order)."""
    reading = is_reading(place, chunk, plan)
    active = tl.where(section >= sections.written, reading, is_writing(place, chunk))
    if sections.shared:
        active = active | ((section == 0) & reading)
    return active


@triton.jit
def section_rows(place, chunk, section, o_t, sections: tl.constexpr, plan: tl.constexpr):
    """Token numbers ``j`` of rows ``o_t`` of a section, and which of them are there."""
    j = chunk.to(tl.int64) * plan.chunk + o_t
    first = tl.where(section < sections.written, 0, place.pending)
    return j, (o_t < plan.chunk) & (j >= first) & (j < place.pending + place.length)


@triton.jit
def only_rows(condition, o_t, plan: tl.constexpr):
    """Mask of a chunk's rows, all or (where ``condition`` is false) none."""
    return o_t < tl.where(condition, plan.chunk, 0)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def zeros(tile: tl.constexpr):
    return tl.zeros([tile.rows, tile.columns], tl.float32)


@triton.jit
def contract(acc, a, b, place, o_m, m_m, o_n, m_n, start, stop, tile: tl.constexpr, plan: tl.constexpr):
    """``acc + A[o_m, start:stop] B[start:stop, o_n]``, summed in float32, in order."""
    o_k = start + tl.arange(0, tile.inner)
    o_k64 = o_k.to(tl.int64)
    p_a = matrix_pointers(a, place.sequence, place.head, o_m[:, None], o_k64[None, :])
    p_b = matrix_pointers(b, place.sequence, place.head, o_k64[:, None], o_n[None, :])
    step_a = tl.full([], tile.inner, tl.int64) * a.outer
    step_b = tl.full([], tile.inner, tl.int64) * b.inner
    for k in tl.range(start, stop, tile.inner):
        if tile.even:
            x = tl.load(p_a)
            y = tl.load(p_b)
        else:
            m_k = o_k < stop - (k - start)
            x = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
            y = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=plan.precision, out_dtype=tl.float32)
        p_a += step_a
        p_b += step_b
    return acc


@triton.jit
def load_tile(view, place, o_m, m_m, o_n, m_n):
    """A tile in float32, 0 outside."""
    pointers = matrix_pointers(view, place.sequence, place.head, o_m[:, None], o_n[None, :])
    return tl.load(pointers, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(view, place, o_m, m_m, o_n, m_n, x):
    """The opposite; nothing where the view is None."""
    if view is not None:
        pointers = matrix_pointers(view, place.sequence, place.head, o_m[:, None], o_n[None, :])
        tl.store(pointers, x.to(view.data.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def load_steps(pointer, place, chunk, o_t, m_t, plan: tl.constexpr):
    """A per-token coefficient ``[M, heads, C]`` of the chunk; 0 outside."""
    row = (place.chunk_row + chunk) * plan.heads + place.head
    return tl.load(pointer + row * plan.chunk + o_t, mask=m_t, other=0.0)


@triton.jit
def load_vector(pointer, place, o_t, m_t, plan: tl.constexpr):
    """Rows ``o_t`` of a scratch ``[tasks, C]``; 0 outside."""
    return tl.load(pointer + (place.sequence * plan.heads + place.head) * plan.chunk + o_t, mask=m_t, other=0.0)


# ---- a chunk, in the order of its launches ---------------------------------------------------------------------------


@triton.jit(do_not_specialize=["sizes", "chunk"])
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


@triton.jit(do_not_specialize=["sizes", "chunk"])
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


@triton.jit(do_not_specialize=["sizes", "chunk"])
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
    acc = contract(zeros(tile), u, weight, place, rows, m_t, o_d, m_d, 0, terms, tile, plan)
    b_product = acc
    if plan.residual:
        acc += load_tile(x, place, rows, m_t, o_d, m_d)
    j, m_j = section_rows(place, chunk, section, o_t, sections, plan)
    if output is not None:
        if is_query | sections.shared:
            store_tokens(output, None, place, j, m_j, o_d, m_d, acc)
    if writes:
        if (not is_query) & is_writing(place, chunk):
            b_target = acc
            b_v = load_tokens(problem.v, problem.pending_v, place, j, m_j, o_d, m_d)
            if plan.objective == "self":
                b_target = contract(
                    zeros(tile), u, weight, place, plan.chunk + o_t, m_t, o_d, m_d, 0, WIDTH, tile, plan
                )
                if plan.residual:
                    b_target += b_v.to(tl.float32)
            b_delta = form_delta(acc, b_v, b_target, plan)
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


@triton.jit(do_not_specialize=["sizes", "chunk"])
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


@triton.jit(do_not_specialize=["sizes", "chunk"])
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


@triton.jit(do_not_specialize=["sizes", "chunk"])
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
    row = place.chunk_row // sizes.interval + chunk // sizes.interval - 1
    pointers = matrix_pointers(checkpoint, row, place.head, o_in[:, None], o_out[None, :])
    mask = m_in[:, None] & m_out[None, :]
    if save:
        tl.store(pointers, load_tile(state, place, o_in, m_in, o_out, m_out), mask=mask)
    else:
        new = tl.load(pointers, mask=mask, other=0.0)
        store_tile(state, place, o_in, m_in, o_out, m_out, new)
        store_tile(copy, place, o_in, m_in, o_out, m_out, new)
