"""Which MLPs of a model get a memory, and how often each is written."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Levels = int | Sequence[int] | Mapping[int, int]


def chunk_sizes(levels: Levels, layers: str | Sequence[int], count: int) -> dict[int, int]:
    """Chunk size of each MLP that gets a memory, by its number in the model.

    Args:
        levels: chunk sizes, fastest first, spread over the L chosen MLPs in order of depth: the i-th of them gets
            ``levels[i * len(levels) // L]``; one size for all; or a mapping ``{number: chunk size}``.
        layers: ``"all"`` or numbers of MLPs; negative ones count from the end.
        count: MLPs of the model.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    if isinstance(levels, Mapping):
        if not (isinstance(layers, str) and layers == "all"):
            raise ValueError(
                f"layers: got {layers!r} with a mapping of levels, which names the layers itself; want 'all'"
            )
        if not levels:
            raise ValueError("levels: got an empty mapping; want {layer: chunk size}")
        numbers = _numbers("levels", list(levels), count)
        return dict(sorted(zip(numbers, map(_size, levels.values()), strict=True)))
    given = [levels] if _integer(levels) is not None else levels
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(f"levels: got {levels!r}; want chunk sizes [512, 2048] or a mapping {{layer: chunk size}}")
    sizes = [_size(size) for size in given]
    for faster, slower in pairwise(sizes):
        if slower <= faster or slower % faster:
            raise ValueError(
                f"levels: got {list(sizes)}; want the fastest first, each chunk size a multiple of the one before it"
            )
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers: got {layers!r}; want 'all' or a list of layer numbers")
        numbers = list(range(count))
    elif isinstance(layers, Sequence):
        numbers = sorted(_numbers("layers", list(layers), count))
    else:
        raise TypeError(f"layers: got {layers!r}; want 'all' or a list of layer numbers")
    if not 0 < len(sizes) <= len(numbers):
        raise ValueError(
            f"levels: got {len(sizes)} chunk sizes for {len(numbers)} layers; want between 1 and that many"
        )
    return {number: sizes[i * len(sizes) // len(numbers)] for i, number in enumerate(numbers)}


def _integer(value: Any) -> int | None:
    """An int, or what stands for one as NumPy's integers do; None for anything else, truth values among it."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _size(given: Any) -> int:
    size = _integer(given)
    if size is None:
        raise TypeError(f"levels: got chunk size {given!r}; want an int")
    if size < 1:
        raise ValueError(f"levels: got chunk size {size}; want at least 1")
    return size


def _numbers(owner: str, given: list[Any], count: int) -> list[int]:
    """Numbers within the model, none of them twice."""
    numbers = [_integer(number) for number in given]
    for number, original in zip(numbers, given, strict=True):
        if number is None:
            raise TypeError(f"{owner}: got layer {original!r}; want an int")
        if not -count <= number < count:
            raise ValueError(f"{owner}: got layer {number}; the model has {count}, 0 to {count - 1}")
    found = [number % count for number in numbers]
    if len(set(found)) < len(found):
        raise ValueError(f"{owner}: got {numbers}, which names a layer twice; want each once")
    return found
