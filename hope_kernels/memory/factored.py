"""The factored plan: memories of many sequences on one shared network, without a copy of its weights per sequence.

Until a sequence has written about ``D H / (D + H)`` tokens its weights are cheaper as the shared initial weights and a
list of (input, error) pairs than as a matrix of its own (:mod:`hope_kernels.memory.factors` has the equation and the
rule). Every read is then one product over the whole batch with the shared layer, and a linear attention over the pairs
of earlier chunks; every write appends C pairs. Nothing is approximated: it equals the dense update to rounding.

:func:`factored_scan` is ``memory_scan`` for any :class:`~hope_kernels.memory.networks.SharedNetwork`, biases and
activations of its own included; :func:`scan_problem` and :func:`read` are what ``memory_scan`` and ``memory_read``
call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_kernels.backends import pair_engine
from hope_kernels.memory import factored_ops
from hope_kernels.memory import validation as check
from hope_kernels.memory.factored_chunks import ChunkKernels, Gates, History, Writing, run
from hope_kernels.memory.factors import INPUT_OF_LAYER, Factors, operand_dtype
from hope_kernels.memory.layout import TableLayout, UniformLayout
from hope_kernels.memory.networks import SharedNetwork, WeightNetwork
from hope_kernels.memory.pending import Room, Tokens, after
from hope_kernels.memory.schedule import RaggedSchedule, Schedule, UniformSchedule
from hope_kernels.memory.spec import MemorySpec
from hope_kernels.memory.state import PENDING, MemoryState, state_dtype

ALWAYS = sys.maxsize  # more pairs than any sequence has: never merged

# ----------------------------------------------------------------------------------------------------------------
# For memory_scan: weight tensors and a MemoryState


def scan_problem(
    tokens: tuple[Tensor, Tensor, Tensor],
    gates: Gates,
    state: MemoryState,
    layout: UniformLayout | TableLayout,
    backend: str,
) -> tuple[Tensor, Factors | None]:
    """A checked ``memory_scan`` by the factored plan: output ``[B, T, N, D]``, dtype of q, and all pairs after it.

    ``backend``: the name of the one chosen, which may have kernels for chunks or for pairs.
    A ``q`` without tokens makes it a write of all the others. Rows at different positions are looked at on the host.
    """
    q, k, v = tokens
    network = WeightNetwork(state.stored_weights, k.dtype, state.spec)
    if isinstance(layout, UniformLayout):
        schedule: Schedule = UniformSchedule(layout.rows, layout.length, layout.pending, layout.chunk_size)
    else:
        columns = (layout.row, layout.start, layout.length, layout.pending)
        row, start, length, pending = (x.tolist() for x in columns)
        schedule = RaggedSchedule(row, start, length, pending, layout.chunk_size, k.shape[:2], k.device)
    history = History(factors=state.factors, counts=_counts(state))
    before = (state.pending_k, state.pending_v, (state.pending_lr, state.pending_retention))
    with torch.autocast(k.device.type, enabled=False):
        kernels = None
        if isinstance(schedule, UniformSchedule):
            room = None if torch.is_grad_enabled() else schedule.written
            kernels = _kernels(backend, network, tokens, room)
        output, history = run(
            network,
            state.spec,
            schedule,
            history,
            (q, k, v),
            gates,
            before,
            limit=ALWAYS,
            kernels=kernels,
            engine=pair_engine(backend, k.device, k.dtype),
        )
    return output.to(q.dtype), history.factors


def read(q: Tensor, state: MemoryState, backend: str) -> Tensor:
    """``f_W(q)`` of a factored state (or one that has nothing written), in the dtype of q; ``backend``: as above."""
    network = WeightNetwork(state.stored_weights, q.dtype, state.spec)
    with torch.autocast(q.device.type, enabled=False):
        history = History(factors=state.factors, counts=_counts(state))
        kernels, engine = _kernels(backend, network, (q,), None), pair_engine(backend, q.device, q.dtype)
        writing = Writing(network, state.spec, history, q.shape[0], q, kernels=kernels, engine=engine)
        return writing.read(q).to(q.dtype)


def _kernels(
    backend: str, network: WeightNetwork, tokens: Sequence[Tensor], room: int | None
) -> ChunkKernels | None:
    """Those of a backend for such chunks; None where it has none. ``room`` as :class:`factored_ops.Chunks` has it."""
    if backend.partition(":")[0] == "cpu" and factored_ops.takes(network.weights, tokens):
        return factored_ops.Chunks(network.weights, network.spec, tokens[0].dtype, room)
    return None


def _counts(state: MemoryState) -> int | tuple[int, ...]:
    """Pairs of each row of a state that has never been merged: all tokens but the pending ones."""
    counts = state.position - state.pending_count
    return tuple(counts.tolist()) if isinstance(counts, Tensor) else counts


# ----------------------------------------------------------------------------------------------------------------
# The public function, for any shared network


@dataclass(frozen=True, eq=False)
class FactoredState:
    """The state :func:`factored_scan` carries from call to call. Immutable; what did not change is shared.

    Attributes:
        chunk_size: C of the chunk in progress.
        position, pending_count: tokens seen, and those of the unfinished chunk; ints where all rows agree, else a tuple
            with one int per row. On the host: the scan is a loop over chunks.
        history: what was written.
        pending_k, pending_v: ``[B, P, N, D]``, tokens of the unfinished chunk, zeros after each row's own; None when
            there are none. pending_lr, pending_retention: ``[B, P, N]``, likewise.
        has_retention: whether the stream's calls give that gate; None before the first call.
        spec: what the memories are; None before the first call.
        room: the memory that the pending tokens gather in, see :mod:`hope_kernels.memory.pending`; never stored.
    """

    chunk_size: int
    position: int | tuple[int, ...] = 0
    pending_count: int | tuple[int, ...] = 0
    history: History = field(default_factory=History)
    pending_k: Tensor | None = None
    pending_v: Tensor | None = None
    pending_lr: Tensor | None = None
    pending_retention: Tensor | None = None
    has_retention: bool | None = None
    spec: MemorySpec | None = None
    room: Room | None = field(default=None, repr=False)

    @property
    def pending(self) -> Tokens:
        """The pending tokens and their gates."""
        return self.pending_k, self.pending_v, self.pending_lr, self.pending_retention

    def detach(self) -> FactoredState:
        """The same state, cut off from the graph that made it."""

        def cut(name: str, x: Tensor) -> Tensor:  # pending tokens go on gathering where they are
            return x if name in PENDING and not x.requires_grad else x.detach()

        return self._map(cut)

    def to(self, device: torch.device | str) -> FactoredState:
        """The state on another device."""
        return self._map(lambda _, x: x.to(device))

    def index_select(self, indices: Tensor | Sequence[int]) -> FactoredState:
        """The state of rows ``indices`` (1-D, may repeat or reorder: beam search), as a batch of that size.

        Raises:
            ValueError: ``indices`` is not one-dimensional or not of an integer dtype.
            IndexError: an index is out of range.
        """
        held = self._tensors()
        indices = check.check_indices(indices, held[0].shape[0] if held else None, torch.device("cpu"))
        chosen = indices.tolist()

        def pick(x: int | tuple[int, ...]) -> int | tuple[int, ...]:
            return x if isinstance(x, int) else _agreed([x[i] for i in chosen])

        result = self._map(lambda _, x: x.index_select(0, indices.to(x.device)))
        history = replace(result.history, counts=pick(self.history.counts))
        return replace(result, history=history, position=pick(self.position), pending_count=pick(self.pending_count))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values by name; ``torch.save``-able and loadable with ``weights_only=True``."""
        result = {x.name: getattr(self, x.name) for x in fields(self) if x.name not in ("history", "room")}
        if self.room is not None:  # of which only what is used is to be stored
            result |= {name: x if x is None else x.clone() for name, x in zip(PENDING, self.pending, strict=False)}
        merged, factors = self.history.merged, self.history.factors
        return result | {
            "spec": None if self.spec is None else self.spec.key,
            "merged": None if merged is None else list(merged),
            "factors": None if factors is None else factors.state_dict(),
            "counts": self.history.counts,
        }

    @staticmethod
    def from_state_dict(state_dict: dict[str, Any]) -> FactoredState:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: a name is missing or unknown.
        """
        names = {x.name for x in fields(FactoredState)} - {"history", "room"} | {"merged", "factors", "counts"}
        if set(state_dict) != names:
            missing, unknown = sorted(names - set(state_dict)), sorted(set(state_dict) - names)
            raise ValueError(
                f"state_dict: missing {missing}, unknown {unknown}; want the result of FactoredState.state_dict()"
            )
        values = dict(state_dict)
        merged, factors, counts = (values.pop(name) for name in ("merged", "factors", "counts"))
        history = History(
            None if merged is None else tuple(merged),
            None if factors is None else Factors.from_state_dict(factors),
            counts,
        )
        if values["spec"] is not None:
            values["spec"] = MemorySpec.from_key(values["spec"])
        return FactoredState(**values, history=history)

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self._map(lambda _, x: found.append(x) or x)
        return found

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> FactoredState:
        changes: dict[str, Any] = {
            name: function(name, x)
            for name in ("pending_k", "pending_v", "pending_lr", "pending_retention")
            if (x := getattr(self, name)) is not None
        }
        return replace(self, history=self.history.map(function), **changes)


class FactoredOutput(NamedTuple):
    """``output [B, T, N, D]`` in the dtype the network's last layer rounds to, and the new state."""

    output: Tensor
    state: FactoredState


def factored_scan(
    network: SharedNetwork,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    state: FactoredState | None = None,
    *,
    spec: MemorySpec,
    chunk_size: int,
    retention: Tensor | None = None,
    valid: Tensor | None = None,
    limit: int | None = None,
    one_base_product: bool = False,
) -> FactoredOutput:
    """``memory_scan`` of memories that all start as one network, whose layers may have biases and any activation.

    Rule ``gd``, with or without retention; every objective. Biases are constants of their layers: never written, and
    retention leaves them alone. Fully differentiable, second-order terms included, for tokens, gates, the carried state
    and whatever parameters the network's own calls use. The backward recomputes every chunk: kept are the tokens and
    the pairs, linear in the number of tokens, ``T (D + H)``, and never a sequence's weights per chunk.

    With ``W = gamma W(0) - sum a_s u_s^T e_s`` a layer's output is ``gamma z + (1 - gamma) b - (a . (u U^T)) E``
    with ``z = u W(0) + b`` the network's own. Where nothing is written, or all of ``lr`` was 0 and all of retention 1,
    it is ``z`` bit for bit.

    Args:
        network: the layers all sequences share.
        q, k, v: ``[B, T, N, D]``, one dtype. Pass one tensor as q and k where they are equal: reads then share the
            keys' pass through the network.
        lr, retention: ``[B, T, N]``, float32 (float64 with float64 tokens).
        state: of an earlier call, or None for a fresh context.
        spec: form, residual and objective; the activation is the network's.
        chunk_size: C, tokens per write.
        valid: ``[B, 2]`` integers, first and one past the last real token of each row; tokens outside are neither read
            (their output is 0) nor written nor counted. Read on the host: on a GPU that waits for it.
        limit: pairs beyond which a sequence's pairs are merged into dense weights of its own; None for
            :func:`~hope_kernels.memory.factors.merge_after`'s rule. After a merge new pairs gather on top of the dense
            weights and merge again, so training keeps one set of weights per so many tokens at most. Rows at different
            positions merge together, as soon as one of them has more.
        one_base_product: compute each layer's shared product for all reads of the call at once, apart from the
            writes'. The output then has the bits of the network called on the same tokens whatever the chunk size,
            where nothing is written or all weights are 0; without, products are cut at chunks, which a matrix library
            may round differently. Costs one more pass through the network where q and k are one tensor.

    Raises:
        ValueError, TypeError: an argument does not fit, a state of another spec, network, dtype, batch or device among
            them; the message names it, what it is and what is wanted.
    """
    check.check_spec(spec)
    check.check_chunk_size(chunk_size)
    if spec.rule != "gd":
        raise ValueError(f"spec: got rule {spec.rule!r}; the factored plan wants rule 'gd'")
    check.check_tokens({"q": q, "k": k, "v": v})
    check.check_gates(spec, lr, retention, None, k)
    if limit is not None:
        check.check_positive("limit", limit)
    if valid is not None:
        check.check_valid(valid, k)
    rows, length = k.shape[:2]
    state = FactoredState(chunk_size) if state is None else state
    _check_state(state, network, spec, k, chunk_size, retention is not None)
    schedule: Schedule
    if valid is None and isinstance(state.pending_count, int):
        schedule = UniformSchedule(rows, length, state.pending_count, chunk_size)
    else:
        spans = [[0, length]] * rows if valid is None else valid.tolist()
        schedule = RaggedSchedule(
            row=range(rows),
            start=[start for start, _ in spans],
            length=[max(0, stop - start) for start, stop in spans],
            pending=_per_row(state.pending_count, rows),
            chunk_size=chunk_size,
            shape=(rows, length),
            device=k.device,
        )
    output, history = run(
        network,
        spec,
        schedule,
        state.history,
        (q, k, v),
        (lr, retention),
        (state.pending_k, state.pending_v, (state.pending_lr, state.pending_retention)),
        limit=limit,
        one_base_product=one_base_product,
        engine=pair_engine(None, k.device, operand_dtype(k)),
    )
    kept, room = after(
        state.pending,
        (k, v, lr, retention),
        state.room,
        most=chunk_size - 1,
        grows=isinstance(schedule, UniformSchedule) and schedule.written == 0,
        unfinished=schedule.unfinished,
    )
    if isinstance(schedule, UniformSchedule) and isinstance(state.position, int):
        position: int | tuple[int, ...] = state.position + length
    else:
        seen = schedule.length if isinstance(schedule, RaggedSchedule) else [length] * rows
        position = _agreed([p + n for p, n in zip(_per_row(state.position, rows), seen, strict=True)])
    count = schedule.rest if isinstance(schedule, UniformSchedule) else _agreed(schedule.rest)
    return FactoredOutput(
        output,
        FactoredState(
            chunk_size, position, count, history, *kept, has_retention=retention is not None, spec=spec, room=room
        ),
    )


def _per_row(value: int | Sequence[int], rows: int) -> list[int]:
    return [value] * rows if isinstance(value, int) else list(value)


def _agreed(values: Sequence[int]) -> int | tuple[int, ...]:
    """One int where all agree."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _check_state(
    state: Any, network: SharedNetwork, spec: MemorySpec, k: Tensor, chunk_size: int, has_retention: bool
) -> None:
    """A carried state against the call it meets, as :func:`hope_kernels.memory.validation.check_state`."""
    if not isinstance(state, FactoredState):
        raise TypeError(f"state: got {state!r}; want the FactoredState of an earlier call or None")
    # The activation is the network's; what the specs say of it is not asked.
    if state.spec is not None and replace(state.spec, activation=spec.activation) != spec:
        raise ValueError(f"state: got one of {state.spec}; want one of the call's spec, {spec}")
    if state.pending_k is not None and state.chunk_size != chunk_size:
        raise ValueError(
            f"chunk_size: got {chunk_size}, but the state has tokens pending in a chunk of {state.chunk_size}; "
            f"want {state.chunk_size}"
        )
    if state.has_retention is not None and state.has_retention != has_retention:
        came, want = ("a gate", "None") if has_retention else ("None", "a gate")
        raise ValueError(f"retention: got {came}, but the state was made with {want}; want the same in every call")
    rows = k.shape[0]
    for value in (state.position, state.pending_count, state.history.counts):
        if not isinstance(value, int) and len(value) != rows:
            raise ValueError(f"state: got one of {len(value)} sequences; want {rows}")
    for name, x, shape, dtype in _wanted(state, network, spec, k):
        if x.shape[0] != rows or x.device != k.device:
            raise ValueError(f"state: got one of {x.shape[0]} sequences on {x.device}; want {rows} on {k.device}")
        if x.dtype != dtype:
            raise ValueError(f"state: got {name} of {x.dtype}; want {dtype} with tokens of {k.dtype}")
        if x.dim() != len(shape) or any(n not in (None, came) for came, n in zip(x.shape, shape, strict=True)):
            came, want = tuple(x.shape), ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(
                f"state: got {name} of shape {came}; want ({want}), for {k.shape[2]} heads of {k.shape[3]} features "
                f"and {network.out_features(0)} behind the network's first layer"
            )


def _wanted(
    state: FactoredState, network: SharedNetwork, spec: MemorySpec, k: Tensor
) -> Iterator[tuple[str, Tensor, tuple[int | None, ...], torch.dtype]]:
    """What each tensor of a state is called, and the shape (None: any) and dtype it has in a call with keys ``k``."""
    rows, _, heads, dim = k.shape
    exact, operand = state_dtype(k.dtype), operand_dtype(k)
    for name in ("k", "v"):
        if (x := getattr(state, f"pending_{name}")) is not None:
            yield f"pending tokens {name}", x, (rows, None, heads, dim), k.dtype
    for name in ("lr", "retention"):
        if (x := getattr(state, f"pending_{name}")) is not None:
            yield f"pending {name}", x, (rows, None, heads), exact
    shapes = spec.weight_shapes(dim, network.out_features(0))
    merged, factors = state.history.merged, state.history.factors
    if merged is not None:
        for name, x, shape in zip(spec.weight_names, merged, shapes, strict=True):
            yield f"written weights {name}", x, (rows, heads, *shape), exact
    if factors is None:
        return
    distinct = dict(zip(INPUT_OF_LAYER[spec.form], (shape[0] for shape in shapes), strict=True))
    for x, features in zip(factors.inputs, distinct.values(), strict=True):
        yield "written tokens", x, (rows, heads, None, features), operand
    for name, x, shape in zip(spec.weight_names, factors.errors, shapes, strict=True):
        yield f"written errors of {name}", x, (rows, heads, None, shape[1]), exact
    yield "written weights of pairs", factors.weights, (rows, heads, None), exact
    if factors.decay is not None:
        yield "written retention", factors.decay, (rows, heads), exact
