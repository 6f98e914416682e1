"""The state a memory carries from call to call (``MemoryState``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hope_kernels.backends.interface import state_dtype
from hope_kernels.memory.factors import Factors
from hope_kernels.memory.spec import MemorySpec

Weights = tuple[Tensor, ...]

PENDING = ("pending_k", "pending_v", "pending_lr", "pending_retention", "pending_momentum")


@dataclass(frozen=True, eq=False, repr=False)
class MemoryState:
    """Weights, momentum and pending tokens of one memory, for every sequence and head. Immutable.

    A call that is given a state returns a new one and leaves the old one as it was; what did not change is
    shared, not copied. Make the first one with :meth:`initial` or by passing plain weights to ``memory_scan``.

    A factored state goes on referring to the initial weights after writes: changing those in place (an optimizer's
    step) changes what it reads. Where that is not wanted, take :meth:`merged` before.

    Attributes:
        spec: the spec the state belongs to.
        chunk_size: C of the chunk in progress.
        position: tokens seen; an int when all rows agree, int64 ``[B]`` on the device after a call with
            ``cu_seqlens`` or ``valid``.
        chunk_index: chunks written so far, in the form of ``position``.
        pending_count: tokens of the unfinished chunk, in the form of ``position``.
        batch_size: B, or None before the first call when the initial weights are shared and no size was given.
        stored_weights: the weights as stored: the initial weights themselves (``[N, in, out]`` or
            ``[B, N, in, out]``, no copy) until the first write, then what was written. See :attr:`weights`.
        stored_momentum: likewise, None without momentum.
        factors: what was written on top of ``stored_weights``, which then are the initial weights still, as pairs of
            inputs and errors; None where nothing is kept in that form (docs/factored.md).
        pending_k, pending_v: ``[B, P, N, D]`` tokens of the unfinished chunk, differentiable; None when there are
            none. P is ``pending_count`` when all rows agree, else ``C - 1`` with zeros after each row's count.
        pending_lr, pending_retention, pending_momentum: ``[B, P, N]`` their gates; None like the tokens, or when
            the gate is not in use.
        has_retention, has_momentum: whether the stream's calls give that gate; None before the first call.
    """

    spec: MemorySpec
    chunk_size: int
    stored_weights: Weights
    stored_momentum: Weights | None = None
    batch_size: int | None = None
    position: int | Tensor = 0
    chunk_index: int | Tensor = 0
    pending_count: int | Tensor = 0
    pending_k: Tensor | None = None
    pending_v: Tensor | None = None
    pending_lr: Tensor | None = None
    pending_retention: Tensor | None = None
    pending_momentum: Tensor | None = None
    has_retention: bool | None = None
    has_momentum: bool | None = None
    factors: Factors | None = None

    # The memory that the pending tokens gather in, see hope_kernels/memory/pending.py. No field: a state made from
    # another's fields starts without.
    room = None

    @staticmethod
    def initial(
        weights: Sequence[Tensor],
        momentum: Sequence[Tensor] | None = None,
        *,
        spec: MemorySpec,
        chunk_size: int,
        batch_size: int | None = None,
    ) -> MemoryState:
        """The state before the first token. It refers to ``weights`` (no copy), so gradients reach them.

        Args:
            weights: one tensor per weight of ``spec``, ``[N, in, out]`` (shared by all sequences) or
                ``[B, N, in, out]``; float32, float64, or the dtype of the tokens to come; any strides.
            momentum: initial momentum, shaped like ``weights``, float32 (float64); None for zero.
            chunk_size: C, tokens per write.
            batch_size: B, where the weights do not tell it.

        Raises:
            ValueError, TypeError: naming the argument that does not fit.
        """
        from hope_kernels.memory.validation import check_batch_size, check_chunk_size, check_spec, check_weights

        check_spec(spec)
        check_chunk_size(chunk_size)
        weights = check_weights("weights", weights, spec)
        if momentum is not None:
            momentum = check_weights("momentum", momentum, spec, like=weights)
        return MemoryState(
            spec,
            chunk_size,
            weights,
            momentum,
            check_batch_size(batch_size, weights),
            has_momentum=None if momentum is None else True,
        )

    @property
    def weights(self) -> Weights:
        """The current weights, each ``[B, N, in, out]`` in float32 (float64 for float64 tokens).

        Before the first write an expanded view of the initial weights; of a factored state a new tensor at each look.
        Gradients through it are exact.
        """
        if self.factors is not None:
            return self.factors.merged(self.stored_weights, self.spec)
        return tuple(self._per_sequence(w) for w in self.stored_weights)

    @property
    def momentum(self) -> Weights | None:
        """The current momentum, each ``[B, N, in, out]``, zeros before the first write; None when not in use."""
        if self.stored_momentum is None:  # in use but not yet written: zero at first
            return tuple(torch.zeros_like(w) for w in self.weights) if self.has_momentum else None
        return tuple(self._per_sequence(m) for m in self.stored_momentum)

    def _per_sequence(self, x: Tensor) -> Tensor:
        # float32 weights may meet float64 tokens: pending gates tell the state dtype before the first write does.
        x = x.to(state_dtype(x.dtype) if self.pending_lr is None else self.pending_lr.dtype)
        return x if x.dim() == 4 else x.expand(1 if self.batch_size is None else self.batch_size, *x.shape)

    @property
    def gates(self) -> tuple[bool, bool] | None:
        """Whether the stream has a retention and a momentum gate; None before the first call."""
        return None if self.has_retention is None else (self.has_retention, bool(self.has_momentum))

    @property
    def pending(self) -> tuple[Tensor | None, ...]:
        """The pending tokens and their gates, in the order of :data:`PENDING`."""
        return self.pending_k, self.pending_v, self.pending_lr, self.pending_retention, self.pending_momentum

    @property
    def has_row_positions(self) -> bool:
        """Whether rows may stand at different positions (after ``cu_seqlens`` or ``valid``)."""
        return isinstance(self.position, Tensor)

    def merged(self) -> MemoryState:
        """The same state with dense weights of each sequence's own where it is factored."""
        return self if self.factors is None else replace(self, stored_weights=self.weights, factors=None)

    def replaced(self, *, room: Any = None, **changes: Any) -> MemoryState:
        """The same state with other values in some fields: ``dataclasses.replace`` in a tenth of its 7 microseconds."""
        if torch.compiler.is_compiling():
            return replace(self, **changes)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, room=room, **changes)
        return other

    def detach(self) -> MemoryState:
        """The same state, cut off from the graph that made it. Nothing is copied: a factored state, or one with nothing
        written, still sees the initial weights change in place; :meth:`merged` makes the former independent of them.
        """

        def cut(name: str, x: Tensor) -> Tensor:  # pending tokens go on gathering where they are
            return x if name in PENDING and not x.requires_grad else x.detach()

        return self._map(cut).replaced(room=self.room)

    def to(self, *args: Any, **kwargs: Any) -> MemoryState:
        """The state on another device and/or for tokens of another dtype (arguments as ``Tensor.to``).

        A dtype applies to the pending tokens; weights, momentum and gates take the state dtype that goes with it.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(name: str, x: Tensor) -> Tensor:
            to = None
            if dtype is not None and x.is_floating_point():
                to = dtype if name in ("pending_k", "pending_v", "inputs") else state_dtype(dtype)
            return x.to(device=device, dtype=to, non_blocking=non_blocking)

        return self._map(move)

    def index_select(self, indices: Tensor | Sequence[int]) -> MemoryState:
        """The state of rows ``indices`` (1-D, may repeat or reorder: beam search), as a batch of that size.

        Raises:
            ValueError: ``indices`` is not one-dimensional or not of an integer dtype.
            IndexError: an index is out of range.
        """
        from hope_kernels.memory.validation import check_indices

        indices = check_indices(indices, self.batch_size, self.stored_weights[0].device)

        def select(name: str, x: Tensor) -> Tensor:
            shared = name.startswith("stored") and x.dim() == 3
            return x if shared else x.index_select(0, indices)

        return replace(self._map(select), batch_size=indices.shape[0])

    def _map(self, function: Any) -> MemoryState:
        changes: dict[str, Any] = {}
        for name in ("stored_weights", "stored_momentum"):
            value = getattr(self, name)
            if value is not None:
                changes[name] = tuple(function(name, x) for x in value)
        for name in ("position", "chunk_index", "pending_count", *PENDING):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                changes[name] = function(name, value)
        if self.factors is not None:
            changes["factors"] = self.factors.map(function)
        return replace(self, **changes)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values by name; ``torch.save``-able and loadable with ``weights_only=True``."""
        result: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        result["spec"] = self.spec.key
        if self.room is not None:  # of which only what is used is to be stored
            result |= {name: x if x is None else x.clone() for name, x in zip(PENDING, self.pending, strict=True)}
        for name in ("stored_weights", "stored_momentum"):
            if result[name] is not None:
                result[name] = list(result[name])
        if self.factors is not None:
            result["factors"] = self.factors.state_dict()
        return result

    @staticmethod
    def from_state_dict(state_dict: dict[str, Any]) -> MemoryState:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: a name is missing or unknown.
        """
        names = {field.name for field in fields(MemoryState)}
        state_dict = {"factors": None} | state_dict  # those made before there was a factored plan lack the name
        if set(state_dict) != names:
            missing, unknown = sorted(names - set(state_dict)), sorted(set(state_dict) - names)
            raise ValueError(
                f"state_dict: missing {missing}, unknown {unknown}; want the result of MemoryState.state_dict()"
            )
        values = dict(state_dict)
        if not isinstance(values["spec"], str):
            raise ValueError(f"state_dict: spec is {values['spec']!r}; want the key of a MemorySpec, a string")
        values["spec"] = MemorySpec.from_key(values["spec"])
        for name in ("stored_weights", "stored_momentum"):
            if values[name] is not None:
                values[name] = tuple(values[name])
        if values["factors"] is not None:
            values["factors"] = Factors.from_state_dict(values["factors"])
        return MemoryState(**values)

    def __repr__(self) -> str:
        position = "per row" if self.has_row_positions else self.position
        pending = "per row" if self.has_row_positions else self.pending_count
        return (
            f"MemoryState({self.spec.key}, chunk_size={self.chunk_size}, batch_size={self.batch_size}, "
            f"position={position}, pending={pending}{'' if self.factors is None else ', factored'})"
        )
