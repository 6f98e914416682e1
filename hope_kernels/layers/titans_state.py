"""What a Titans layer carries between calls: ``TitansState``, a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hope_kernels.layers.level import Tokens
from hope_kernels.memory import MemoryState
from hope_kernels.memory.state import state_dtype


@dataclass(frozen=True, eq=False)
class TitansState:
    """The state of a :class:`hope_kernels.SelfModifyingTitans` or :class:`hope_kernels.NeuralMemory` for a batch of
    sequences. Never changed in place.

    Attributes:
        position: tokens seen by every sequence.
        batch_size: sequences.
        tail: ``[B, 3, dim]``, the inputs that the convolution still needs; zeros before the first token.
        memory: of the main memory, its pending tokens included.
        adaptive: the projections that are memories; ``()`` where there are none.
        projections: of the projection memories, ``len(adaptive) * heads`` of them, at the start of their chunk; None
            where there are none.
        pending: keys, targets and gates of the tokens in the unfinished projection chunk, ``[B, P, ..]``; None where
            there are none.
    """

    position: int
    batch_size: int
    tail: Tensor
    memory: MemoryState
    adaptive: tuple[str, ...] = ()
    projections: MemoryState | None = None
    pending: Tokens | None = None

    def detach(self) -> TitansState:
        """The same state without its history: gradients stop here."""
        return self._map(lambda memory: memory.detach(), lambda _, x: x.detach())

    def to(self, *args: Any, **kwargs: Any) -> TitansState:
        """The state on another device or for tokens of another dtype, as :meth:`hope_kernels.MemoryState.to`."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(name: str, x: Tensor) -> Tensor:
            gate = name not in ("tail", "k", "v")
            to = state_dtype(dtype) if gate and dtype is not None else dtype
            return x.to(device=device, dtype=to, non_blocking=non_blocking)

        return self._map(lambda memory: memory.to(*args, **kwargs), move)

    def index_select(self, indices: Tensor | Sequence[int]) -> TitansState:
        """The state whose sequence ``i`` is sequence ``indices[i]`` of this one (beam search); may repeat.

        Raises:
            ValueError, IndexError: as :meth:`hope_kernels.MemoryState.index_select`.
        """
        # Selecting from the memory first checks the indices.
        memory = self.memory.index_select(indices)
        rows = torch.as_tensor(indices, device=self.tail.device, dtype=torch.long)
        selected = self._map(lambda memory: memory.index_select(rows), lambda _, x: x.index_select(0, rows))
        return replace(selected, memory=memory, batch_size=len(rows))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for ``torch.save``; :meth:`from_state_dict` is the inverse."""
        return {
            "position": self.position,
            "batch_size": self.batch_size,
            "tail": self.tail,
            "memory": self.memory.state_dict(),
            "adaptive": list(self.adaptive),
            "projections": None if self.projections is None else self.projections.state_dict(),
            "pending": None if self.pending is None else self.pending._asdict(),
        }

    @staticmethod
    def from_state_dict(state_dict: dict[str, Any]) -> TitansState:
        """The inverse of :meth:`state_dict`. Weights are the stored ones, no longer a layer's parameters.

        Raises:
            ValueError: a name is missing or unknown.
        """
        names = {field.name for field in fields(TitansState)}
        if set(state_dict) != names:
            raise ValueError(f"state_dict: got names {sorted(state_dict)}; want {sorted(names)}")
        values = dict(state_dict)
        values["memory"] = MemoryState.from_state_dict(values["memory"])
        values["adaptive"] = tuple(values["adaptive"])
        if values["projections"] is not None:
            values["projections"] = MemoryState.from_state_dict(values["projections"])
        if values["pending"] is not None:
            values["pending"] = Tokens(**values["pending"])
        return TitansState(**values)

    def _map(
        self, of_memory: Callable[[MemoryState], MemoryState], of_tensor: Callable[[str, Tensor], Tensor]
    ) -> TitansState:
        return replace(
            self,
            tail=of_tensor("tail", self.tail),
            memory=of_memory(self.memory),
            projections=None if self.projections is None else of_memory(self.projections),
            pending=None if self.pending is None else self.pending.map(of_tensor),
        )
