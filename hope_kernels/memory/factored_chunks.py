"""The chunks of a factored scan: what one chunk computes, and all chunks of a call in order.

:func:`run` is the scan for :mod:`hope_kernels.memory.factored`, which checks arguments and carries states. Per chunk
and layer it makes one product with the network's shared weights and one with the pairs written before
(:mod:`hope_kernels.memory.pair_products`). For the backward a call keeps what the network's own layers keep and, per
token, errors before and after the activation and the pairs: linear in tokens times ``D + H``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor

from hope_kernels.backends.interface import state_dtype
from hope_kernels.memory.coefficients import chunk_coefficients
from hope_kernels.memory.factors import INPUT_OF_LAYER, Block, Factors, Pairs, merge_after, operand_dtype
from hope_kernels.memory.joined_pairs import Grown, PairEngine
from hope_kernels.memory.networks import SharedNetwork, times_slope, with_weights
from hope_kernels.memory.schedule import RaggedSchedule, Schedule, Segment
from hope_kernels.memory.spec import MemorySpec

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
        delta = target.clone()  # it is kept, and may be the caller's memory
    else:
        delta = at_keys.prediction - _evaluate(network, spec, written, v).prediction
    errors = _errors(network, spec, written, at_keys, delta)
    inputs = [] if at_keys.hidden is None else [at_keys.hidden.to(operand)]
    keys = k.to(operand).transpose(1, 2).clone(memory_format=torch.contiguous_format)  # never the caller's memory
    return (at_keys.output, keys, *(x.transpose(1, 2).contiguous() for x in (*inputs, *errors)))


def _recomputed(function: Callable[..., Any], *tensors: Any) -> Any:
    """``function(*tensors)``, its intermediates recomputed in the backward rather than kept. It draws no numbers."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    # The random state is not asked for: torch locks its generator meanwhile, and when the garbage collector then lets
    # another thread run that asks too, both wait for ever.
    return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


# ----------------------------------------------------------------------------------------------------------------
# All chunks of a call


class ChunkKernels(Protocol):
    """Compiled kernels in the place of :func:`_evaluate` and :func:`_write`, for all sequences at once."""

    def read(self, pairs: Pairs | None, q: Tensor) -> Tensor: ...

    def write(self, pairs: Pairs | None, k: Tensor, v: Tensor) -> tuple[Tensor, ...]: ...

    def joined(self, blocks: Sequence[Block]) -> Sequence[Block]: ...


class Writing:
    """What sequences have written as a scan goes on, in a block of pairs ``[B, N, C, .]`` for each chunk.

    An engine's kernels take one block: with an ``engine`` there is one that grows.

    Args:
        kernels, engine: see :func:`run`.
        limit: pairs beyond which :meth:`merge_beyond_limit` merges them.
        to_come: pairs of each sequence that are going to be written.
    """

    def __init__(
        self,
        network: SharedNetwork,
        spec: MemorySpec,
        history: History,
        rows: int,
        k: Tensor,
        *,
        kernels: ChunkKernels | None = None,
        engine: PairEngine | None = None,
        limit: int = sys.maxsize,
        to_come: int = 0,
    ) -> None:
        self.kernels, self.engine, self.limit, self.to_come = kernels, engine, limit, to_come
        self.shared, self.spec, self.rows, self.operand = network, spec, rows, operand_dtype(k)
        self.merged = history.merged
        self.network = network if self.merged is None else with_weights(network, self.merged, self.operand)
        self.blocks: list[Block] = []
        self.grown: list[Grown] = []  # of the one block, where there is an engine
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
        return Pairs(self.spec.form, tuple(self.blocks), self.weights, self.decay, self.operand, self.engine)

    def read(self, q: Tensor) -> Tensor:
        """``f_W(q)`` now."""
        if self.kernels is not None:
            return self.kernels.read(self.pairs(), q)
        return _evaluate(self.network, self.spec, self.pairs(), q).output

    def write(self, segment: Segment, k: Tensor, v: Tensor, gates: Sequence[Tensor | None]) -> Tensor:
        """Write tokens ``[., C, N, D]`` and gates of those that complete a segment; returns ``f_W(k)`` before."""
        pairs, rows = self.pairs(), None
        if self.kernels is not None and segment.rows is None:
            output, *found = self.kernels.write(pairs, k, v)
        elif segment.rows is None:
            output, *found = _write(self.network, self.spec, pairs, k, v, self.operand)
        else:
            rows = torch.tensor(segment.rows).to(k.device, non_blocking=True)
            # As they are now: a backward computes this again, after later merges.
            network, merged = self.network, self.merged

            def of_rows(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                mine = network
                if merged is not None:
                    mine = with_weights(self.shared, [w.index_select(0, rows) for w in merged], self.operand)
                chosen = None if pairs is None else pairs.of_rows(rows)
                return _write(mine, self.spec, chosen, k, v, self.operand)

            # Copies of what these sequences wrote: not to be kept for every chunk.
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
        if self.engine is not None:
            # Place for all that comes before a merge, or for as much again where that comes later than it is due.
            written = self.capacity + step.shape[2]
            self.to_come -= step.shape[2]
            room = min(self.to_come, max(written, self.limit + step.shape[2] - written))
            self.grown = self.grown or [Grown(x) for x in self._pair_tensors() or [None] * len(found)]
            found = [grown.append(x, room=room) for grown, x in zip(self.grown, found, strict=True)]
            self.blocks = []
        self.blocks.append((tuple(found[:inputs]), tuple(found[inputs:])))
        if self.weights is None:
            self.weights, self.decay = step.clone(), decay  # without retention it is the caller's lr
        else:
            kept = self.weights if decay is None else self.weights * decay.unsqueeze(-1)
            self.weights = torch.cat([kept, step], 2)
            self.decay = None if decay is None else self.decay * decay

    def _pair_tensors(self) -> list[Tensor]:
        """Inputs and errors of all blocks."""
        return [x for block in self.blocks for part in block for x in part]

    def _factors(self) -> Factors | None:
        if self.weights is None:
            return None

        def join(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return tuple(x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*parts, strict=True))

        blocks = self.blocks if self.kernels is None else self.kernels.joined(self.blocks)
        inputs, errors = zip(*blocks, strict=True)
        return Factors(join(inputs), join(errors), self.weights, self.decay)

    def merge_beyond_limit(self) -> None:
        """Dense weights of each sequence's own in the place of the pairs, if these are more than the limit."""
        if self.weights is None or self.capacity <= self.limit:
            return
        factors = self._factors()
        base = [self.network.weight(i) for i in range(self.spec.weight_count)]
        self.merged = tuple(_recomputed(lambda: factors.merged(base, self.spec)))
        self.network = with_weights(self.shared, self.merged, self.operand)
        self.blocks, self.grown, self.weights, self.decay, self.slots = [], [], None, None, None

    def history(self) -> History:
        factors = self._factors()
        if not self.slots or factors is None:  # one count for all, no rows, or no pairs
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
    kernels: ChunkKernels | None = None,
    engine: PairEngine | None = None,
) -> tuple[Tensor, History]:
    """A scan over the segments of a schedule: output ``[B, T, N, D]`` as the network rounds it, and the new history.

    Args:
        tokens: ``q, k, v``; reads share the pass of the keys through the network where q and k are one tensor.
        gates: of the new tokens; ``pending``: k, v and gates of the tokens before them.
        limit: merge as soon as there are more pairs than this; None for :func:`merge_after`'s rule.
        one_base_product: see :func:`factored_scan`.
        kernels: for whole chunks that all sequences complete; None where there are none. Not with pairs that merge.
        engine: whose kernels multiply with pairs; None for the matrix library.
    """
    q, k, v = tokens
    limit = merge_after(spec, k.shape[-1], network.out_features(0)) if limit is None else limit
    to_come = schedule.chunk_size * sum(segment.writes for segment in schedule.segments)
    writing = Writing(
        network, spec, history, schedule.rows, k, kernels=kernels, engine=engine, limit=limit, to_come=to_come
    )
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
        writing.merge_beyond_limit()
    if q.shape[1] == 0 or not schedule.segments:
        # No token is read: zeros, or nothing, that have a gradient of 0 rather than none.
        nothing = _evaluate(network, spec, None, q[:, :0]).output
        output = nothing.new_zeros(q.shape) + nothing.sum()
    elif one_base_product:
        written = None if all(pairs is None for pairs in starts) else _AllSegments(schedule, starts)
        if isinstance(schedule, RaggedSchedule):
            q = schedule.without_padding(q)
        output = _evaluate(writing.network, spec, written, q).output
        if isinstance(schedule, RaggedSchedule):  # tokens outside every sequence read nothing
            output = schedule.assemble([schedule.reads(segment, output) for segment in schedule.segments])
        writing.merge_beyond_limit()
    else:
        output = schedule.assemble(outputs)
    return output, writing.history()
