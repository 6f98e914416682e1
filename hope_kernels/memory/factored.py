"""The factored plan: memories of many sequences on one shared network, without a copy of its weights per sequence.

Until a sequence has written about ``D H / (D + H)`` tokens its weights are cheaper as the shared initial weights and a
list of (input, error) pairs than as a matrix of its own (:mod:`hope_kernels.memory.factors` has the equation and the
rule). Every read is then one product over the whole batch with the shared layer, and a linear attention over the pairs
of earlier chunks; every write appends C pairs. Nothing is approximated: it equals the dense update to rounding.

:func:`factored_scan` is ``memory_scan`` for any :class:`~hope_kernels.memory.networks.SharedNetwork`, biases and
activations of its own included; ``memory_scan`` itself runs :func:`run` on weight tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor

from hope_kernels.backends.interface import state_dtype
from hope_kernels.memory import validation as check
from hope_kernels.memory.coefficients import chunk_coefficients
from hope_kernels.memory.factors import INPUT_OF_LAYER, Block, Factors, Pairs, merge_after, operand_dtype
from hope_kernels.memory.layout import TableLayout, UniformLayout
from hope_kernels.memory.networks import SharedNetwork, WeightNetwork, times_slope, with_weights
from hope_kernels.memory.schedule import RaggedSchedule, Schedule, Segment, UniformSchedule
from hope_kernels.memory.spec import MemorySpec
from hope_kernels.memory.state import MemoryState

ALWAYS = sys.maxsize  # more pairs than any sequence has: never merged

Gates = tuple[Tensor, Tensor | None]  # lr, retention


@dataclass(frozen=True, eq=False)
class History:
    """What sequences have written: dense weights once merged, and pairs on top of them (or of the shared network).

    ``counts``: pairs of each sequence, an int where all agree.
    """

    merged: tuple[Tensor, ...] | None = None
    factors: Factors | None = None
    counts: int | tuple[int, ...] = 0

    def map(self, function: Callable[[str, Tensor], Tensor]) -> History:
        return replace(
            self,
            merged=None if self.merged is None else tuple(function("merged", w) for w in self.merged),
            factors=None if self.factors is None else self.factors.map(function),
        )


# ----------------------------------------------------------------------------------------------------------------
# One chunk


class _Evaluation(NamedTuple):
    output: Tensor  # f(x) as the network rounds it
    prediction: Tensor  # f(x) in the state dtype
    pre_activations: tuple[Tensor, ...]
    hidden: Tensor | None


def _evaluate(network: SharedNetwork, spec: MemorySpec, written: Any, x: Tensor) -> _Evaluation:
    """``f_W(x)``, ``x [B, T, N, D]``, with the network's weights and what was ``written`` since (None: nothing)."""
    exact = state_dtype(x.dtype)

    def layers(indices: tuple[int, ...], u: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Outputs of layers that all read ``u``, rounded as the network's own and not."""
        bases = [network.apply(i, u) for i in indices]
        if written is None:
            return [(base, base.to(exact)) for base in bases]
        kept, results = written.kept(u), []
        for i, base, delta in zip(indices, bases, written.deltas(indices, u), strict=True):
            z = base.to(exact)
            if kept is not None:
                # The bias does not decay. This form leaves the bits alone at gamma = 1 and loses none near 0.
                bias = network.bias(i)
                z = kept * z if bias is None else kept * z + (1 - kept) * bias
            z = z - delta
            results.append((z.to(base.dtype), z))
        return results

    hidden, pre_activations = None, ()
    if spec.form == "linear":
        [(rounded, z)] = layers((0,), x)
    else:
        pre_activations = tuple(rounded for rounded, _ in layers((0,) if spec.form == "mlp" else (0, 1), x))
        hidden = network.activate(pre_activations[0])
        if spec.form == "glu":
            hidden = hidden * pre_activations[1]
        [(rounded, z)] = layers((len(pre_activations),), hidden)
    if spec.residual:
        z = x.to(exact) + z
        rounded = z.to(rounded.dtype)
    return _Evaluation(rounded, z, pre_activations, hidden)


def _errors(
    network: SharedNetwork, spec: MemorySpec, written: Pairs | None, at_keys: _Evaluation, delta: Tensor
) -> tuple[Tensor, ...]:
    """The inner loss's gradient at each layer's output, from ``delta`` at the memory's, in the state dtype."""
    if spec.form == "linear":
        return (delta,)
    last = 1 if spec.form == "mlp" else 2
    error = network.apply_transposed(last, delta).to(delta.dtype)
    if written is not None:
        kept = written.kept(delta)
        error = error if kept is None else kept * error
        error = error - written.delta_transposed(last, delta)

    def through_activation(error: Tensor, *z: Tensor) -> tuple[Tensor, ...]:
        if spec.form == "mlp":
            return (times_slope(network, z[0], error),)
        return times_slope(network, z[0], error * z[1]), error * network.activate(z[0])

    return (*_recomputed(through_activation, error, *(z.to(delta.dtype) for z in at_keys.pre_activations)), delta)


def _write(
    network: SharedNetwork, spec: MemorySpec, written: Pairs | None, k: Tensor, v: Tensor, operand: torch.dtype
) -> tuple[Tensor, ...]:
    """``f(k)`` and the pairs of a chunk: inputs and errors of each layer, ``[B, N, C, .]``, all at its start."""
    at_keys = _evaluate(network, spec, written, k)
    target = v.to(at_keys.prediction.dtype)
    if spec.objective == "l2":
        delta = at_keys.prediction - target
    elif spec.objective == "dot":
        delta = -target
    elif spec.objective == "error":
        delta = target
    else:
        delta = at_keys.prediction - _evaluate(network, spec, written, v).prediction
    errors = _errors(network, spec, written, at_keys, delta)
    inputs = [k] if at_keys.hidden is None else [k, at_keys.hidden]
    pairs = [u.to(operand) for u in inputs] + list(errors)
    return (at_keys.output, *(x.transpose(1, 2).contiguous() for x in pairs))


def _recomputed(function: Callable[..., Any], *tensors: Any) -> Any:
    """``function(*tensors)``, its intermediates recomputed in the backward rather than kept."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)


# ----------------------------------------------------------------------------------------------------------------
# All chunks of a call


class _Writing:
    """What sequences have written as a scan goes on, in a block of pairs ``[B, N, C, .]`` for each chunk."""

    def __init__(self, network: SharedNetwork, spec: MemorySpec, history: History, rows: int, k: Tensor) -> None:
        self.shared, self.spec, self.rows, self.operand = network, spec, rows, operand_dtype(k)
        self.merged = history.merged
        self.network = network if self.merged is None else with_weights(network, self.merged, self.operand)
        self.blocks: list[Block] = []
        self.weights: Tensor | None = None
        self.decay: Tensor | None = None
        # Slots of each sequence's pairs, or their number where all sequences have all of them.
        counts = history.counts
        self.slots: list[list[int]] | None = None if isinstance(counts, int) else [list(range(n)) for n in counts]
        if history.factors is not None:
            self.blocks.append((history.factors.inputs, history.factors.errors))
            self.weights, self.decay = history.factors.weights, history.factors.decay

    @property
    def capacity(self) -> int:
        """Pairs stored of each sequence."""
        return 0 if self.weights is None else self.weights.shape[2]

    def pairs(self) -> Pairs | None:
        """All that is written by now."""
        if self.weights is None:
            return None
        return Pairs(self.spec.form, tuple(self.blocks), self.weights, self.decay, self.operand)

    def read(self, q: Tensor) -> Tensor:
        """``f_W(q)`` now."""
        return _evaluate(self.network, self.spec, self.pairs(), q).output

    def write(self, segment: Segment, k: Tensor, v: Tensor, gates: Sequence[Tensor | None]) -> Tensor:
        """Write tokens ``[., C, N, D]`` and gates of those that complete a segment; returns ``f_W(k)`` before."""
        pairs, rows = self.pairs(), None
        if segment.rows is None:
            output, *found = _write(self.network, self.spec, pairs, k, v, self.operand)
        else:
            rows = torch.tensor(segment.rows).to(k.device, non_blocking=True)

            def of_rows(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                network = self.network
                if merged is not None:
                    network = with_weights(self.shared, [w.index_select(0, rows) for w in merged], self.operand)
                chosen = None if pairs is None else pairs.of_rows(rows)
                return _write(network, self.spec, chosen, k, v, self.operand)

            # Copies of what these sequences wrote: not to be kept for every chunk.
            merged = self.merged
            output, *found = _recomputed(of_rows, k, v)
        lr, retention = (None if g is None else g.transpose(1, 2) for g in gates)
        scalars = chunk_coefficients("gd", lr, retention, None)
        step, decay = scalars.step, scalars.decay
        if rows is not None:

            def among_all(x: Tensor, fill: float) -> Tensor:
                return x.new_full((self.rows, *x.shape[1:]), fill).index_copy(0, rows, x)

            found = [among_all(x, 0.0) for x in found]
            step, decay = among_all(step, 0.0), None if decay is None else among_all(decay, 1.0)
        self._append(found, step, decay, segment.rows)
        return output

    def _append(self, found: list[Tensor], step: Tensor, decay: Tensor | None, rows: tuple[int, ...] | None) -> None:
        if rows is not None and self.slots is None:
            self.slots = [list(range(self.capacity)) for _ in range(self.rows)]
        if self.slots is not None:
            new = range(self.capacity, self.capacity + step.shape[2])
            for s in range(self.rows) if rows is None else rows:
                self.slots[s] += new
        inputs = len(set(INPUT_OF_LAYER[self.spec.form]))
        self.blocks.append((tuple(found[:inputs]), tuple(found[inputs:])))
        if self.weights is None:
            self.weights, self.decay = step, decay
        else:
            kept = self.weights if decay is None else self.weights * decay.unsqueeze(-1)
            self.weights = torch.cat([kept, step], 2)
            self.decay = None if decay is None else self.decay * decay

    def _factors(self) -> Factors | None:
        if self.weights is None:
            return None

        def join(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return tuple(x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*parts, strict=True))

        inputs, errors = zip(*self.blocks, strict=True)
        return Factors(join(inputs), join(errors), self.weights, self.decay)

    def merge_beyond(self, limit: int | None) -> None:
        """Dense weights of each sequence's own in the place of the pairs, if these are more than ``limit``."""
        if self.weights is None:
            return
        if limit is None:
            inputs, errors = self.blocks[0]
            limit = merge_after(self.spec, inputs[0].shape[-1], errors[0].shape[-1])
        if self.capacity <= limit:
            return
        factors = self._factors()
        base = [self.network.weight(i) for i in range(self.spec.weight_count)]
        self.merged = tuple(_recomputed(lambda: factors.merged(base, self.spec)))
        self.network = with_weights(self.shared, self.merged, self.operand)
        self.blocks, self.weights, self.decay, self.slots = [], None, None, None

    def history(self) -> History:
        factors = self._factors()
        if self.slots is None or factors is None:
            return History(self.merged, factors, self.capacity)
        counts = [len(slots) for slots in self.slots]
        width = max(counts)
        if any(slots != list(range(n)) for slots, n in zip(self.slots, counts, strict=True)) or width < self.capacity:
            # Pairs of sequences that wrote in different chunks of the call: each one's own to the front.
            table = torch.tensor([slots + [0] * (width - len(slots)) for slots in self.slots], dtype=torch.long)
            beyond = torch.arange(width) >= torch.tensor(counts)[:, None]
            index, beyond = table.to(self.weights.device)[:, None], beyond.to(self.weights.device)[:, None]

            def compact(name: str, x: Tensor) -> Tensor:
                if name == "decay":
                    return x
                if name == "weights":
                    return x.gather(2, index.expand(-1, x.shape[1], -1)).masked_fill(beyond, 0.0)
                return x.gather(2, index.unsqueeze(-1).expand(-1, x.shape[1], -1, x.shape[3]))

            factors = factors.map(compact)
        return History(self.merged, factors, counts[0] if len(set(counts)) == 1 else tuple(counts))


class _AllSegments:
    """:class:`Pairs` of every segment at once, for reads in one product: tokens as they lie in the call."""

    def __init__(self, schedule: Schedule, pairs: Sequence[Pairs | None]) -> None:
        self.schedule, self.pairs = schedule, pairs
        self.some = next(p for p in pairs if p is not None)

    def _assembled(self, u: Tensor, compute: Callable[[Pairs | None, Tensor], Tensor]) -> Tensor:
        segments = zip(self.schedule.segments, self.pairs, strict=True)
        return self.schedule.assemble([compute(pairs, self.schedule.reads(segment, u)) for segment, pairs in segments])

    def deltas(self, layers: Sequence[int], u: Tensor) -> list[Tensor]:
        widths = [self.some.blocks[0][1][i].shape[-1] for i in layers]

        def compute(pairs: Pairs | None, part: Tensor) -> Tensor:
            if pairs is None:
                return self.some.weights.new_zeros(*part.shape[:3], sum(widths))
            return torch.cat(pairs.deltas(layers, part), -1)

        return list(self._assembled(u, compute).split(widths, -1))

    def kept(self, u: Tensor) -> Tensor | None:
        if self.some.decay is None:
            return None

        def compute(pairs: Pairs | None, part: Tensor) -> Tensor:
            shape = (*part.shape[:3], 1)
            return self.some.weights.new_ones(shape) if pairs is None else pairs.kept(part).expand(shape)

        return self._assembled(u, compute)


def run(
    network: SharedNetwork,
    spec: MemorySpec,
    schedule: Schedule,
    history: History,
    tokens: tuple[Tensor, Tensor, Tensor],
    gates: Gates,
    pending: tuple[Tensor | None, Tensor | None, Gates | tuple[None, None]],
    *,
    limit: int | None,
    one_base_product: bool = False,
) -> tuple[Tensor, History]:
    """A scan over the segments of a schedule: output ``[B, T, N, D]`` as the network rounds it, and the new history.

    Args:
        tokens: ``q, k, v``; reads share the pass of the keys through the network where q and k are one tensor.
        gates: of the new tokens; ``pending``: k, v and gates of the tokens before them.
        limit: merge as soon as there are more pairs than this; None for :func:`merge_after`'s rule.
        one_base_product: see :func:`factored_scan`.
    """
    q, k, v = tokens
    writing = _Writing(network, spec, history, schedule.rows, k)
    outputs: list[Tensor] = []
    starts: list[Pairs | None] = []
    for segment in schedule.segments:
        starts.append(writing.pairs())
        shares = q is k and not one_base_product and segment.writes and schedule.keys_hold_reads(segment)
        if not shares and not one_base_product and q.shape[1]:
            outputs.append(writing.read(schedule.reads(segment, q)))
        if not segment.writes:
            continue
        at_keys = writing.write(
            segment,
            schedule.keys(segment, pending[0], k),
            schedule.keys(segment, pending[1], v),
            [None if g is None else schedule.keys(segment, p, g) for p, g in zip(pending[2], gates, strict=True)],
        )
        if shares:
            outputs.append(schedule.reads_of_keys(segment, at_keys))
        elif one_base_product:
            continue  # reads of this call still want the pairs as they are
        writing.merge_beyond(limit)
    if q.shape[1] == 0 or not schedule.segments:
        output = q.clone()  # no token: a copy of an empty q keeps its gradient
    elif one_base_product:
        written = None if all(pairs is None for pairs in starts) else _AllSegments(schedule, starts)
        output = _evaluate(writing.network, spec, written, q).output
        if isinstance(schedule, RaggedSchedule):  # tokens outside every sequence read nothing
            output = schedule.assemble([schedule.reads(segment, output) for segment in schedule.segments])
        writing.merge_beyond(limit)
    else:
        output = schedule.assemble(outputs)
    return output, writing.history()


# ----------------------------------------------------------------------------------------------------------------
# For memory_scan: weight tensors and a MemoryState


def scan_problem(
    tokens: tuple[Tensor, Tensor, Tensor], gates: Gates, state: MemoryState, layout: UniformLayout | TableLayout
) -> tuple[Tensor, Factors | None]:
    """A checked ``memory_scan`` by the factored plan: output ``[B, T, N, D]``, dtype of q, and all pairs after it.

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
        output, history = run(network, state.spec, schedule, history, (q, k, v), gates, before, limit=ALWAYS)
    return output.to(q.dtype), history.factors


def read(q: Tensor, state: MemoryState) -> Tensor:
    """``f_W(q)`` of a factored state (or one that has nothing written), in the dtype of q."""
    network = WeightNetwork(state.stored_weights, q.dtype, state.spec)
    with torch.autocast(q.device.type, enabled=False):
        writing = _Writing(network, state.spec, History(factors=state.factors, counts=_counts(state)), q.shape[0], q)
        return writing.read(q).to(q.dtype)


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
    """

    chunk_size: int
    position: int | tuple[int, ...] = 0
    pending_count: int | tuple[int, ...] = 0
    history: History = History()
    pending_k: Tensor | None = None
    pending_v: Tensor | None = None
    pending_lr: Tensor | None = None
    pending_retention: Tensor | None = None
    has_retention: bool | None = None

    def detach(self) -> FactoredState:
        """The same state, cut off from the graph that made it."""
        return self._map(lambda _, x: x.detach())

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
        ValueError, TypeError: an argument does not fit; the message names it, what it is and what is wanted.
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
    _check_state(state, k, chunk_size, retention is not None)
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
    )
    fresh = {"k": k, "v": v, "lr": lr, "retention": retention}
    unfinished = {
        f"pending_{name}": None if new is None else schedule.unfinished(getattr(state, f"pending_{name}"), new)
        for name, new in fresh.items()
    }
    if isinstance(schedule, UniformSchedule) and isinstance(state.position, int):
        position: int | tuple[int, ...] = state.position + length
    else:
        seen = schedule.length if isinstance(schedule, RaggedSchedule) else [length] * rows
        position = _agreed([p + n for p, n in zip(_per_row(state.position, rows), seen, strict=True)])
    count = schedule.rest if isinstance(schedule, UniformSchedule) else _agreed(schedule.rest)
    return FactoredOutput(
        output, FactoredState(chunk_size, position, count, history, **unfinished, has_retention=retention is not None)
    )


def _per_row(value: int | Sequence[int], rows: int) -> list[int]:
    return [value] * rows if isinstance(value, int) else list(value)


def _agreed(values: Sequence[int]) -> int | tuple[int, ...]:
    """One int where all agree."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _check_state(state: Any, k: Tensor, chunk_size: int, has_retention: bool) -> None:
    if not isinstance(state, FactoredState):
        raise TypeError(f"state: got {state!r}; want the FactoredState of an earlier call or None")
    if state.pending_k is not None and state.chunk_size != chunk_size:
        raise ValueError(
            f"chunk_size: got {chunk_size}, but the state has tokens pending in a chunk of {state.chunk_size}; "
            f"want {state.chunk_size}"
        )
    if state.has_retention is not None and state.has_retention != has_retention:
        came, want = ("a gate", "None") if has_retention else ("None", "a gate")
        raise ValueError(f"retention: got {came}, but the state was made with {want}; want the same in every call")
    for x in state._tensors():
        if x.shape[0] != k.shape[0] or x.device != k.device:
            raise ValueError(f"state: got one of {x.shape[0]} sequences on {x.device}; want {k.shape[0]} on {k.device}")
        break
    if state.pending_k is not None and state.pending_k.dtype != k.dtype:
        raise ValueError(f"state: got pending tokens of {state.pending_k.dtype}; want {k.dtype}, the dtype of k")
