"""Several implementations of one thing timed side by side.

One implementation runs after the other inside every round, so that a slow second of a shared machine falls on all of
them, and a ratio of two medians means something even where the milliseconds drift.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """``count`` threads of torch inside, as many as before behind it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Timing:
    """Seconds of one implementation: every repeat, after the warm-up."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: how far to trust it."""
        if len(self.samples) < 4:
            return (max(self.samples) - min(self.samples)) / self.median
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


class Timer:
    """Seconds of one call. On a GPU: between two events, from an L2 cache that holds nothing of use.

    The cache is filled with a buffer several times its size. Clearing that again and again takes the GPU about a
    millisecond, which gives the host a head start: a call that is launched in less is timed as the GPU runs it, without
    the launches; what a slower host adds between kernels is counted.
    """

    _CLEARS = 20  # of four times an L2 cache: 50 us each on an H200

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._filler = None
        if self._device.type == "cuda":
            cache = torch.cuda.get_device_properties(self._device).L2_cache_size
            self._filler = torch.empty(4 * cache, dtype=torch.uint8, device=self._device)

    def __call__(self, function: Callable[[], object]) -> float:
        if self._filler is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._CLEARS):
            self._filler.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def time_side_by_side(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time every function ``repeats`` times, one after the other in every round, after ``warmup`` rounds.

    Args:
        functions: what to time, by name.
        repeats: timed rounds, at least 1.
        warmup: rounds that are not timed (caches, thread pools, lazy compilation).
        device: where the functions put their work; a GPU times them itself, each from an empty cache (:class:`Timer`).
        on_round: called after every round, for a progress bar.

    Raises:
        ValueError: no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; want at least 1")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    timer = Timer(device)
    for round_index in range(warmup + repeats):
        for name, function in functions.items():
            seconds = timer(function)
            if round_index >= warmup:
                samples[name].append(seconds)
        if on_round is not None:
            on_round()
    return {name: Timing(tuple(values)) for name, values in samples.items()}
