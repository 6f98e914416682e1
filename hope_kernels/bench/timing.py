"""Several implementations of one thing timed side by side.

One implementation runs after the other inside every round, so that a slow second of a shared machine falls on all of
them, and a ratio of two medians means something even where the milliseconds drift.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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


def synchronize(device: torch.device | str) -> None:
    """Wait until an accelerator has done what it was given; nothing to wait for on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


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
        device: where the functions put their work; a GPU is waited for before and after each call.
        on_round: called after every round, for a progress bar.

    Raises:
        ValueError: no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; want at least 1")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(warmup + repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_index >= warmup:
                samples[name].append(time.perf_counter() - start)
        if on_round is not None:
            on_round()
    return {name: Timing(tuple(values)) for name, values in samples.items()}
