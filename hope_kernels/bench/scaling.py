"""How a backend's time grows: with more threads, and with longer sequences.

Every thread count (or length) runs once in each round, so that ratios are of the same moments. The results are checked
before anything is timed: those of one thread (of the shortest sequence) against the reference's, those of the others to
be the same bits, as the package promises: all results for any number of threads, the outputs of the tokens that a
longer sequence has in common with a shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hope_kernels.bench.implementations import AGREEMENT, REFERENCE, Implementation, Results, difference, make_call
from hope_kernels.bench.machine import copy_bandwidth, fma_peak
from hope_kernels.bench.peak_memory import measure_peak_memory
from hope_kernels.bench.problems import Problem, shape_problem
from hope_kernels.bench.shapes import MODES, Shape
from hope_kernels.bench.speed import DisagreementError, Notify
from hope_kernels.bench.timing import Timing, thread_count, time_side_by_side


@dataclass
class ThreadRow:
    """One shape and mode on so many threads.

    Attributes:
        shape, sizes, mode, implementation, dtype: what ran.
        threads: of torch and of the engine.
        ms, spread: median milliseconds of one call; interquartile range over the median.
        speedup: how many times faster than on one thread in the same rounds.
        gflops: by the convention (:func:`~hope_kernels.bench.shapes.products_per_token`).
        peak_fraction: of the multiply-add peak of so many threads; None in float64 and without the compiled core.
    """

    shape: str
    sizes: str
    mode: str
    implementation: str
    dtype: str
    threads: int
    ms: float
    spread: float
    speedup: float
    gflops: float
    peak_fraction: float | None


@dataclass
class LengthRow:
    """One shape and mode at a number of tokens.

    Attributes:
        shape, sizes, mode, implementation, dtype, ms, spread: as in :class:`ThreadRow`.
        tokens, chunks: of each sequence.
        ns_per_head_token: median nanoseconds for each token of each memory; the same for all lengths where time is
            linear.
        peak_bytes: peak memory of one call beyond its inputs, in a process of its own; None where not measured.
    """

    shape: str
    sizes: str
    mode: str
    implementation: str
    dtype: str
    tokens: int
    chunks: int
    ms: float
    spread: float
    ns_per_head_token: float
    peak_bytes: int | None


@dataclass
class ScalingReport:
    """Both kinds of rows, and the machine's limits measured in the same run.

    Attributes:
        peak_gflops: multiply-adds by the number of threads; empty in float64 and without the compiled core.
        copy_gbytes: GB/s of large copies, read and written together, by the number of threads.
    """

    threads: list[ThreadRow]
    lengths: list[LengthRow]
    peak_gflops: dict[int, float]
    copy_gbytes: dict[int, float]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class _Setting:
    engine: Implementation
    dtype: torch.dtype
    repeats: int
    seed: int

    def row(self, shape: Shape, mode: str, timing: Timing) -> dict[str, Any]:
        """The fields that both kinds of rows have."""
        return {
            "shape": shape.name,
            "sizes": shape.sizes,
            "mode": mode,
            "implementation": self.engine.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "ms": timing.median * 1e3,
            "spread": timing.spread,
        }

    def check(self, name: str, found: Results, problem: Problem, mode: str) -> None:
        """That ``found`` is what the reference computes."""
        error = difference(found, make_call(REFERENCE, problem, mode)())
        if not error <= AGREEMENT[self.dtype]:
            raise DisagreementError(
                f"{name}: relative difference to the reference is {error:.2e}; want at most "
                f"{AGREEMENT[self.dtype]:.0e}. It was not timed."
            )


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, .. and ``most``."""
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most})


def _on(count: int, call: Callable[[], Results]) -> Callable[[], Results]:
    """``call`` on so many threads."""

    def run() -> Results:
        torch.set_num_threads(count)
        return call()

    return run


def _check_same(name: str, found: Results, expected: Results) -> None:
    for key, want in expected.items():
        if not torch.equal(found[key], want):
            raise DisagreementError(f"{name}: {key} is not the same bits. It was not timed.")


def measure_scaling(
    thread_shapes: Iterable[Shape],
    length_shapes: Iterable[Shape],
    *,
    counts: Sequence[int],
    lengths: Sequence[int],
    backend: str = "cpu",
    modes: Iterable[str] = MODES,
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
    memory: bool = True,
    seed: int = 0,
    notify: Notify = lambda message: None,
) -> ScalingReport:
    """Time ``thread_shapes`` on each number of threads and ``length_shapes`` at each number of tokens.

    Args:
        thread_shapes, length_shapes: what to run, each with its own batch, heads and sizes.
        counts: numbers of threads, 1 among them.
        lengths: tokens of a sequence, in the place of the shape's own; on all of torch's threads.
        backend: a name that runs on the CPU and gives the same bits on any number of threads.
        modes: of ``"forward"``, ``"forward+backward"``.
        dtype: of the tokens.
        repeats: timed rounds, after one that is not timed.
        memory: measure the peak memory at each length as well.
        seed: of the inputs.
        notify: told what starts now, and ``""`` at the end of each shape and mode, for a progress bar.

    Raises:
        ValueError: ``counts`` lacks 1, or a count or length is below 1.
        DisagreementError: results are wrong, or depend on the threads or on the tokens that follow.
    """
    counts, lengths, modes = sorted(set(counts)), sorted(set(lengths)), list(modes)
    if 1 not in counts or counts[0] < 1:
        raise ValueError(f"counts is {counts}; want numbers of threads from 1 on, 1 among them")
    if lengths and lengths[0] < 1:
        raise ValueError(f"lengths is {lengths}; want numbers of tokens from 1 on")
    setting = _Setting(Implementation(backend), dtype, repeats, seed)
    report = ScalingReport([], [], {}, {})
    with thread_count(counts[0]):
        notify("the machine's limits")
        for count in counts:
            torch.set_num_threads(count)
            peak = None if dtype == torch.float64 else fma_peak()
            if peak is not None:
                report.peak_gflops[count] = peak / 1e9
            report.copy_gbytes[count] = copy_bandwidth() / 1e9
    for shape in thread_shapes:
        for mode in modes:
            notify(f"{shape.name} {mode}: threads")
            report.threads += _measure_threads(setting, shape, mode, counts, report.peak_gflops)
            notify("")
    for shape in length_shapes:
        for mode in modes:
            notify(f"{shape.name} {mode}: lengths")
            rows = _measure_lengths(setting, shape, mode, lengths)
            for row in rows if memory else ():
                notify(f"{shape.name} {mode}: peak memory of {row.tokens} tokens")
                sized = shape.scaled(tokens=row.tokens)
                row.peak_bytes = measure_peak_memory(sized, backend, mode, dtype=dtype, seed=seed)
            report.lengths += rows
            notify("")
    return report


def _measure_threads(
    setting: _Setting, shape: Shape, mode: str, counts: list[int], peaks: dict[int, float]
) -> list[ThreadRow]:
    problem = shape_problem(shape, dtype=setting.dtype, seed=setting.seed)
    call = make_call(setting.engine, problem, mode)
    name = f"{setting.engine.name} at {shape.name} ({shape.sizes}), {mode}"
    with thread_count(1):
        expected = call()
        setting.check(name, expected, problem, mode)
        for count in counts[1:]:
            _check_same(f"{name}, {count} threads", _on(count, call)(), expected)
        timings = time_side_by_side({str(count): _on(count, call) for count in counts}, repeats=setting.repeats)
    rows = []
    for count in counts:
        timing = timings[str(count)]
        gflops = shape.flops(mode) / 1e9 / timing.median
        rows.append(
            ThreadRow(
                **setting.row(shape, mode, timing),
                threads=count,
                speedup=timings["1"].median / timing.median,
                gflops=gflops,
                peak_fraction=gflops / peaks[count] if count in peaks else None,
            )
        )
    return rows


def _measure_lengths(setting: _Setting, shape: Shape, mode: str, lengths: list[int]) -> list[LengthRow]:
    longest = shape_problem(shape.scaled(tokens=lengths[-1]), dtype=setting.dtype, seed=setting.seed)
    problems = {tokens: longest.first(tokens) for tokens in lengths}
    calls = {tokens: make_call(setting.engine, problem, mode) for tokens, problem in problems.items()}
    name, shortest = f"{setting.engine.name} at {shape.name}, {mode}", lengths[0]
    expected = calls[shortest]()
    setting.check(f"{name}, {shortest} tokens", expected, problems[shortest], mode)
    for tokens in lengths[1:]:
        found = calls[tokens]()["output"][:, :shortest]
        _check_same(f"{name}, {tokens} tokens", {"output": found}, {"output": expected["output"]})
    timings = time_side_by_side({str(tokens): call for tokens, call in calls.items()}, repeats=setting.repeats)
    rows = []
    for tokens in lengths:
        timing, sized = timings[str(tokens)], shape.scaled(tokens=tokens)
        rows.append(
            LengthRow(
                **setting.row(sized, mode, timing),
                tokens=tokens,
                chunks=tokens // shape.chunk_size,
                ns_per_head_token=timing.median * 1e9 / sized.head_tokens,
                peak_bytes=None,
            )
        )
    return rows
