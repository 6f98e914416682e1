"""What the kernels of the tiled scan are made of: a program finds its tile of work, multiplies, loads and stores.

The rows of a chunk are stacked in sections of C rows: keys, values (objective ``self``), queries. Rows of a section
without a token are 0, sections without any are left out: every kernel asks :func:`section_is_active`.

Scratch matrices are ``[sequences, heads, rows, columns]``, scratch vectors ``[tasks, ..]``, a task being one sequence
and head. Sums that several programs contribute to are kept apart there and added up later, in fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from hope_kernels.backends.triton.operands import matrix_pointers


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
    return tl.full([tile.rows, tile.columns], 0.0, tl.float32)


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


# ---- partial sums ----


@triton.jit
def store_vector(pointer, place, o_t, m_t, x, plan: tl.constexpr):
    """Rows ``o_t`` of a scratch ``[tasks, C]``."""
    tl.store(pointer + (place.sequence * plan.heads + place.head) * plan.chunk + o_t, x, mask=m_t)


@triton.jit
def store_partial(pointer, place, index, count: tl.constexpr, o_t, m_t, x, plan: tl.constexpr):
    """Row ``index`` of ``count`` in a scratch ``[tasks, count, C]`` of sums that :func:`sum_partials` adds up."""
    task = place.sequence * plan.heads + place.head
    tl.store(pointer + (task * count + index) * plan.chunk + o_t, x, mask=m_t)


@triton.jit
def sum_partials(pointer, place, count: tl.constexpr, o_t, m_t, width: tl.constexpr, plan: tl.constexpr):
    """Sum over the rows of a scratch ``[tasks, count, C]``, in order: ``[width]``."""
    rows = pointer + (place.sequence * plan.heads + place.head) * count * plan.chunk
    total = tl.zeros([width], tl.float32)
    for i in tl.range(count):
        total += tl.load(rows + i * plan.chunk + o_t, mask=m_t, other=0.0)
    return total


@triton.jit
def sum_scalars(pointer, task, count: tl.constexpr):
    """Sum of a task's ``count`` numbers in a scratch ``[tasks, count]``, in fixed order."""
    WIDTH: tl.constexpr = 1024
    o = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for i in tl.range(0, count, WIDTH):
        total += tl.load(pointer + task.to(tl.int64) * count + i + o, mask=i + o < count, other=0.0)
    return tl.sum(total, 0)
