"""Memories in a Hugging Face cache: their states live in the cache object, and do what it does.

A cache that a memory meets gets a class of its own below the one it has, with the same name and one more attribute.
So the states are reordered with the beams, taken back with rejected guesses, copied with ``copy.deepcopy`` and freed
with the cache, and nothing else about the cache changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from hope_kernels.integrations.context import CMSContext


class CarriesMemories:
    """What :func:`context_of` mixes into the class of a cache; its methods are those of ``transformers.Cache``."""

    cms_context: CMSContext

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.cms_context.index_select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.cms_context.index_select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.cms_context.repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        # First whatever may be refused: a cache whose halves disagree is of no use.
        self.cms_context.check_undo(abs(tokens_to_remove))
        super().crop(tokens_to_remove)
        self.cms_context.undo(abs(tokens_to_remove))

    def reset(self) -> None:
        super().reset()
        self.cms_context.reset()

    def __reduce_ex__(self, protocol: int) -> Any:
        return _blank, (type(self).__bases__[1],), self.__dict__


@cache
def _carrying_class(kind: type) -> type:
    return type(kind.__name__, (CarriesMemories, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: type) -> Any:
    """An instance without its attributes, as copying and unpickling make it."""
    made = _carrying_class(kind)
    return made.__new__(made)


def context_of(cache: Any) -> CMSContext:
    """The states that belong to a cache, an empty context at first."""
    if not isinstance(cache, CarriesMemories):
        cache.cms_context = CMSContext()
        cache.__class__ = _carrying_class(type(cache))
    return cache.cms_context
