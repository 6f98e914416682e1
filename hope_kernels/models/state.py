"""What a Hope model carries between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from hope_kernels.layers import CMSState
from hope_kernels.layers.attention import AttentionState
from hope_kernels.layers.titans_state import TitansState

MixerState = AttentionState | TitansState


class BlockState(NamedTuple):
    """What one block carries: the state of its token mixer and that of its CMS."""

    mixer: MixerState
    cms: CMSState


@dataclass(frozen=True, eq=False)
class HopeState:
    """What a model carries between calls for a batch of sequences. Never changed in place.

    Attributes:
        position: tokens seen by every sequence.
        batch_size: sequences.
        blocks: one :class:`BlockState` per block.
    """

    position: int
    batch_size: int
    blocks: tuple[BlockState, ...]

    def detach(self) -> HopeState:
        """The same state without its history: gradients stop here (truncated backpropagation)."""
        return self._map(lambda part: part.detach())

    def to(self, *args: Any, **kwargs: Any) -> HopeState:
        """The state on another device or in another dtype."""
        return self._map(lambda part: part.to(*args, **kwargs))

    def index_select(self, indices: Tensor | Sequence[int]) -> HopeState:
        """The state whose sequence ``i`` is sequence ``indices[i]`` of this one (beam search); may repeat."""
        return replace(self._map(lambda part: part.index_select(indices)), batch_size=len(indices))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for ``torch.save``; :meth:`HopeModel.load_state` is the inverse."""
        blocks = [{"mixer": block.mixer.state_dict(), "cms": block.cms.state_dict()} for block in self.blocks]
        return {"position": self.position, "batch_size": self.batch_size, "blocks": blocks}

    def _map(self, function: Callable[[Any], Any]) -> HopeState:
        return replace(self, blocks=tuple(BlockState(*map(function, block)) for block in self.blocks))
