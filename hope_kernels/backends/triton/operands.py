"""What the kernels are handed, and how they find one sequence and head, its tokens and its weights in it.

Views are tuples of a pointer and element strides, absent tensors are None: a kernel is compiled for what is there.
Token ``j`` of a sequence counts its pending tokens first. All offsets are formed in 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


class TokenView(NamedTuple):
    """``[rows, tokens, heads, D]``; the last dimension is contiguous."""

    data: Any
    row: Any
    token: Any
    head: Any


class MatrixView(NamedTuple):
    """``[sequences, heads, in, out]``; ``sequence`` is 0 where all sequences share one matrix."""

    data: Any
    sequence: Any
    head: Any
    inner: Any
    outer: Any


class Coefficients(NamedTuple):
    """Pointers to contiguous ``[M, heads, C]`` (step, retention, momentum_step) and ``[M, heads]`` (the others)."""

    step: Any
    retention: Any
    decay: Any
    momentum_step: Any
    momentum_carry: Any
    momentum_decay: Any


class Problem(NamedTuple):
    """A scan, as :class:`hope_kernels.backends.interface.ScanProblem` describes it."""

    q: Any
    k: Any
    v: Any
    pending_k: Any
    pending_v: Any
    coefficients: Any
    weights: Any  # one MatrixView per weight: the initial weights
    momentum: Any  # likewise, or () for zeros
    sequences: Any  # int64 [S, 6] or None


class State(NamedTuple):
    """Weights and momentum at one row (sequence, checkpoint or slot) of the tensors that hold them."""

    weights: Any  # one MatrixView per weight
    momentum: Any  # likewise, or ()
    row: Any


class Sizes(NamedTuple):
    """What changes from call to call and is not worth a compilation.

    Triton compiles anew for an integer in a tuple that is 1, or divisible by 16, whatever a kernel asks for. So each is
    handed over as the odd number that :func:`encoded` makes of it, and read through :func:`size`.
    """

    sequences: Any  # S
    tokens: Any  # T
    pending: Any  # P
    chunks: Any
    first_chunk: Any
    interval: Any  # K, chunks between two checkpoints
    bptt_chunks: Any
    rows: Any  # B


def encoded(number: int) -> int:
    """``number`` as a kernel gets it: neither 1 nor divisible by 16."""
    return 2 * number + 3


@triton.jit
def size(number):
    """A field of :class:`Sizes` as it was before :func:`encoded`."""
    return (number - 3) >> 1


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for: the memory, its sizes and the blocks it is walked in.

    ``block_chunk`` and ``block_dim`` are powers of two that hold a whole chunk and a whole token, at least 16 (what a
    tensor core's tile needs); rows and columns beyond C and D are masked.
    """

    form: str
    activation: str
    objective: str
    rule: str
    residual: bool
    heads: int
    chunk: int
    dim: int
    hidden: int
    block_chunk: int
    block_dim: int
    block_hidden: int
    operand: tl.dtype  # of the factors of every product: the dtype of the tokens
    precision: str  # of float32 products: "ieee" or "tf32"
    fast_activation: bool  # the hardware's approximate tanh
    shared_read: bool  # the queries are the keys

    @property
    def inputs(self) -> int:
        """Layers that read the token itself."""
        return 2 if self.form == "glu" else 1

    @property
    def weights(self) -> int:
        return {"linear": 1, "mlp": 2, "glu": 3}[self.form]

    @property
    def needs_prediction(self) -> bool:
        """Whether the error is formed from the memory's output at the keys."""
        return self.objective in ("l2", "self")


class LevelPlan(NamedTuple):
    """A :class:`Plan` and its properties with the chunk size left open: what is compiled for it serves every chunk that
    the block holds."""

    form: Any
    activation: Any
    objective: Any
    rule: Any
    residual: Any
    heads: Any
    chunk: Any  # a run-time value
    dim: Any
    hidden: Any
    block_chunk: Any
    block_dim: Any
    block_hidden: Any
    operand: Any
    precision: Any
    fast_activation: Any
    shared_read: Any
    inputs: Any
    weights: Any
    needs_prediction: Any


@triton.constexpr_function
def item(plans, i):
    """One of a tuple of plans (plain indexing yields no constexpr in older Tritons)."""
    return plans[i]


@triton.jit
def call_level(function, arguments, program, chunks, plans: tl.constexpr, i: tl.constexpr):
    """``function(*arguments, program, plan)`` with plan ``i``. If its chunk is 0, its chunk size is that of ``chunks``,
    which are :func:`encoded`."""
    plan: tl.constexpr = item(plans, i)
    if plan.chunk > 0:
        function(*arguments, program, plan)
    else:
        # In place: a tuple that is given a name has tensors for its constants.
        function(
            *arguments,
            program,
            LevelPlan(
                plan.form,
                plan.activation,
                plan.objective,
                plan.rule,
                plan.residual,
                plan.heads,
                size(chunks[i]),
                plan.dim,
                plan.hidden,
                plan.block_chunk,
                plan.block_dim,
                plan.block_hidden,
                plan.operand,
                plan.precision,
                plan.fast_activation,
                plan.shared_read,
                plan.inputs,
                plan.weights,
                plan.needs_prediction,
            ),
        )


@triton.constexpr_function
def inner_size(plan, i):
    """Rows of weight ``i``: the features or hidden units it is applied to."""
    return plan.dim if i < plan.inputs else plan.hidden


@triton.constexpr_function
def outer_size(plan, i):
    """Columns of weight ``i``."""
    return plan.dim if i == plan.weights - 1 else plan.hidden


class Place(NamedTuple):
    """Where the tokens and chunks of one sequence and head lie (see ``ScanProblem.sequences``)."""

    sequence: Any
    head: Any
    row: Any
    start: Any
    length: Any
    pending: Any
    chunk_row: Any
    chunk_index: Any
    chunks: Any


@triton.jit
def find_place(problem, sizes, s, n, plan: tl.constexpr):
    """The place of sequence ``s`` and head ``n``. Values of a table are kept inside the tensors whatever they are."""
    s = s.to(tl.int64)
    n = n.to(tl.int64)
    tokens = size(sizes.tokens).to(tl.int64)
    row = s
    start = tokens * 0
    length = tokens
    pending = size(sizes.pending).to(tl.int64)
    chunks = size(sizes.chunks).to(tl.int64)
    chunk_row = s * chunks
    chunk_index = size(sizes.first_chunk).to(tl.int64)
    if problem.sequences is not None:
        table = problem.sequences + s * 6
        row = tl.minimum(tl.maximum(tl.load(table), 0), size(sizes.rows) - 1)
        start = tl.minimum(tl.maximum(tl.load(table + 1), 0), tokens)
        length = tl.minimum(tl.maximum(tl.load(table + 2), 0), tokens - start)
        pending = tl.minimum(tl.maximum(tl.load(table + 3), 0), pending)
        chunk_row = tl.minimum(tl.maximum(tl.load(table + 4), 0), chunks)
        chunk_index = tl.load(table + 5)
        chunks = tl.minimum((pending + length) // plan.chunk, chunks - chunk_row)
    return Place(s, n, row, start, length, pending, chunk_row, chunk_index, chunks)


@triton.jit
def load_tokens(view, pending_view, place, j, m_j, o_d, m_d):
    """Tokens ``j [R]`` of the sequence, ``[R, BD]`` in their own dtype; zeros where a mask is false."""
    fresh = j - place.pending
    p_new = view.data + place.row * view.row + place.head * view.head
    x = tl.load(
        p_new + (place.start + fresh)[:, None] * view.token + o_d[None, :],
        mask=(m_j & (fresh >= 0))[:, None] & m_d[None, :],
        other=0.0,
    )
    if pending_view is not None:
        p_old = pending_view.data + place.sequence * pending_view.row + place.head * pending_view.head
        old = tl.load(
            p_old + j[:, None] * pending_view.token + o_d[None, :],
            mask=(m_j & (fresh < 0))[:, None] & m_d[None, :],
            other=0.0,
        )
        x = tl.where((fresh >= 0)[:, None], x, old)
    return x


@triton.jit
def store_tokens(view, pending_view, place, j, m_j, o_d, m_d, x):
    """The opposite of :func:`load_tokens`; either view may be None for what is not wanted."""
    fresh = j - place.pending
    if view is not None:
        p_new = view.data + place.row * view.row + place.head * view.head
        tl.store(
            p_new + (place.start + fresh)[:, None] * view.token + o_d[None, :],
            x.to(view.data.dtype.element_ty),
            mask=(m_j & (fresh >= 0))[:, None] & m_d[None, :],
        )
    if pending_view is not None:
        p_old = pending_view.data + place.sequence * pending_view.row + place.head * pending_view.head
        tl.store(
            p_old + j[:, None] * pending_view.token + o_d[None, :],
            x.to(pending_view.data.dtype.element_ty),
            mask=(m_j & (fresh < 0))[:, None] & m_d[None, :],
        )


@triton.jit
def contiguous_view(data, i: tl.constexpr, plan: tl.constexpr):
    """View of a contiguous tensor ``[rows, heads, in, out]`` of weight ``i``.

    Strides known to the compiler become offsets inside instructions; as run-time values they would fill registers.
    """
    inner: tl.constexpr = inner_size(plan, i)
    outer: tl.constexpr = outer_size(plan, i)
    return MatrixView(data, plan.heads * inner * outer, inner * outer, outer, 1)


@triton.jit
def contiguous_views(tensors, plan: tl.constexpr):
    """Views of one contiguous tensor per weight, or ``()`` of none."""
    if len(tensors) == 0:
        return ()
    elif len(tensors) == 1:
        return (contiguous_view(tensors[0], 0, plan),)
    elif len(tensors) == 2:
        return contiguous_view(tensors[0], 0, plan), contiguous_view(tensors[1], 1, plan)
    else:
        return (
            contiguous_view(tensors[0], 0, plan),
            contiguous_view(tensors[1], 1, plan),
            contiguous_view(tensors[2], 2, plan),
        )


@triton.jit
def contiguous_state(tensors, row, plan: tl.constexpr):
    """The state in ``row`` of the tensors (weights, momentum)."""
    return State(contiguous_views(tensors[0], plan), contiguous_views(tensors[1], plan), row)


@triton.jit
def matrix_pointers(view, row, head, o_in, o_out):
    """Pointers to a tile of the matrix of sequence (or checkpoint, or slot) ``row``.

    ``o_in`` and ``o_out`` come as ``[:, None]`` and ``[None, :]`` in either order: the tile is transposed by
    exchanging them.
    """
    return view.data + row * view.sequence + head * view.head + o_in * view.inner + o_out * view.outer


@triton.jit
def product(a, b, plan: tl.constexpr):
    """``a @ b``, factors rounded to the dtype of the tokens, summed in float32."""
    return tl.dot(a.to(plan.operand), b.to(plan.operand), input_precision=plan.precision, out_dtype=tl.float32)


@triton.jit
def opaque(start, row, step: tl.constexpr):
    """``start``, a multiple of ``step``, of which a compiler does not see that a loop runs through it.

    It would turn every address of the loop's body into a variable of its own that the loop increments, and start those
    variables outside of all loops: more registers than there are. ``row`` (int64) is any row of a tensor: its
    highest bits are 0 in fact, but nothing says so.
    """
    return tl.multiple_of(start ^ (row >> 62).to(tl.int32), step)


@triton.jit
def contiguous_tokens(data, tokens, place, plan: tl.constexpr):
    """View of a contiguous tensor ``[rows, tokens, heads, D]`` for use at ``place``."""
    row = opaque(tokens.to(tl.int64), place.sequence, 1) * (plan.heads * plan.dim)
    return TokenView(data, row, plan.heads * plan.dim, plan.dim)


@triton.jit
def copy_matrix(to, to_row, source, source_row, head, inner: tl.constexpr, outer: tl.constexpr, zero: tl.constexpr):
    """Copies one float32 matrix ``[in, out]`` in tiles, or clears it (``zero``, ``source`` is then not used)."""
    BLOCK_IN: tl.constexpr = 16
    BLOCK_OUT: tl.constexpr = 64
    columns: tl.constexpr = triton.cdiv(outer, BLOCK_OUT)
    for tile in tl.range(triton.cdiv(inner, BLOCK_IN) * columns, num_stages=1, disable_licm=True):
        tile = opaque(tile, to_row, 1)
        o_in = (tile // columns * BLOCK_IN + tl.arange(0, BLOCK_IN))[:, None]
        o_out = (tile % columns * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[None, :]
        mask = (o_in < inner) & (o_out < outer)
        if zero:
            x = tl.zeros([BLOCK_IN, BLOCK_OUT], tl.float32)
        else:
            x = tl.load(matrix_pointers(source, source_row, head, o_in, o_out), mask=mask, other=0.0)
        tl.store(matrix_pointers(to, to_row, head, o_in, o_out), x.to(to.data.dtype.element_ty), mask=mask)
