"""The public functions: ``memory_scan``, ``memory_read``, ``memory_write``.

Each checks its arguments, lays the tokens out in chunks, turns the gates into the scalars of the closed chunk
form, and hands one operator-level problem to the reference or to a compiled backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_kernels import backends
from hope_kernels.backends.interface import ScanProblem, ScanRequest
from hope_kernels.memory import factored, joint_ops, ops, pending, plain, plan, reference
from hope_kernels.memory import validation as check
from hope_kernels.memory.coefficients import Coefficients, chunk_coefficients
from hope_kernels.memory.layout import TableLayout, UniformLayout, make_layout
from hope_kernels.memory.spec import MemorySpec
from hope_kernels.memory.state import MemoryState, Weights

Memory = Sequence[Tensor] | MemoryState


class MemoryOutput(NamedTuple):
    """What ``memory_scan`` returns: ``output [B, T, N, D]`` in the dtype of ``q``, and the new state."""

    output: Tensor
    state: MemoryState


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    memory: Memory,
    *,
    spec: MemorySpec,
    chunk_size: int,
    retention: Tensor | None = None,
    momentum: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    bptt_chunks: int | None = None,
    backend: str | None = None,
) -> MemoryOutput:
    """Read a memory with every token and write it once per chunk (equations 71 and 90).

    Token ``t`` lies in chunk ``c = t // C`` of its sequence, counted from the start of the stream. It reads
    ``y_t = f_{W_c}(q_t)``, the state at the start of its chunk; after the last token of a chunk the memory is
    written with the inner gradients of all its tokens, taken at ``W_c``. An unfinished last chunk writes nothing:
    its tokens stay pending in the returned state, so any split of a sequence into calls gives the same result.

    Fully differentiable, second-order terms included: with respect to ``q, k, v, lr, retention, momentum``, the
    initial weights and momentum and pending tokens, given gradients of the output and of everything in the
    returned state. A compiled backend keeps a chunk state every ``O(sqrt(chunks))`` chunks and rebuilds the rest
    in the backward; ``backend="reference"`` keeps them all.

    Args:
        q, k, v: queries, keys, values ``[B, T, N, D]`` (batch, tokens, heads, features), one dtype: float32,
            bfloat16, float16 or float64.
        lr: inner learning rate per token and head, ``[B, T, N]``, float32 (float64 with float64 tokens).
        memory: initial weights in the order of ``spec.weight_names``, each ``[N, in, out]`` (shared by all
            sequences) or ``[B, N, in, out]``, float32 or the dtype of ``q``, any strides; or the state returned by
            an earlier call.
        spec: what the memory is and how it is written.
        chunk_size: C, tokens per write.
        retention: ``alpha [B, T, N]`` in [0, 1], dtype of ``lr``; None for 1.
        momentum: ``beta [B, T, N]`` in [0, 1), dtype of ``lr``; rule ``gd`` only; None for none.
        cu_seqlens: ``[S + 1]`` int32 or int64, boundaries of S sequences packed into one row (B = 1). Weights and
            the state are then per sequence.
        valid: ``[B, 2]`` int32 or int64, first and one past the last real token of each row; tokens outside are
            neither read (their output is 0) nor written nor counted.
        bptt_chunks: detach the state written into chunk n, 2n, .. of the stream; None for full backpropagation.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``, obeyed or refused; None for the fastest. With
            ``":factored"`` behind it what is written is kept as pairs on shared initial weights, for as long as calls
            say so; a bare name merges such a state. None does either by a rule (:mod:`hope_kernels.memory.plan`): the
            factored plan for large memories in chunks of at least 128 tokens, never under ``torch.compile``. Over
            splits, and in library products over batch sizes, that plan is equal to rounding, not bit for bit.

    Returns:
        ``output [B, T, N, D]`` in the dtype of ``q`` and the new :class:`MemoryState`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it is and what is wanted.
        RuntimeError: the backend asked for cannot run this here; the message says why.
    """
    scan = _prepare(
        q,
        k,
        v,
        lr,
        memory,
        spec=spec,
        chunk_size=chunk_size,
        retention=retention,
        momentum=momentum,
        cu_seqlens=cu_seqlens,
        valid=valid,
        bptt_chunks=bptt_chunks,
        backend=backend,
    )
    return scan.run()


def scan_together(calls: Sequence[dict[str, Any]]) -> list[MemoryOutput]:
    """Several :func:`memory_scan` that do not depend on one another, in one launch where a backend can do that.

    Args:
        calls: the arguments of each, by name.

    Returns and raises what the calls one by one would; nothing runs before all of them are checked.
    """
    scans = [_prepare(**call) for call in calls]
    name = scans[0].backend if scans else "reference"
    if len(scans) > 1 and all(scan.backend == name for scan in scans) and backends.runs_together(name):
        results = joint_ops.scans([scan.problem for scan in scans], name)
        return [scan.finish(*result) for scan, result in zip(scans, results, strict=True)]
    return [scan.run() for scan in scans]


class _Prepared(NamedTuple):
    """A checked scan by the dense plan: the problem, the backend to run it on, whether that may be called directly, and
    what makes a result of what comes out."""

    problem: ScanProblem
    backend: str
    direct: bool
    finish: Callable[[Tensor, Weights, Weights], MemoryOutput]

    def run(self) -> MemoryOutput:
        return self.finish(*_run(self.problem, self.backend, self.direct))


class _PreparedCall(NamedTuple):
    """A checked scan that is not one problem: by the factored plan, at least to begin with, or one that only reads."""

    run: Callable[[], MemoryOutput]
    backend: str


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    memory: Memory,
    *,
    spec: MemorySpec,
    chunk_size: int,
    retention: Tensor | None = None,
    momentum: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    bptt_chunks: int | None = None,
    backend: str | None = None,
) -> _Prepared | _PreparedCall:
    reads_keys = q is k
    tokens = q, k, v, lr, retention, momentum = _under_autocast(q, k, v, lr, retention, momentum)
    call = None
    if cu_seqlens is None and valid is None:
        call = plain.signature("scan", spec, backend, memory, tokens, (chunk_size, bptt_chunks))
    if plain.passed(call):
        check.check_gate_values(spec, lr, retention, momentum)
        state = _unchecked_state(memory, spec, chunk_size, q)
        layout, name = make_layout(q, state, chunk_size, None, None), "cpu"
        if layout.chunks == 0 and _is_direct(call, name):

            def read_and_keep() -> MemoryOutput:
                output = backends.implementation(name).read(q, state.stored_weights, spec, chunk_size)
                after = _after(state, layout, chunk_size, k, v, lr, retention, momentum, known=True)
                return MemoryOutput(output, after)

            return _PreparedCall(read_and_keep, name)
    else:
        rows = _check_scan(*tokens, spec, chunk_size, cu_seqlens, valid, bptt_chunks)
        state = _state_of(memory, spec, chunk_size, q, rows)
        check.check_stream_gates(state, retention, momentum)
        layout = make_layout(q, state, chunk_size, cu_seqlens, valid)
        request = _request(
            "scan",
            spec,
            q,
            state.stored_weights,
            chunk_size=chunk_size,
            retention=retention is not None,
            momentum=momentum is not None,
            table=layout.sequences is not None,
            given=(*tokens, *_tensors_of(state)),
        )
        name = backends.select(backend, request)
        until = plan.factored_until(backend, request, state, bptt_chunks)
        if until == plan.ALWAYS or (until and state.position < until):
            factored_call = _factored_call(
                name, (k if reads_keys else q, k, v), (lr, retention), state, chunk_size, layout, until
            )
            return _PreparedCall(factored_call, name.removesuffix(backends.FACTORED) + backends.FACTORED)
        if name == "cpu" and not until:
            plain.remember(call)
    state = state.merged()
    writes = layout.chunks > 0
    coefficients = _coefficients(layout, state, spec, lr, retention, momentum) if writes else Coefficients()
    problem = ScanProblem(
        q,
        *((k, v, state.pending_k, state.pending_v) if writes else (None, None, None, None)),
        *coefficients,
        weights=state.stored_weights,
        momentum=(state.stored_momentum or ()) if writes else (),
        sequences=layout.sequences,
        spec=spec,
        chunk_size=chunk_size,
        chunks=layout.chunks,
        first_chunk=layout.first_chunk if isinstance(layout, UniformLayout) else 0,
        bptt_chunks=bptt_chunks or 0,
    )

    def finish(output: Tensor, weights: Weights, speeds: Weights) -> MemoryOutput:
        written = {"stored_weights": weights} if writes else {}
        if writes and speeds:
            written["stored_momentum"] = speeds
        return MemoryOutput(output, _after(state, layout, chunk_size, k, v, lr, retention, momentum, **written))

    return _Prepared(problem, name, _is_direct(call, name), finish)


def _check_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    retention: Tensor | None,
    momentum: Tensor | None,
    spec: MemorySpec,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
    bptt_chunks: int | None,
) -> int:
    """Checks the arguments of a scan but for its memory; returns how many sequences they describe."""
    check.check_spec(spec)
    check.check_chunk_size(chunk_size)
    check.check_tokens({"q": q, "k": k, "v": v})
    check.check_gates(spec, lr, retention, momentum, q)
    check.check_gate_values(spec, lr, retention, momentum)
    if bptt_chunks is not None:
        check.check_positive("bptt_chunks", bptt_chunks)
    if cu_seqlens is not None and valid is not None:
        raise ValueError("valid: got it together with cu_seqlens; want one of the two")
    if valid is not None:
        check.check_valid(valid, q)
    if cu_seqlens is None:
        return q.shape[0]
    check.check_cu_seqlens(cu_seqlens, q)
    return cu_seqlens.shape[0] - 1


def _after(
    state: MemoryState,
    layout: UniformLayout | TableLayout,
    chunk_size: int,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    retention: Tensor | None,
    momentum: Tensor | None,
    *,
    known: bool = False,
    **written: Any,
) -> MemoryState:
    """``state`` after a call's tokens: position, pending tokens, gates in use, and the fields that were ``written``.

    ``known``: all tensors are known to be plain, and no gradient is wanted.
    """
    kept, room = pending.after(
        state.pending,
        (k, v, lr, retention, momentum),
        state.room,
        most=chunk_size - 1,
        grows=layout.chunks == 0 and isinstance(layout, UniformLayout),
        unfinished=layout.unfinished,
        known=known,
    )
    return state.replaced(
        chunk_size=chunk_size,
        batch_size=layout.rows,
        pending_k=kept[0],
        pending_v=kept[1],
        pending_lr=kept[2],
        pending_retention=kept[3],
        pending_momentum=kept[4],
        room=room,
        has_retention=retention is not None,
        has_momentum=momentum is not None,
        **layout.advance(),
        **written,
    )


def _factored_call(
    name: str,
    tokens: tuple[Tensor, Tensor, Tensor],
    gates: factored.Gates,
    state: MemoryState,
    chunk_size: int,
    layout: UniformLayout | TableLayout,
    until: int,
) -> Callable[[], MemoryOutput]:
    """What runs a scan factored, up to the token where its plan turns dense."""
    q, k, v = tokens
    lr, retention = gates
    spec = state.spec

    def whole() -> MemoryOutput:
        output, factors = factored.scan_problem(tokens, gates, state, layout, name)
        new_state = _after(state, layout, chunk_size, k, v, lr, retention, None, factors=factors)
        # Merged as soon as that is due, not once for every call that goes on from here.
        due = until != plan.ALWAYS and new_state.position >= until
        return MemoryOutput(output, new_state.merged() if due else new_state)

    def in_two() -> MemoryOutput:
        turn, memory, outputs = until - state.position, state, []
        for part, backend in ((slice(turn), name + backends.FACTORED), (slice(turn, None), name)):
            keys = k[:, part]
            output, memory = memory_scan(
                keys if q is k else q[:, part],
                keys,
                v[:, part],
                lr[:, part],
                memory,
                spec=spec,
                chunk_size=chunk_size,
                retention=None if retention is None else retention[:, part],
                backend=backend,
            )
            outputs.append(output)
        return MemoryOutput(torch.cat(outputs, 1), memory)

    if until == plan.ALWAYS or state.position + k.shape[1] <= until:
        return whole
    return in_two


def memory_read(q: Tensor, memory: Memory, *, spec: MemorySpec, backend: str | None = None) -> Tensor:
    """``f_W(q)`` with the current weights, nothing written: ``[B, T, N, D]``, dtype of ``q``.

    Arguments, gradients and errors as in :func:`memory_scan`; pending tokens of a state play no part.
    """
    (q,) = _under_autocast(q)
    call = plain.signature("read", spec, backend, memory, (q,))
    if plain.passed(call):
        weights, name = memory.stored_weights if isinstance(memory, MemoryState) else tuple(memory), "cpu"
        if _is_direct(call, name):
            return backends.implementation(name).read(q, weights, spec, 1)
    else:
        check.check_spec(spec)
        check.check_tokens({"q": q})
        state = _state_of(memory, spec, None, q, q.shape[0])
        request = _request("read", spec, q, state.stored_weights, chunk_size=1, given=(q, *_tensors_of(state)))
        name = backends.select(backend, request)
        if plan.reads_factored(backend, request, state):
            return factored.read(q, state, name)
        weights = state.merged().stored_weights
        if name == "cpu":
            plain.remember(call)
    return _run(_read_problem(q, weights, spec), name, _is_direct(call, name))[0]


def memory_write(
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    memory: Memory,
    *,
    spec: MemorySpec,
    retention: Tensor | None = None,
    momentum: Tensor | None = None,
    backend: str | None = None,
) -> MemoryState:
    """Write all tokens as one chunk: inner gradients at the current weights, one update. Returns the new state.

    Arguments, gradients and errors as in :func:`memory_scan`; a call without tokens changes nothing. A new state
    (from plain weights) takes T as its chunk size.

    Raises:
        ValueError: ``memory`` is a state with pending tokens, whose chunk this call would tear apart.
    """
    tokens = k, v, lr, retention, momentum = _under_autocast(k, v, lr, retention, momentum)
    call = plain.signature("write", spec, backend, memory, tokens)
    if plain.passed(call):
        check.check_gate_values(spec, lr, retention, momentum)
        rows, length = k.shape[:2]
        state = _unchecked_state(memory, spec, length, k)
        layout, name = UniformLayout(rows, length, length, 0, 0, 0), "cpu"
    else:
        check.check_spec(spec)
        check.check_tokens({"k": k, "v": v})
        check.check_gates(spec, lr, retention, momentum, k)
        check.check_gate_values(spec, lr, retention, momentum)
        rows, length = k.shape[:2]
        state = _state_of(memory, spec, None, k, rows, initial_chunk_size=max(length, 1))
        check.check_stream_gates(state, retention, momentum)
        if state.pending_k is not None:
            raise ValueError(
                f"memory: got a state with pending tokens ({state!r}); memory_write wants one at the end of a chunk"
            )
        request = _request(
            "write",
            spec,
            k,
            state.stored_weights,
            # In a trace the length may be a symbol, which is not to become a constant.
            chunk_size=None if torch.compiler.is_compiling() else max(length, 1),
            retention=retention is not None,
            momentum=momentum is not None,
            given=(*tokens, *_tensors_of(state)),
        )
        name = backends.select(backend, request)
        until = plan.factored_until(backend, request, state)
        if length == 0:
            return state.replaced(batch_size=rows)
        layout = UniformLayout(rows, length, length, 0, 0, 0)
        if until == plan.ALWAYS or (until and state.position < until):
            factors = factored.scan_problem((k[:, :0], k, v), (lr, retention), state, layout, name)[1]
            written = _written(state, rows, length, retention, momentum, factors=factors)
            return written if until == plan.ALWAYS or written.position < until else written.merged()
        if name == "cpu" and not until:
            plain.remember(call)
    state = state.merged()
    coefficients = _coefficients(layout, state, spec, lr, retention, momentum)
    problem = _write_problem(k, v, coefficients, state.stored_weights, state.stored_momentum or (), spec)
    _, weights, speeds = _run(problem, name, _is_direct(call, name))
    return _written(
        state,
        rows,
        length,
        retention,
        momentum,
        stored_weights=weights,
        stored_momentum=speeds or state.stored_momentum,
    )


def _written(
    state: MemoryState, rows: int, length: int, retention: Tensor | None, momentum: Tensor | None, **changes: Any
) -> MemoryState:
    """``state`` after one chunk of ``length`` tokens."""
    return state.replaced(
        batch_size=rows,
        position=state.position + length,
        chunk_index=state.chunk_index + 1,
        has_retention=retention is not None,
        has_momentum=momentum is not None,
        **changes,
    )


def _state_of(
    memory: Memory,
    spec: MemorySpec,
    chunk_size: int | None,
    tokens: Tensor,
    rows: int,
    initial_chunk_size: int | None = None,
) -> MemoryState:
    """The state a call starts from, checked against the call."""
    if isinstance(memory, MemoryState):
        if chunk_size != memory.chunk_size:  # also a write of one chunk of any size
            memory = check.without_empty_pending(memory)
        check.check_state(memory, spec, chunk_size, tokens, rows)
        return memory
    weights = check.check_weights("memory", memory, spec)
    check.check_memory_fits(weights, None, spec, tokens, rows)
    return MemoryState(spec, chunk_size or initial_chunk_size or 1, weights, None, rows)


def _unchecked_state(memory: Memory, spec: MemorySpec, chunk_size: int, tokens: Tensor) -> MemoryState:
    """What :func:`_state_of` returns for a call whose like has passed the checks."""
    if isinstance(memory, MemoryState):
        return memory
    return MemoryState(spec, chunk_size, tuple(memory), None, tokens.shape[0])


def _tensors_of(state: MemoryState) -> list[Tensor | None]:
    """Those of a state that a result may depend on."""
    pairs = () if state.factors is None else (*state.factors.inputs, *state.factors.errors, state.factors.weights)
    return [*state.stored_weights, *(state.stored_momentum or ()), *state.pending, *pairs]


def _request(
    operation: str,
    spec: MemorySpec,
    tokens: Tensor,
    weights: Weights,
    *,
    chunk_size: int | None,
    given: Iterable[Tensor | None],
    retention: bool = False,
    momentum: bool = False,
    table: bool = False,
) -> ScanRequest:
    """What the backend of a call is chosen by; ``given`` are all tensors of the call."""
    return ScanRequest(
        operation=operation,
        key=spec.key,
        dtype=tokens.dtype,
        device=tokens.device,
        # Where these are symbols of a trace, index() makes constants of them; int() would not.
        heads=index(tokens.shape[2]),
        dim=index(tokens.shape[3]),
        hidden=index(weights[0].shape[-1]),
        chunk_size=None if chunk_size is None else index(chunk_size),
        retention=retention,
        momentum=momentum,
        table=table,
        gradients=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given),
    )


def _coefficients(
    layout: UniformLayout | TableLayout,
    state: MemoryState,
    spec: MemorySpec,
    lr: Tensor,
    retention: Tensor | None,
    momentum: Tensor | None,
) -> Coefficients:
    def chunks_of(pending: Tensor | None, gate: Tensor | None, fill: float) -> Tensor | None:
        return None if gate is None else layout.chunks_of(pending, gate, fill)

    return chunk_coefficients(
        spec.rule,
        layout.chunks_of(state.pending_lr, lr, 0.0),
        chunks_of(state.pending_retention, retention, 1.0),
        chunks_of(state.pending_momentum, momentum, 0.0),
    )


def _read_problem(q: Tensor, weights: Weights, spec: MemorySpec) -> ScanProblem:
    return ScanProblem(q, None, None, None, None, *Coefficients(), weights, (), None, spec, 1, 0, 0, 0)


def _write_problem(
    k: Tensor, v: Tensor, coefficients: Coefficients, weights: Weights, momentum: Weights, spec: MemorySpec
) -> ScanProblem:
    """All tokens are one chunk."""
    return ScanProblem(None, k, v, None, None, *coefficients, weights, momentum, None, spec, k.shape[1], 1, 0, 0)


def _is_direct(call: plain.Signature | None, backend: str) -> bool:
    """Whether the engine may be called without the operator."""
    return backend == "cpu" and call is not None and not call.gradients


def _run(problem: ScanProblem, backend: str, direct: bool) -> tuple[Tensor, Weights, Weights]:
    if backend != "reference":
        return ops.scan(problem, backend, direct=direct)
    device = problem.tokens.device.type
    # The reference rounds operands itself; autocast would round the state as well.
    quiet = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
    with quiet:
        return reference.chunked_scan(problem)


def _under_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Token tensors in the autocast dtype, gates in float32, when autocast is on; float64 is left alone."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(x: Tensor | None) -> Tensor | None:
        if not isinstance(x, Tensor) or x.dtype == torch.float64 or not x.is_floating_point():
            return x
        return x.to(dtype if x.dim() == 4 else torch.float32)

    return [cast(x) for x in tensors]
